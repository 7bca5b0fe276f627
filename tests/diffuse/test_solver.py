from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from adversa.diffuse.solver import dpmpp_2m, heun, karras_sigmas

MEAN, SPREAD = 0.3, 0.5


def ideal(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    """The denoiser of data N(MEAN, SPREAD^2): E[x0 | x]."""
    s = sigma.view(-1, 1, 1, 1)
    return MEAN + SPREAD**2 / (SPREAD**2 + s**2) * (x - MEAN)


def exact(x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The ODE's solution for that data: deviations shrink with the total spread."""
    ratio = ((SPREAD**2 + end**2) / (SPREAD**2 + start**2)).sqrt()
    return MEAN + (x - MEAN) * ratio.view(-1, 1, 1, 1)


def test_karras_sigmas_are_equation_5() -> None:
    start = torch.tensor([40.0, 2.0])
    got = karras_sigmas(start, 0.02, 7.0, 10)
    assert got.shape == (11, 2) and torch.equal(got[0], start) and bool((got[-1] == 0).all())
    i = np.arange(10)
    for row, top in enumerate((40.0, 2.0)):
        expected = (top ** (1 / 7) + i / 9 * (0.02 ** (1 / 7) - top ** (1 / 7))) ** 7
        np.testing.assert_allclose(got[:-1, row].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("solve", [dpmpp_2m, heun])
def test_second_order_towards_the_closed_form(solve: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start, end = torch.tensor([10.0, 3.0], dtype=torch.float64), torch.tensor([0.1, 0.05], dtype=torch.float64)
    x = x * start.view(-1, 1, 1, 1)
    errors = []
    for steps in (40, 80, 160):
        ramp = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None]
        sigmas = (start ** (1 / 7) + ramp * (end ** (1 / 7) - start ** (1 / 7))) ** 7
        errors.append(float((solve(ideal, x, sigmas, torch.zeros(2, dtype=torch.long)) - exact(x, start, end)).abs().max()))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert ((orders > 1.8) & (orders < 2.6)).all(), (errors, orders)


@pytest.mark.parametrize("solve", [dpmpp_2m, heun])
def test_ends_at_the_data_from_any_start(solve: Callable[..., Tensor]) -> None:
    start = torch.tensor([40.0, 2.0, 0.5])
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * start.view(-1, 1, 1, 1)
    out = solve(ideal, x, karras_sigmas(start, 0.01, 7.0, 60), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(out, exact(x, start, torch.zeros(3)), atol=5e-3, rtol=0)


def test_last_step_returns_the_denoised() -> None:
    x = torch.randn(2, 1, 4, 4)
    sigmas = torch.tensor([[1.0, 1.0], [0.5, 0.2], [0.0, 0.0]])
    seen: list[Tensor] = []

    def spy(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        seen.append(ideal(x, sigma, label))
        return seen[-1]

    torch.testing.assert_close(dpmpp_2m(spy, x, sigmas, torch.zeros(2, dtype=torch.long)), seen[-1])


def test_evaluations_a_step() -> None:
    count = 0

    def counting(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return ideal(x, sigma, label)

    sigmas, label = karras_sigmas(torch.tensor([5.0]), 0.1, 7.0, 8), torch.zeros(1, dtype=torch.long)
    dpmpp_2m(counting, torch.ones(1, 1, 2, 2), sigmas, label)
    assert count == 8
    count = 0
    heun(counting, torch.ones(1, 1, 2, 2), sigmas, label)
    assert count == 15


def test_agrees_with_diffusers() -> None:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type="sample", use_karras_sigmas=True,
        final_sigmas_type="zero", lower_order_final=True, thresholding=False,
    )  # fmt: skip
    scheduler.set_timesteps(12)

    def curved(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        return torch.tanh(x / (1 + s)) + 0.1 * torch.sin(3 * x / (1 + s))

    sigmas = scheduler.sigmas.double()
    start = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * sigmas[0]
    ours = dpmpp_2m(curved, start, sigmas[:, None].repeat(1, 2), torch.zeros(2, dtype=torch.long))
    # diffusers carries x / sqrt(1 + sigma^2) (variance preserving) for this scheduler.
    theirs = start / (1 + sigmas[0] ** 2).sqrt()
    for i, t in enumerate(scheduler.timesteps):
        sigma = sigmas[i].repeat(2)
        x0 = curved(theirs * (1 + sigmas[i] ** 2).sqrt(), sigma, torch.zeros(2))
        theirs = scheduler.step(x0, t, theirs).prev_sample.double()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
