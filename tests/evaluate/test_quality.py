"""KID and PRDC against double sums by hand, closed forms and constructed point sets."""

from __future__ import annotations

import numpy as np
import pytest

from adversa.evaluate import quality
from adversa.evaluate.quality import kid, mmd2, prdc, prdc_by_class


def double_sum(a, b):
    def k(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    def within(s):
        pairs = [k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]
        return sum(pairs) / len(pairs)

    n, m = len(a), len(b)
    return within(a) + within(b) - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


def brute_force(real, fake, k):
    """The definitions of Naeem et al. 2020, one pair at a time."""

    def d(x, y):
        return float(np.sqrt(((x - y) ** 2).sum()))

    def radius(s):
        return [sorted(d(x, y) for j, y in enumerate(s) if j != i)[k - 1] for i, x in enumerate(s)]

    r, f = radius(real), radius(fake)
    inside = np.array([[d(x, y) < r[i] for y in fake] for i, x in enumerate(real)])
    recalled = [any(d(x, y) < f[j] for j, y in enumerate(fake)) for x in real]
    return {
        "precision": inside.any(0).mean(),
        "recall": np.mean(recalled),
        "density": inside.sum() / (k * len(fake)),
        "coverage": inside.any(1).mean(),
    }


def test_mmd_of_two_and_two_points_by_hand():
    # D = 1. k(1, 3) = 4^3 = 64, k(0, 2) = 1; across: k(1, 0) = 1, k(1, 2) = 27, k(3, 0) = 1, k(3,
    # 2) = 343; mean 93.
    a, b = np.array([[1.0], [3.0]]), np.array([[0.0], [2.0]])
    assert mmd2(a, b) == pytest.approx(64 + 1 - 2 * 93, abs=1e-12)


def test_mmd_is_the_double_sum_whatever_the_block(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 5)), rng.normal(1, 2, size=(11, 5))
    expected = double_sum(a, b)
    assert mmd2(a, b) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(quality, "_CELLS", 20)
    assert mmd2(a, b) == pytest.approx(expected, rel=1e-12)


def test_kid_of_the_whole_sets_is_their_mmd():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(9, 3)), rng.normal(size=(9, 3)) + 0.5
    mean, std = kid(a, b, subsets=4, subset_size=100, seed=0)
    assert mean == pytest.approx(mmd2(a, b), rel=1e-12) and std == pytest.approx(0, abs=1e-12)


def test_kid_is_unbiased_for_one_distribution():
    """The mean over many draws is 0 within three standard errors; a single KID is at times
    negative.
    """
    found = []
    for seed in range(300):
        rng = np.random.default_rng([7, seed])
        found.append(
            kid(
                rng.normal(size=(60, 8)),
                rng.normal(size=(60, 8)),
                subsets=5,
                subset_size=30,
                seed=seed,
            )[0]
        )
    found = np.array(found)
    assert abs(found.mean()) < 3 * found.std() / np.sqrt(len(found))
    assert (found < 0).mean() > 0.2


def test_kid_of_two_constants_and_of_two_normals_has_its_closed_form():
    # Points at s and at t (D = 1): k(s, s) + k(t, t) - 2 k(s, t).
    mean, std = kid(np.full((20, 1), 2.0), np.full((30, 1), 1.0), subsets=3, subset_size=10, seed=0)
    assert mean == pytest.approx(125 + 8 - 2 * 27) and std == 0
    # D = 1, x ~ N(0, 1), y ~ N(c, 1): the moments differ by (c, c^2, 3c + c^3), and (xy + 1)^3
    # weighs their squares 3, 3, 1.
    c = 0.5
    expected = 3 * c**2 + 3 * c**4 + (3 * c + c**3) ** 2
    rng = np.random.default_rng(3)
    found = [mmd2(rng.normal(size=(100, 1)), rng.normal(c, 1, size=(100, 1))) for _ in range(150)]
    assert abs(np.mean(found) - expected) < 3 * np.std(found) / np.sqrt(len(found))


def test_kid_depends_on_the_seed_alone():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(50, 4)), rng.normal(size=(80, 4))
    assert kid(a, b, 10, 20, seed=5) == kid(a, b, 10, 20, seed=5) != kid(a, b, 10, 20, seed=6)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("cells", [64, 4_000_000])
def test_prdc_is_what_brute_force_finds(monkeypatch, k, cells):
    monkeypatch.setattr(quality, "_CELLS", cells)
    rng = np.random.default_rng(k)
    real, fake = rng.normal(size=(40, 3)), rng.normal(0.4, 0.7, size=(31, 3))
    assert prdc(real, fake, k) == pytest.approx(brute_force(real, fake, k), rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_identical_sets(offset):
    """Each point lies in its own ball and in those of the points it is among the k - 1 nearest of:
    density is exactly 1.
    """
    real = np.random.default_rng(0).normal(size=(50, 6)) + offset
    shuffled = real[np.random.default_rng(1).permutation(50)]
    assert prdc(real, shuffled, 4) == {
        "precision": 1.0,
        "recall": 1.0,
        "density": 1.0,
        "coverage": 1.0,
    }


def test_disjoint_sets():
    real = np.random.default_rng(0).normal(size=(30, 4))
    assert prdc(real, real + 1000, 3) == {
        "precision": 0.0,
        "recall": 0.0,
        "density": 0.0,
        "coverage": 0.0,
    }


def test_points_on_a_line():
    """Real 0, 1, 2, 3, 10: with k = 1 radii 1, 1, 1, 1, 7. Fake 0.5, 0.6, 3.5, 50: radii 0.1, 0.1,
    2.9, 46.5.
    """
    real, fake = np.array([[0.0], [1], [2], [3], [10]]), np.array([[0.5], [0.6], [3.5], [50.0]])
    # 0.5 and 0.6 lie in the balls of 0 and 1; 3.5 in those of 3 and 10; 50 in none: 6 of 4 points'
    # balls. Recall: 1, 2 and 3 lie in the ball of 3.5; 10 in that of 50; 0 in none. Coverage: all
    # but 2.
    assert prdc(real, fake, 1) == pytest.approx(
        {"precision": 0.75, "recall": 0.8, "density": 6 / 4, "coverage": 0.8}
    )


def test_a_collapsed_model_is_precise_and_covers_little():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(200, 2))
    fake = rng.normal(scale=1e-3, size=(100, 2))
    found = prdc(real, fake, 5)
    assert found["precision"] == 1 and found["recall"] < 0.05 and found["coverage"] < 0.2


def test_copies_of_one_point_are_in_no_open_ball():
    point = np.full((10, 3), 7.0)
    assert prdc(point, point, 2) == {
        "precision": 0.0,
        "recall": 0.0,
        "density": 0.0,
        "coverage": 0.0,
    }


def test_classes_without_enough_images_are_counted_and_left_open():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(40, 3)), rng.normal(size=(35, 3))
    real_labels, fake_labels = np.array([0] * 30 + [1] * 10), np.array([0] * 32 + [1] * 3)
    found = prdc_by_class(real, real_labels, fake, fake_labels, 3, ["a", "b", "c"])
    assert found["a"] == {"real": 30, "fake": 32, **prdc(real[:30], fake[:32], 3)}
    nothing = dict.fromkeys(quality.MEASURES)
    assert found["b"] == {"real": 10, "fake": 3, **nothing} and found["c"] == {
        "real": 0,
        "fake": 0,
        **nothing,
    }


def test_float32_features_of_large_offset_lose_nothing():
    """A common offset costs no digits: the answer is that of the same points in float64 around
    0.
    """
    rng = np.random.default_rng(2)
    real, fake = (rng.integers(-64, 64, size=(60, 4)).astype(np.float32) for _ in range(2))
    assert prdc(real + 1e5, fake + 1e5, 3) == prdc(real, fake, 3)
