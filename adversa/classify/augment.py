"""Augmentation of a whole batch at once: tensor operations with one generator, so that (seed, step)
decides it all.

On the training worker and on the critical path, so few passes over the pixels: the square's
symmetries are folded into the one resampling, and every colour change is affine in a pixel's three
channels, so one 3x3 matrix an image does them all.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from adversa.common.symmetry import matrices, turn
from adversa.config import Augment
from adversa.training.device import to_device

ALL = slice(None)
ERASED = (0.02, 0.4)  # Zhong et al. 2020, section 4: s_l, s_h, the erased share of the image's area
ASPECT = 1 / 0.3  # and 1 / r_1, the largest ratio of the rectangle's sides


def augment(
    pixels: Tensor,
    config: Augment,
    generator: Generator,
    size: int | None = None,
    rows: slice = ALL,
    side: int | None = None,
) -> Tensor:
    """pixels [B, 3, S, S] in [0, 1] -> [B, 3, side, side] (None: S) in [0, 1], channels last. A
    strength of 0 costs nothing.

    size, rows: `pixels` are these rows of a batch of `size` images (None: all); the draws are made
    for the whole batch, so an image is changed alike on however many workers. generator: on the
    CPU, whatever the device of the pixels.
    """
    size = len(pixels) if size is None else size
    u = torch.rand(19, size, generator=generator)[:, rows]
    assert u.shape[1] == len(pixels), (u.shape, len(pixels))
    which = (u[0] * 8).long() if config.flips else None
    side = side or pixels.shape[-1]
    if config.rotate or config.zoom or config.shift or side != pixels.shape[-1]:
        pixels = warp(pixels, placement(config, u[1:5], which), side)
    elif which is not None:
        pixels = turn(pixels, to_device(which, pixels.device))
    if config.brightness or config.contrast or config.saturation or config.tint:
        pixels = colour(pixels, config, u[5:11])
    if config.erase:
        pixels = erase(pixels, config.erase, u[11:])
    return pixels.contiguous(memory_format=torch.channels_last)


def placement(config: Augment, u: Tensor, which: Tensor | None) -> Tensor:
    """u [4, B] in [0, 1) -> [B, 2, 3]: from a place in the output to one in the input, the side
    being [-1, 1].

    Rotation, zoom and shift first, then symmetry which[i] of the result.
    """
    u = 2 * u - 1
    angle, scale, shift = (
        u[0] * math.radians(config.rotate),
        torch.exp(u[1] * config.zoom),
        u[2:] * (2 * config.shift),
    )
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    linear = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    if which is not None:
        linear = linear @ torch.from_numpy(matrices())[which]
    return torch.cat([linear, shift.T[:, :, None]], 2)


def warp(pixels: Tensor, theta: Tensor, side: int) -> Tensor:
    """Bilinear resampling to [B, 3, side, side] at the places theta [B, 2, 3]; what lies outside is
    mirrored in.

    There is no filter against aliasing: `side` is meant to be above half of the pictures' own.
    """
    grid = F.affine_grid(
        to_device(theta, pixels.device), [*pixels.shape[:2], side, side], align_corners=False
    )
    return F.grid_sample(
        pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )


def colour(pixels: Tensor, config: Augment, u: Tensor) -> Tensor:
    """Brightness, white balance, contrast about the image's mean and saturation about a pixel's
    grey, in this order.

    u [6, B] in [0, 1). With gains g (diagonal G), contrast c, saturation s and image mean m, a
    pixel x becomes s y + (1 - s) mean(y), y = c G x + (1 - c) m; that is c S G x + (1 - c) m, S = s
    I + (1 - s) / 3, whose rows add up to 1.
    """
    u = to_device(2 * u - 1, pixels.device)
    gain = (1 + config.brightness * u[0])[:, None] * (1 + config.tint * u[1:4].T)
    contrast, saturation = 1 + config.contrast * u[4], 1 + config.saturation * u[5]
    pixels = (
        pixels.contiguous()
    )  # planes: a 3x3 matrix times 3 long rows is seven times as fast as long columns of 3
    mean = (pixels.mean((2, 3)) * gain).mean(1)
    mixing = (
        saturation[:, None, None] * torch.eye(3, device=pixels.device)
        + ((1 - saturation) / 3)[:, None, None]
    )
    matrix = contrast[:, None, None] * mixing * gain[:, None, :]
    out = torch.baddbmm(((1 - contrast) * mean)[:, None, None], matrix, pixels.flatten(2))
    return out.clamp_(0, 1).view_as(pixels)


def erase(pixels: Tensor, probability: float, u: Tensor) -> Tensor:
    """Random erasing (Zhong et al. 2020, algorithm 1): a rectangle of one random colour, with this
    probability. u [8, B].

    Its share of the area is uniform in ERASED, the log of its aspect uniform; aspects that do not
    fit the square are left out beforehand, in place of drawing again until it fits. One colour, not
    noise: that costs no draw a pixel.
    """
    side = pixels.shape[-1]
    share = ERASED[0] + (ERASED[1] - ERASED[0]) * u[1]
    aspect = torch.exp(
        (2 * u[2] - 1) * torch.minimum(-torch.log(share), torch.tensor(math.log(ASPECT)))
    )
    height = (side * torch.sqrt(share * aspect)).round().clamp(1, side).long()
    width = (side * torch.sqrt(share / aspect)).round().clamp(1, side).long()
    top, left = (u[3] * (side - height + 1)).long(), (u[4] * (side - width + 1)).long()
    bottom = torch.where(u[0] < probability, top + height, top)  # an empty rectangle
    inside = to_device(rectangles(top, bottom, left, left + width, side), pixels.device)
    return torch.where(inside, to_device(u[5:8].T, pixels.device)[:, :, None, None], pixels)


def rectangles(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, side: int) -> Tensor:
    """bool [B, 1, S, S]: rows top ... bottom - 1 and columns left ... right - 1 of image i, all [B]
    of integers.
    """
    at = torch.arange(side)
    rows = (at >= top[:, None]) & (at < bottom[:, None])
    columns = (at >= left[:, None]) & (at < right[:, None])
    return rows[:, None, :, None] & columns[:, None, None, :]
