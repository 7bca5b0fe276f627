from __future__ import annotations

import numpy as np
import pytest
import torch

from adversa import config as cfg
from adversa.diffuse import average

WIDTH = cfg.Denoiser(ema_width=0.1)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25, 0.28])
def test_exponent_gives_the_width_back(width: float) -> None:
    g = average.power_exponent(width)
    assert ((g + 1) / ((g + 2) ** 2 * (g + 3))) ** 0.5 == pytest.approx(
        width, rel=1e-9
    )  # Karras et al. 2024, equation 123


def test_the_paper_s_own_numbers() -> None:
    # gamma = 6.94 for sigma_rel = 0.10 and 16.97 for 0.05: the two averages that the paper keeps
    # while it trains.
    assert average.power_exponent(0.10) == pytest.approx(6.94, abs=0.005)
    assert average.power_exponent(0.05) == pytest.approx(16.97, abs=0.005)


def test_power_average_is_the_directly_weighted_one() -> None:
    steps, g = 300, average.power_exponent(0.1)
    values = torch.randn(steps, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = [torch.full((5,), 1e6, dtype=torch.float64)]  # what was there before counts for nothing
    for i in range(steps):
        average.update(kept, [values[i]], average.decay(WIDTH, i + 1, scratch=i % 2 == 0))
    ramp = (np.arange(steps + 1) / steps) ** (g + 1)
    torch.testing.assert_close(kept[0], torch.from_numpy(np.diff(ramp)) @ values)


def test_its_weights_have_the_asked_width() -> None:
    steps = 4000
    shares = np.diff((np.arange(steps + 1) / steps) ** (average.power_exponent(0.1) + 1))
    at = np.arange(1, steps + 1)
    mean = (shares * at).sum()
    assert (shares * (at - mean) ** 2).sum() ** 0.5 / steps == pytest.approx(0.1, rel=1e-3)


def test_plain_average_warms_up_from_scratch_only() -> None:
    config = cfg.Denoiser(ema=0.99)
    assert [average.decay(config, t, True) for t in (1, 11, 2000)] == [0.1, 0.55, 0.99]
    assert average.decay(config, 1, False) == 0.99
