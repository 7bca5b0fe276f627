"""Whole numbers out of shares."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def largest_remainder(quotas: ArrayLike, total: int) -> np.ndarray:
    """int64 [K] that add up to `total`: quotas >= 0 rounded down, one more where most was cut off.

    Of equal remainders the first. The quotas add up to `total`, but for rounding.
    """
    quotas = np.asarray(quotas, np.float64)
    counts = np.floor(quotas).astype(np.int64)
    left = total - int(counts.sum())
    assert 0 <= left <= len(counts), (quotas, total)
    counts[np.argsort(counts - quotas, kind="stable")[:left]] += 1
    return counts
