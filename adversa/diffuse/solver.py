"""Solvers of the probability-flow ODE  dx/dsigma = (x - D(x; sigma)) / sigma  (Karras et al. 2022, equation 1, sigma(t) = t).

Every row of a batch has its own noise levels, so that rows may start at different ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adversa.diffuse.edm import DenoiserFn


def karras_sigmas(start: Tensor, sigma_min: float, rho: float, steps: int) -> Tensor:
    """Noise levels [steps + 1, B] from `start` [B] down to sigma_min in `steps` - 1 steps, then 0 (Karras et al. 2022, equation 5).

    Computed in float64, given in float32.
    """
    assert steps >= 2 and bool((start > sigma_min).all()), (steps, start, sigma_min)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64, device=start.device)[:, None]
    top = start.double()[None] ** (1 / rho)
    sigmas = (top + ramp * (sigma_min ** (1 / rho) - top)) ** rho
    sigmas[0] = start.double()
    return torch.cat([sigmas, torch.zeros_like(sigmas[:1])]).float()


def dpmpp_2m(denoiser: DenoiserFn, x: Tensor, sigmas: Tensor, label: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), one evaluation a step, second order.

    x [B, C, H, W] at sigmas[0]; sigmas [steps + 1, B] falling. The first step, and a step to 0 (where ln sigma ends), are of first
    order.
    """
    previous: Tensor | None = None
    for i in range(len(sigmas) - 1):
        now, after = sigmas[i], sigmas[i + 1]
        x0 = denoiser(x, now, label)
        ratio = _rows(after / now)  # exp(-h), h = ln(now / after)
        direction = x0
        if previous is not None:
            # k = h / (2 h_previous); a step to 0 has h = infinity and takes k = 0: the first-order step, whose end is x0 itself.
            h, before = (now / after.clamp(min=1e-30)).log(), (sigmas[i - 1] / now).log()
            k = torch.where(after > 0, h / (2 * before), torch.zeros_like(now))
            direction = x0 + _rows(k) * (x0 - previous)
        x = ratio * x + (1 - ratio) * direction
        previous = x0
    return x


def heun(denoiser: DenoiserFn, x: Tensor, sigmas: Tensor, label: Tensor) -> Tensor:
    """Heun's method (Karras et al. 2022, algorithm 1, no churn), two evaluations a step, second order; a step to 0 is Euler's."""
    for i in range(len(sigmas) - 1):
        now, after = sigmas[i], sigmas[i + 1]
        slope = (x - denoiser(x, now, label)) / _rows(now)
        step = _rows(after - now)
        euler = x + step * slope
        last = after == 0
        if bool(last.all()):
            return euler
        level = torch.where(last, now, after)  # a finished row is evaluated where it is harmless, and its answer not used
        slope_after = (euler - denoiser(euler, level, label)) / _rows(level)
        x = torch.where(_rows(last), euler, x + step * (slope + slope_after) / 2)
    return x


def _rows(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1)


SOLVERS = {"dpmpp_2m": dpmpp_2m, "heun": heun}
