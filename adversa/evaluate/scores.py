"""Logits, checked, and the bin each confidence falls in."""

from __future__ import annotations

import numpy as np

from adversa.types import UserError


def checked(
    logits: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N, K] and int64 [N]; UserError where a logit is not finite."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    assert logits.ndim == 2 and logits.shape == (len(labels), num_classes) and len(labels), (
        logits.shape,
        labels.shape,
    )
    labels = labels.astype(np.int64)
    assert labels.min() >= 0 and labels.max() < num_classes, (labels.min(), labels.max())
    bad = int((~np.isfinite(logits)).any(1).sum())
    if bad:
        raise UserError(
            f"logits of {bad} of {len(labels)} images are not finite; lower classifier.lr"
        )
    return logits, labels


def bin_of(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The bin [N] of each confidence in [0, 1]: `bins` of equal width, each with its lower edge,
    the last with 1 as well.
    """
    return np.clip(
        np.searchsorted(np.linspace(0, 1, bins + 1), confidence, "right") - 1, 0, bins - 1
    )
