"""Probabilities of logits, and p values corrected for their number."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import special


def softmax(logits: ArrayLike) -> np.ndarray:
    """Probabilities [..., K] of logits [..., K], in float64."""
    x = np.asarray(logits, np.float64)
    return special.softmax(x, axis=-1) if x.size else x


def holm(p: ArrayLike) -> np.ndarray:
    """Step-down corrected p values [N] (Holm 1979) in the order given, each in [0, 1]."""
    p = np.asarray(p, np.float64)
    assert ((p >= 0) & (p <= 1)).all(), p
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return corrected
