"""Moving averages of the weights: with a fixed decay, or of a fixed relative width."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from adversa import config as cfg


def power_exponent(width: float) -> float:
    """gamma of the power-function average whose weights over n steps have the standard deviation
    width * n (0 < width < 0.29).

    width^2 = (g + 1) / ((g + 2)^2 (g + 3)) (Karras et al. 2024, equation 123), so g is the largest
    root of g^3 + 7 g^2 + (16 - width^-2) g + (12 - width^-2) (algorithm 2).
    """
    assert 0 < width < 0.29, width
    s = width**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def decay(config: cfg.Denoiser, step: int, scratch: bool) -> float:
    """beta of  average <- beta average + (1 - beta) weights  after step 1, 2, ... .

    config.ema_width: (1 - 1/t)^(gamma + 1) (Karras et al. 2024, equation 127); the weights before
    step 1 count for nothing, and step i of n for (i^(gamma+1) - (i-1)^(gamma+1)) / n^(gamma+1).
    Otherwise config.ema; from scratch at most t / (9 + t), so that random initial weights are soon
    forgotten.
    """
    if config.ema_width is not None:
        found: float = (1 - 1 / step) ** (power_exponent(config.ema_width) + 1)
        return found
    return min(config.ema, step / (9 + step)) if scratch else config.ema


def update(average: list[Tensor], weights: list[Tensor], beta: float) -> None:
    """average <- beta average + (1 - beta) weights."""
    get_ema_multi_avg_fn(beta)(average, weights, 0)
