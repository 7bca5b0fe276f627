from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from adversa import config as cfg
from adversa.diffuse import edm
from adversa.diffuse.objective import (
    LEVELS,
    Objective,
    Uncertainty,
    draw,
    levels,
    min_snr_weight,
    validation_loss,
    validation_losses,
)

CPU = torch.device("cpu")
S = 0.5


class Ideal(nn.Module):
    """The best denoiser of data N(0, S^2): it errs by S^2 sigma^2 / (S^2 + sigma^2)."""

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return (S**2 / (S**2 + sigma**2)).view(-1, 1, 1, 1) * x


def rows(
    config: cfg.Denoiser, seed: int, count: int = 512
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sigma, loss, error), each [count], of the ideal denoiser."""
    x = S * torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1000 + seed))
    d = draw(tuple(x.shape), config, seed, CPU)
    return d.sigma, *Objective(Ideal(), config)(
        x, d.sigma, d.noise, torch.zeros(count, dtype=torch.long)
    )


def test_loss_of_the_ideal_denoiser_for_gaussian_data() -> None:
    # Weighted with sigma_data = S, by 1 at any noise level.
    sigma, loss, error = rows(cfg.Denoiser(), 0)
    assert torch.equal(loss, error)
    assert float(loss.mean()) == pytest.approx(1, rel=0.005)
    for part in loss[sigma.argsort()].chunk(4):
        assert float(part.mean()) == pytest.approx(1, rel=0.02)


def test_draws_follow_the_configured_distribution() -> None:
    config = cfg.Denoiser(null_probability=0.25, p_mean=-0.5, p_std=0.9)
    d = draw((8000, 1, 2, 2), config, 3, CPU)
    log_sigma = d.sigma.log()
    assert float(log_sigma.mean()) == pytest.approx(-0.5, abs=0.04) and float(
        log_sigma.std()
    ) == pytest.approx(0.9, rel=0.03)
    assert float(d.dropped.float().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(d.noise.std()) == pytest.approx(1, rel=0.02)
    other = draw((8000, 1, 2, 2), config, 4, CPU)
    assert not torch.equal(other.noise, d.noise)


def test_a_worker_s_draws_are_its_rows_of_the_whole_batch_s() -> None:
    whole = draw((10, 3, 4, 4), cfg.Denoiser(), 3, CPU)
    parts = [
        draw((10, 3, 4, 4), cfg.Denoiser(), 3, CPU, rows) for rows in (slice(0, 3), slice(3, 10))
    ]
    for name in ("sigma", "noise", "dropped", "symmetry"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name)), name


def test_min_snr_weight() -> None:
    sigma = torch.tensor([0.01, 0.4, 0.5, 2.0, 40.0])
    assert min_snr_weight(sigma, 5.0).tolist() == pytest.approx([5, 5, 4, 0.25, 1 / 1600])
    # With gamma = 1 / sigma_data^2 it is the smooth weight with a sharp corner, where it is twice
    # that ...
    c = edm.coefficients(sigma, S)
    smooth = 1 / (sigma**2 + S**2)
    ratio = min_snr_weight(sigma, 1 / S**2) / smooth
    assert bool(((ratio >= 1) & (ratio <= 2 + 1e-5)).all())
    # ... and on the network's own output it never passes EDM's weight of 1.
    assert float((c.out**2 * min_snr_weight(sigma, 1 / S**2)).max()) <= 1


def test_min_snr_loss_of_the_ideal_denoiser() -> None:
    config = cfg.Denoiser(loss="min_snr", min_snr=5.0)
    sigma, loss, error = rows(config, 0)
    expected = torch.minimum(sigma**-2, torch.tensor(5.0)) * S**2 * sigma**2 / (S**2 + sigma**2)
    assert float((loss / expected).mean()) == pytest.approx(1, rel=0.005)
    assert float(error.mean()) == pytest.approx(
        1, rel=0.005
    )  # what is reported does not hang on the weighting


def test_uncertainty_becomes_the_log_of_the_loss_at_each_level() -> None:
    torch.manual_seed(0)
    u = Uncertainty()
    assert float(u(torch.tensor([0.1, 7.0])).detach().abs().max()) == 0
    optimizer = torch.optim.AdamW(u.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    g = torch.Generator().manual_seed(0)

    def expected(sigma: torch.Tensor) -> torch.Tensor:
        return 0.05 + 0.5 / (1 + sigma**2)

    for step in range(600):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 600)
        sigma = (-0.8 + 1.2 * torch.randn(64, generator=g)).exp()
        loss = expected(sigma) * (0.5 + torch.rand(64, generator=g))
        total = (loss / u(sigma).exp() + u(sigma)).mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    at = torch.tensor(levels(cfg.Denoiser()))
    torch.testing.assert_close(u(at).detach(), expected(at).log(), atol=0.15, rtol=0)


def test_uncertainty_in_the_objective() -> None:
    torch.manual_seed(0)
    objective = Objective(Ideal(), cfg.Denoiser(loss="uncertainty"))
    assert objective.uncertainty is not None
    objective.uncertainty.weight.data.fill_(0.3)
    x = S * torch.randn(6, 3, 8, 8)
    d = draw(tuple(x.shape), cfg.Denoiser(), 0, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        loss, error = objective(x, d.sigma, d.noise, torch.zeros(6, dtype=torch.long))
        u = objective.uncertainty(d.sigma)
    assert u.dtype == torch.float32 and not error.requires_grad
    torch.testing.assert_close(loss, error * (-u).exp() + u)


def test_validation_loss_is_the_training_loss_and_depends_on_nothing_else() -> None:
    config = cfg.Denoiser(amp=False)
    x = S * torch.randn(130, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(130, dtype=torch.long)
    found = validation_losses(Ideal(), x, label, config, 0)
    assert found.shape == (LEVELS,) and found == pytest.approx(np.ones(LEVELS), rel=0.05)
    torch.manual_seed(5)
    value = validation_loss(Ideal(), x, label, config, 0)
    assert value == pytest.approx(found.mean(), rel=1e-12)
    assert validation_loss(Ideal(), x, label, config, 1) != value
    first = validation_losses(Ideal(), x[:64], label[:64], config, 0)
    rest = validation_losses(Ideal(), x[64:], label[64:], config, 0)
    assert not np.allclose(first, rest)
    seen: list[torch.Tensor] = []

    def watch(x: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        seen.append(label)
        return x

    validation_loss(watch, x, torch.arange(130) % 7, config, 0)
    assert torch.equal(torch.cat(seen[:3]), torch.arange(130) % 7)


def test_levels_are_equally_probable() -> None:
    config = cfg.Denoiser(p_mean=-0.8, p_std=1.2)
    at = np.log(levels(config))
    draws = draw((40000, 1, 1, 1), config, 0, CPU).sigma.log().numpy()
    shares = [(draws < a).mean() for a in at]
    assert shares == pytest.approx([(i + 0.5) / LEVELS for i in range(LEVELS)], abs=0.01)
    assert math.isclose(at.mean(), -0.8)
