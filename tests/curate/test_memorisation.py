from __future__ import annotations

import numpy as np
import pytest

from adversa.curate.memorisation import memorisation


def test_the_same_distribution_is_one_half() -> None:
    rng = np.random.default_rng(0)
    found = memorisation(rng.normal(0, 1, 4000), rng.normal(0, 1, 3000))
    assert found.nearer == pytest.approx(0.5, abs=0.025) and found.beyond == pytest.approx(
        0.01, abs=0.008
    )
    for share, (synthetic, held_out) in found.quantiles.items():
        assert synthetic == pytest.approx(held_out, abs=0.25), share


def test_copies_move_it_and_by_how_much() -> None:
    rng = np.random.default_rng(0)
    held = rng.uniform(0, 0.5, 2000)
    found = memorisation(np.concatenate([rng.uniform(0, 0.5, 1800), np.ones(200)]), held)
    assert found.nearer == pytest.approx(
        0.9 * 0.5 + 0.1, abs=0.02
    ) and found.beyond == pytest.approx(0.109, abs=0.01)
    assert (
        memorisation(np.ones(5), held).nearer == 1 and memorisation(-np.ones(5), held).nearer == 0
    )
    assert memorisation(np.full(5, 0.3), np.full(7, 0.3)).nearer == 0.5  # ties count half


def test_nearer_is_the_share_of_pairs() -> None:
    a, b = np.array([0.1, 0.4, 0.4, 0.9]), np.array([0.4, 0.2, 0.95])
    pairs = [(x > y) + 0.5 * (x == y) for x in a for y in b]
    assert memorisation(a, b).nearer == pytest.approx(np.mean(pairs))


def test_curve_and_missing_numbers() -> None:
    found = memorisation(np.array([0.3, np.nan, 0.1]), np.array([0.5, 0.7, np.inf]))
    assert (found.synthetic, found.held_out) == (2, 2)
    assert found.curve == ((0.0, 0.1, 0.5), (1.0, 0.3, 0.7))
    long = memorisation(np.arange(1000) / 1000, np.arange(500) / 500)
    assert len(long.curve) == 200 and all(
        a <= b for a, b in zip(long.curve, long.curve[1:], strict=False)
    )
    assert (
        memorisation(np.array([]), np.ones(3)) is None
        and memorisation(np.ones(3), np.array([np.nan])) is None
    )
