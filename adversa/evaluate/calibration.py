"""Whether a classifier is right as often as it says: the bins of a calibration plot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adversa.common.statistics import softmax
from adversa.evaluate.scores import bin_of, checked


@dataclass(frozen=True)
class ReliabilityBin:
    """Images whose largest probability lies in [low, high) (the last bin holds 1 too); the means
    are None where n is 0.
    """

    low: float
    high: float
    n: float
    confidence: float | None
    accuracy: float | None


def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> list[ReliabilityBin]:
    """logits [N, K], labels [N] -> equal-width bins of the top label's probability (Guo et al.
    2017), lowest first.

    ECE is the mean of |accuracy - confidence| over bins, weighted by n.
    """
    logits, labels = checked(logits, labels, np.asarray(logits).shape[1])
    probability = softmax(logits)
    confidence, right = probability.max(1), probability.argmax(1) == labels
    cell = bin_of(confidence, bins)
    edges = np.linspace(0, 1, bins + 1)
    found = []
    for i in range(bins):
        inside = cell == i
        n = int(inside.sum())
        means = (
            (float(confidence[inside].mean()), float(right[inside].mean())) if n else (None, None)
        )
        found.append(ReliabilityBin(float(edges[i]), float(edges[i + 1]), n, *means))
    return found
