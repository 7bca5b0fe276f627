"""Solvers of the probability-flow ODE  dx/dsigma = (x - D(x; sigma)) / sigma  (Karras et al. 2022,
equation 1, sigma(t) = t).

A row of a batch holds two images: the point where the denoiser is asked next, and a memory. Every
solver here is linear in them: after its i-th answer x0 = D(point; sigma_i)

    point, memory  <-  a point + b x0 + c memory,  d point + e x0

so a solver is a table of numbers, made beforehand in float64, and rows at different steps, of
different noise levels, even of different solvers, share one batch and one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adversa.diffuse.edm import DenoiserFn


@dataclass(frozen=True)
class SolverTable:
    """A solver's noise level at each evaluation, sigma float64 [E], and its coefficients a, b, c,
    d, e, combine float64 [E, 5] (see the module).
    """

    sigma: np.ndarray
    combine: np.ndarray

    def __len__(self) -> int:
        return len(self.sigma)


def karras_sigmas(start: float, sigma_min: float, rho: float, steps: int) -> np.ndarray:
    """Noise levels, float64 [steps + 1]: `start` down to sigma_min in `steps` - 1 steps, then 0
    (Karras et al. 2022, equation 5).

    rho = inf: evenly spaced in the logarithm.
    """
    assert steps >= 2 and start > sigma_min > 0, (steps, start, sigma_min)
    if np.isinf(rho):
        return np.append(np.geomspace(start, sigma_min, steps), 0.0)
    ramp = np.linspace(start ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho
    ramp[0], ramp[-1] = start, sigma_min
    return np.append(ramp, 0.0)


def share_of_steps(start: float, top: float, sigma_min: float, rho: float, steps: int) -> int:
    """How many of `steps` steps from `top` lie below `start`, rounded up, at least 2: a start
    further down needs fewer.
    """
    if np.isinf(rho):
        share = np.log(start / sigma_min) / np.log(top / sigma_min)
    else:
        low = sigma_min ** (1 / rho)
        share = (start ** (1 / rho) - low) / (top ** (1 / rho) - low)
    return max(2, min(steps, int(np.ceil(steps * share - 1e-9))))


def dpmpp_2m(sigmas: np.ndarray) -> SolverTable:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), one evaluation a step, second order; sigmas
    [steps + 1] falling.

    With h = ln(now / after) and k = h / (2 h of the step before):  x <- e^-h x + (1 - e^-h) ((1 +
    k) x0 - k x0 of before). The first step, and a step to 0 (where ln sigma ends), are of first
    order; the latter ends at x0 itself.
    """
    _check(sigmas)
    rows = []
    for i, (now, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        k = np.log(now / after) / (2 * np.log(sigmas[i - 1] / now)) if i and after else 0.0
        ratio = after / now
        rows.append([ratio, (1 - ratio) * (1 + k), -(1 - ratio) * k, 0.0, 1.0])
    return SolverTable(np.asarray(sigmas[:-1], np.float64), np.asarray(rows))


def heun(sigmas: np.ndarray) -> SolverTable:
    """Heun's method (Karras et al. 2022, algorithm 1, no churn), two evaluations a step, second
    order; a step to 0 is Euler's.

    With s = after - now: the first evaluation goes to Euler's point  x + s (x - x0) / now  and
    remembers half of the way, m = x + s (x - x0) / (2 now); the second, at Euler's point x' and
    `after`, ends at  m + s (x' - x0') / (2 after).
    """
    _check(sigmas)
    levels, rows = [], []
    for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        half = (after - now) / (2 * now)
        levels.append(now)
        rows.append([after / now, 1 - after / now, 0.0, 1 + half, -half])
        if after:
            half = (after - now) / (2 * after)
            levels.append(after)
            rows.append([half, -half, 1.0, 0.0, 1.0])
    return SolverTable(np.asarray(levels, np.float64), np.asarray(rows))


def _check(sigmas: np.ndarray) -> None:
    assert len(sigmas) >= 2 and np.all(np.diff(sigmas) < 0) and sigmas[-1] >= 0, sigmas


def advance(point: Tensor, memory: Tensor, x0: Tensor, combine: Tensor) -> tuple[Tensor, Tensor]:
    """The header's update of rows [B, C, h, w]; combine [B, 5], of their dtype."""
    a, b, c, d, e = combine.view(-1, 5, 1, 1, 1).unbind(1)
    return torch.addcmul(a * point, b, x0).addcmul_(c, memory), torch.addcmul(d * point, e, x0)


def solve(denoiser: DenoiserFn, x: Tensor, tables: list[SolverTable], label: Tensor) -> Tensor:
    """Rows x [B, C, h, w] after all evaluations, each by its own table, all of one length, in the
    dtype of x.
    """
    assert len({len(p) for p in tables}) == 1 and len(tables) == len(x), [len(p) for p in tables]
    memory = torch.zeros_like(x)
    for i in range(len(tables[0])):
        sigma = torch.tensor([p.sigma[i] for p in tables], dtype=x.dtype, device=x.device)
        combine = torch.tensor(
            np.stack([p.combine[i] for p in tables]), dtype=x.dtype, device=x.device
        )
        x, memory = advance(x, memory, denoiser(x, sigma, label), combine)
    return x


SOLVERS: dict[str, Callable[[np.ndarray], SolverTable]] = {"dpmpp_2m": dpmpp_2m, "heun": heun}
