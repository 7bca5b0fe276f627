"""Intervals and comparisons by a bootstrap clustered by lesion: pictures of one lesion are not independent.

A resample draws G of the G groups with replacement, so a group's weight is multinomial (Field and Welsh 2007,
"Bootstrapping clustered data", JRSS B 69). Every metric is computed from weights, all resamples at once: the confusion
matrices are one matrix product, AUROC sorts each class's scores once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adversa.evaluate.metrics import checked, from_confusion, softmax

LEVEL = 95.0
_CELLS = 4_000_000  # entries of a [resamples, images] array worked on at once: 32 MB


@dataclass(frozen=True)
class Comparison:
    """a minus b, its 95% interval, and the two-sided p value of no difference."""

    difference: float
    low: float
    high: float
    p: float


def intervals(
    logits: np.ndarray, labels: np.ndarray, groups: Sequence[str], classes: Sequence[str], resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """logits [N, K], labels [N], groups [N] -> name -> (low, high), 95% percentile, for the names of `metrics`.

    A resample without a single image of a class counts for the metrics that are still defined.
    """
    logits, labels = checked(logits, labels, len(classes))
    index, weights = resample(groups, resamples, seed)
    values = from_confusion(_confusions(logits, labels, index, weights), classes)
    values["auroc_macro"] = _auroc(softmax(logits), labels, index, weights)
    return {name: _percentiles(v) for name, v in values.items() if np.isfinite(v).any()}


def compare(
    logits_a: np.ndarray,
    logits_b: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    resamples: int,
    seed: int,
    metric: str = "balanced_accuracy",
) -> Comparison:
    """logits [S, N, K] of arms a and b, S classifiers each, paired by seed and scored on the same N images.

    The difference is the mean over seeds of a's metric minus b's; every seed and both arms see the same resamples.
    The interval is over lesions, for these S pairs of classifiers: it does not hold the spread between training seeds.
    metric: accuracy, balanced_accuracy or auroc_macro.
    """
    assert logits_a.shape == logits_b.shape and logits_a.ndim == 3, (logits_a.shape, logits_b.shape)
    index, weights = resample(groups, resamples, seed)
    weights = np.concatenate([np.ones((1, weights.shape[1])), weights])  # row 0: the data as they are
    difference = np.zeros(len(weights))
    for a, b in zip(logits_a, logits_b, strict=True):
        difference += _metric(a, labels, index, weights, metric) - _metric(b, labels, index, weights, metric)
    difference /= len(logits_a)
    observed, drawn = float(difference[0]), difference[1:]
    drawn = np.where(np.abs(drawn) < 1e-12, 0.0, drawn)[np.isfinite(drawn)]  # rounding is no difference
    assert len(drawn), "no resample has a value"
    return Comparison(observed if abs(observed) >= 1e-12 else 0.0, *_percentiles(drawn), _p_value(drawn))


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): adjusted p values in the order given, each in [0, 1]."""
    p = np.asarray(pvalues, np.float64)
    assert np.isfinite(p).all() and ((p >= 0) & (p <= 1)).all(), p
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    return adjusted.tolist()


def word(low: float, high: float) -> str:
    """The interval of a difference in one of three words: better, worse, not shown."""
    return "better" if low > 0 else "worse" if high < 0 else "not shown"


def resample(groups: Sequence[str], resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(index [N] of each image's group, weights [R, G]): how often each resample draws each group."""
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    g = len(names)
    weights = np.random.default_rng(seed).multinomial(g, np.full(g, 1 / g), size=resamples)
    return index, weights.astype(np.float64)


def _metric(logits: np.ndarray, labels: np.ndarray, index: np.ndarray, weights: np.ndarray, metric: str) -> np.ndarray:
    logits, labels = checked(logits, labels, logits.shape[1])
    if metric == "auroc_macro":
        return _auroc(softmax(logits), labels, index, weights)
    assert metric in ("accuracy", "balanced_accuracy"), metric
    return from_confusion(_confusions(logits, labels, index, weights), ())[metric]


def _confusions(logits: np.ndarray, labels: np.ndarray, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted confusion matrices [R, K, K]: weights [R, G] times the groups' own counts [G, K * K]."""
    k, g = logits.shape[1], weights.shape[1]
    cell = index * (k * k) + labels * k + logits.argmax(1)
    counts = np.bincount(cell, minlength=g * k * k).reshape(g, k * k)
    return (weights @ counts).reshape(-1, k, k)


def _auroc(probability: np.ndarray, labels: np.ndarray, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Macro AUROC [R] over the classes each resample has both of: images of the class, and others. NaN where none."""
    rows = max(1, _CELLS // len(labels))
    total, classes = np.zeros(len(weights)), np.zeros(len(weights))
    orders = [_order(probability[:, k]) for k in range(probability.shape[1])]
    for start in range(0, len(weights), rows):
        w = weights[start : start + rows][:, index]
        for k, (order, below, upto) in enumerate(orders):
            area = _class_auroc(w[:, order], (labels == k)[order], below, upto)
            total[start : start + rows] += np.nan_to_num(area)
            classes[start : start + rows] += np.isfinite(area)
    with np.errstate(invalid="ignore"):
        return total / classes


def _order(score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ascending order of scores [N]; for each place, how many scores are smaller and how many smaller or equal."""
    order = np.argsort(score, kind="stable")
    ranked = score[order]
    return order, np.searchsorted(ranked, ranked, "left"), np.searchsorted(ranked, ranked, "right")


def _class_auroc(w: np.ndarray, positive: np.ndarray, below: np.ndarray, upto: np.ndarray) -> np.ndarray:
    """AUROC [R] by the Mann-Whitney statistic from weights [R, N] in ascending order of score; ties count one half."""
    negatives = np.zeros((len(w), w.shape[1] + 1))
    np.cumsum(w * ~positive, axis=1, out=negatives[:, 1:])
    w_positive = w[:, positive]
    wins = (w_positive * (negatives[:, below[positive]] + negatives[:, upto[positive]])).sum(1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return wins / (w_positive.sum(1) * negatives[:, -1])


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    tail = (100 - LEVEL) / 2
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


def _p_value(drawn: np.ndarray) -> float:
    """Two-sided percentile p: twice the smaller share of resamples on either side of 0, 1 added to each."""
    n = len(drawn)
    return float(min(1.0, 2 * min((drawn <= 0).sum() + 1, (drawn >= 0).sum() + 1) / (n + 1)))
