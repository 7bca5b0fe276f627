from __future__ import annotations

import pytest
import torch

from adversa import config as cfg
from adversa.training.schedule import evenly_spaced, learning_rate, log_steps, set_rates


@pytest.mark.parametrize(
    "config", [cfg.Denoiser(steps=100, warmup=0.1), cfg.Codec(kind="tiny", steps=100, warmup=0.1)]
)
def test_learning_rate_rises_then_falls(config: cfg.Denoiser | cfg.Codec) -> None:
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert max(rates) == pytest.approx(config.lr) and rates.index(max(rates)) == 10
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.01 * config.lr
    assert rates[55] == pytest.approx(config.lr / 2)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=9.0)
    assert set_rates(optimizer, config, 56) == rates[55] == optimizer.param_groups[0]["lr"]


def test_evaluations_are_even_and_include_the_last_step() -> None:
    assert evenly_spaced(600, 5) == {120, 240, 360, 480, 600}
    assert evenly_spaced(3, 5) == {1, 2, 3} and evenly_spaced(7, 1) == {7}


def test_logs_are_regular_and_include_the_last_step() -> None:
    assert log_steps(120) == {50, 100, 120} and log_steps(100) == {50, 100} and log_steps(7) == {7}
