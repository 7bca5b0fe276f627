from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from adversa.diffuse.solver import (
    SolverTable,
    advance,
    dpmpp_2m,
    heun,
    karras_sigmas,
    share_of_steps,
    solve,
)

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
    i = np.arange(10)
    for top in (40.0, 2.0):
        got = karras_sigmas(top, 0.02, 7.0, 10)
        expected = (top ** (1 / 7) + i / 9 * (0.02 ** (1 / 7) - top ** (1 / 7))) ** 7
        assert got.shape == (11,) and got[0] == top and got[9] == 0.02 and got[10] == 0
        np.testing.assert_allclose(got[:-1], expected, rtol=1e-12)


def test_an_infinite_rho_is_even_in_the_logarithm() -> None:
    got = karras_sigmas(8.0, 0.125, float("inf"), 7)
    np.testing.assert_allclose(got, [8, 4, 2, 1, 0.5, 0.25, 0.125, 0], rtol=1e-12)


@pytest.mark.parametrize("rho", [7.0, float("inf")])
def test_a_start_further_down_takes_its_share_of_the_steps(rho: float) -> None:
    whole = karras_sigmas(40.0, 0.02, rho, 16)
    for i in (1, 5, 12):  # from a level of the whole schedule: the steps that are left of it
        assert share_of_steps(whole[i], 40.0, 0.02, rho, 15) == 15 - i
    assert (
        share_of_steps(40.0, 40.0, 0.02, rho, 15) == 15
        and share_of_steps(0.021, 40.0, 0.02, rho, 15) == 2
    )


@pytest.mark.parametrize("solver", [dpmpp_2m, heun])
def test_second_order_towards_the_closed_form(solver: Callable[[np.ndarray], SolverTable]) -> None:
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start, end = (
        torch.tensor([10.0, 3.0], dtype=torch.float64),
        torch.tensor([0.1, 0.05], dtype=torch.float64),
    )
    x = x * start.view(-1, 1, 1, 1)
    errors = []
    for steps in (40, 80, 160):
        tables = [
            solver(karras_sigmas(float(a), float(b), 7.0, steps + 1)[:-1])
            for a, b in zip(start, end, strict=True)
        ]
        errors.append(
            float(
                (solve(ideal, x, tables, torch.zeros(2, dtype=torch.long)) - exact(x, start, end))
                .abs()
                .max()
            )
        )
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert ((orders > 1.8) & (orders < 2.6)).all(), (errors, orders)


@pytest.mark.parametrize("solver", [dpmpp_2m, heun])
def test_ends_at_the_data_from_any_start(solver: Callable[[np.ndarray], SolverTable]) -> None:
    start = torch.tensor([40.0, 2.0, 0.5])
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * start.view(
        -1, 1, 1, 1
    )
    tables = [solver(karras_sigmas(float(s), 0.01, 7.0, 60)) for s in start]
    out = solve(ideal, x, tables, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(out, exact(x, start, torch.zeros(3)), atol=5e-3, rtol=0)


def test_the_last_step_returns_the_denoised() -> None:
    table = dpmpp_2m(np.array([1.0, 0.5, 0.0]))
    point, memory, x0 = (torch.randn(2, 1, 4, 4) for _ in range(3))
    combine = torch.tensor(table.combine[-1:], dtype=torch.float32).repeat(2, 1)
    assert torch.equal(advance(point, memory, x0, combine)[0], x0)


def test_heun_is_the_papers_algorithm() -> None:
    sigmas, x = [3.0, 1.0, 0.4, 0.0], torch.randn(1, 1, 4, 4, dtype=torch.float64)
    expected, y = x, torch.zeros(1, dtype=torch.long)

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - torch.tanh(ideal(x, torch.tensor([sigma], dtype=x.dtype), y))) / sigma

    for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        d = slope(expected, now)
        euler = expected + (after - now) * d
        expected = expected + (after - now) * (d + slope(euler, after)) / 2 if after else euler
    got = solve(lambda x, s, y: torch.tanh(ideal(x, s, y)), x, [heun(np.array(sigmas))], y)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_evaluations_a_step() -> None:
    sigmas = karras_sigmas(5.0, 0.1, 7.0, 8)
    assert len(dpmpp_2m(sigmas)) == 8 and len(heun(sigmas)) == 15


def test_agrees_with_diffusers() -> None:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="sample",
        use_karras_sigmas=True,
        final_sigmas_type="zero",
        lower_order_final=True,
        thresholding=False,
    )
    scheduler.set_timesteps(12)

    def curved(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        return torch.tanh(x / (1 + s)) + 0.1 * torch.sin(3 * x / (1 + s))

    sigmas = scheduler.sigmas.double()
    start = (
        torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        * sigmas[0]
    )
    ours = solve(curved, start, [dpmpp_2m(sigmas.numpy())] * 2, torch.zeros(2, dtype=torch.long))
    # diffusers carries x / sqrt(1 + sigma^2) (variance preserving) for this scheduler.
    theirs = start / (1 + sigmas[0] ** 2).sqrt()
    for i, t in enumerate(scheduler.timesteps):
        sigma = sigmas[i].repeat(2)
        x0 = curved(theirs * (1 + sigmas[i] ** 2).sqrt(), sigma, torch.zeros(2))
        theirs = scheduler.step(x0, t, theirs).prev_sample.double()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
