"""Guidance wraps a denoiser and returns a denoiser."""

from __future__ import annotations

import torch
from torch import Tensor

from adversa.diffuse.edm import DenoiserFn


def classifier_free(denoiser: DenoiserFn, scale: Tensor, null_label: int, low: float, high: float) -> DenoiserFn:
    """x_uncond + w (x_cond - x_uncond)  (Ho & Salimans 2022), only where low < sigma <= high (Kynkaanniemi et al. 2024).

    scale [B]: w of each row. A row at w = 1, or outside the interval, is the conditional answer itself, bit for bit: its pass is
    the same whatever its neighbours ask. The second pass over the batch is left out where no row needs it.
    """

    def guided(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        conditional = denoiser(x, sigma, label)
        active = (scale != 1) & (sigma > low) & (sigma <= high)
        if not bool(active.any()):
            return conditional
        unconditional = denoiser(x, sigma, torch.full_like(label, null_label))
        mixed = unconditional + scale.view(-1, 1, 1, 1) * (conditional - unconditional)
        return torch.where(active.view(-1, 1, 1, 1), mixed, conditional)

    return guided
