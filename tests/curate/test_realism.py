from __future__ import annotations

import numpy as np
import pytest

from adversa.curate.realism import Manifold, thresholds


def cloud(n: int, seed: int, width: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, width, (n, 8)).astype(np.float32)


def test_ratio_is_the_paper_s_by_hand() -> None:
    # On a line, third neighbours: radii 3, 2, 2, 3, 90; median 3: the outlier's ball is left out.
    found = Manifold(np.array([[0.0], [1], [2], [3], [93]]), list("abcde"), 3)
    np.testing.assert_allclose(
        found.ratio(np.array([[1.5], [5.0], [93.0]])), [0.25, 2 / 3, 30.0], rtol=1e-4
    )


def test_a_lesion_s_own_pictures_do_not_make_its_ball_small() -> None:
    x = np.repeat(cloud(100, 0), 3, axis=0) + cloud(300, 1, 1e-3)
    lesions = [f"g{i // 3}" for i in range(300)]
    grouped, alone = Manifold(x, lesions, 2), Manifold(x, [str(i) for i in range(300)], 2)
    fresh = cloud(50, 2)
    assert np.median(grouped.ratio(fresh)) < 3 < 100 < np.median(alone.ratio(fresh))


def test_held_out_pictures_pass_at_the_stated_rate_and_strangers_do_not() -> None:
    found = Manifold(cloud(1000, 0), [str(i) for i in range(1000)])
    held, labels = found.ratio(cloud(1000, 1)), np.arange(1000) % 2
    cut = thresholds(held, labels, 2, 0.98)
    fresh = found.ratio(cloud(2000, 2))
    assert np.mean(fresh > cut[0]) == pytest.approx(0.02, abs=0.012)
    assert np.mean(found.ratio(cloud(200, 3) + 4) > cut.max()) > 0.99
    assert np.isnan(found.ratio(np.full((1, 8), np.nan, np.float32)))[0]


def test_thresholds_are_each_class_s_own_where_it_is_large_enough() -> None:
    ratios = np.concatenate([np.linspace(0, 1, 200), np.linspace(2, 3, 200), np.full(5, 9.0)])
    labels = np.repeat([0, 1, 2], [200, 200, 5])
    cut = thresholds(ratios, labels, 4, 0.9)
    np.testing.assert_allclose(cut[:2], [0.9, 2.9], atol=1e-6)
    assert cut[2] == cut[3] == np.quantile(ratios, 0.9)
    with pytest.raises(AssertionError):
        thresholds(np.array([np.nan]), np.array([0]), 1)


def test_order_makes_no_difference() -> None:
    x, p = cloud(200, 0), np.random.default_rng(0).permutation(200)
    groups = [f"g{i // 2}" for i in range(200)]
    q = cloud(30, 5)
    np.testing.assert_allclose(
        Manifold(x, groups).ratio(q), Manifold(x[p], [groups[i] for i in p]).ratio(q), atol=2e-5
    )


def test_too_few_lesions_say_so() -> None:
    with pytest.raises(AssertionError, match="more than 3 lesions"):
        Manifold(cloud(10, 0), ["a", "b"] * 5)
