from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from adversa.common.rounding import largest_remainder


def test_seats_by_hand() -> None:
    assert largest_remainder([4.7, 1.6, 1.6, 2.1], 10).tolist() == [5, 2, 1, 2]
    assert largest_remainder([0.5, 1.5, 1.0], 3).tolist() == [1, 1, 1]  # of equals the first
    assert largest_remainder([2.0, 3.0], 5).tolist() == [2, 3]
    assert largest_remainder([], 0).tolist() == []
    with pytest.raises(AssertionError):
        largest_remainder([1.0, 1.0], 5)


def test_none_is_a_whole_one_off_and_all_are_dealt() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        weights, total = rng.integers(1, 50, int(rng.integers(1, 9))), int(rng.integers(0, 200))
        counts = largest_remainder(total * weights / weights.sum(), total)
        exact = [Fraction(int(w) * total, int(weights.sum())) for w in weights]
        assert counts.sum() == total and counts.dtype == np.int64
        assert all(abs(int(c) - e) < 1 for c, e in zip(counts, exact, strict=True))
