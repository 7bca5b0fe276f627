"""Augmentation of a whole batch at once: tensor operations with one generator, so that (seed, step) decides it all."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

TURN = 20.0  # degrees: rotation is uniform in +-TURN
ZOOM = 0.15  # log scale is uniform in +-ZOOM
SHIFT = 0.06  # of the side, each way
LIGHT = 0.15  # brightness factor in 1 +- LIGHT
CONTRAST = 0.2
SATURATION = 0.2
TINT = 0.04  # gain of each channel in 1 +- TINT: white balance differs between dermatoscopes


def augment(pixels: Tensor, generator: Generator) -> Tensor:
    """pixels [B, 3, S, S] in [0, 1] -> the same shape and range: flips, quarter turns, small affine, colour jitter.

    generator: on the CPU, whatever the device of the pixels; the draws are the same everywhere.
    """
    out = colour(affine(turn(pixels, generator), generator), generator)
    return out.contiguous(memory_format=torch.channels_last)


def turn(pixels: Tensor, generator: Generator) -> Tensor:
    """One of the square's eight symmetries for each image, exactly (no resampling)."""
    assert pixels.shape[-1] == pixels.shape[-2], tuple(pixels.shape)
    which = torch.randint(8, (len(pixels),), generator=generator)
    out = torch.empty_like(pixels)
    for k in range(8):
        rows = (which == k).nonzero().squeeze(1).to(pixels.device)
        if len(rows):
            x = torch.rot90(pixels[rows], k % 4, (2, 3))
            out[rows] = x.flip(3) if k >= 4 else x
    return out


def affine(pixels: Tensor, generator: Generator) -> Tensor:
    """Small rotation, scaling and shift by bilinear resampling; what lies outside is mirrored in."""
    u = torch.rand(4, len(pixels), generator=generator).mul_(2).sub_(1)
    angle, scale, shift = u[0] * math.radians(TURN), torch.exp(u[1] * ZOOM), u[2:] * (2 * SHIFT)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(theta.to(pixels.device), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def colour(pixels: Tensor, generator: Generator) -> Tensor:
    """Brightness, white balance, contrast about the image's mean and saturation about its grey, in this order."""
    u = torch.rand(6, len(pixels), 1, 1, 1, generator=generator).mul_(2).sub_(1).to(pixels.device)
    gain = (1 + LIGHT * u[0]) * (1 + TINT * torch.cat([u[1], u[2], u[3]], 1))
    x = pixels * gain
    mean = x.mean((1, 2, 3), keepdim=True)
    x = torch.lerp(mean, x, 1 + CONTRAST * u[4])
    grey = x.mean(1, keepdim=True)
    return torch.lerp(grey, x, 1 + SATURATION * u[5]).clamp_(0, 1)
