"""Whole numbers out of shares."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from adversa.types import Ints


def largest_remainder(quotas: ArrayLike, total: int) -> Ints:
    """int64 [K] that add up to `total`: quotas >= 0 rounded down, one more where most was cut off.

    Of equal remainders the first. The quotas add up to `total`, but for rounding.
    """
    exact = np.asarray(quotas, np.float64)
    counts = np.floor(exact).astype(np.int64)
    left = total - int(counts.sum())
    assert 0 <= left <= len(counts), (exact, total)
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return counts
