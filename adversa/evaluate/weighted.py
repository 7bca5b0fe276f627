"""Every metric from weights: all resamples at once. A resample gives each group (lesion) a weight,
and so its images.

What is a sum over images is summed within groups once, and the resamples are one matrix product.
Areas under curves sort the scores once. Arrays: logits float64 [N, K], labels int64 [N], index [N]
(each image's group, 0 .. G - 1), weights [R, G] >= 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from adversa.common.statistics import softmax
from adversa.evaluate.operating import Measures, level, members, one_vs_rest
from adversa.evaluate.scores import bin_of
from adversa.types import UserError

_CELLS = 4_000_000  # entries of a [resamples, images] array worked on at once: 32 MB

Values = dict[str, np.ndarray]
Families = list[tuple[list[str], Callable[[], Values]]]  # names of metrics, what computes them


def values(
    logits: np.ndarray,
    labels: np.ndarray,
    index: np.ndarray,
    weights: np.ndarray,
    classes: Sequence[str],
    measures: Measures,
    limits: Mapping[str, float] | None = None,
    only: str | None = None,
) -> Values:
    """name -> [R], NaN where a resample leaves it undefined. limits: of `thresholds`. only: the
    families of that name alone.

    The names and ranges are those of `metrics`. UserError where `only` is no metric.
    """
    probability = softmax(logits)
    by_class = [f"{side}/{c}" for c in classes for side in ("sensitivity", "specificity")]
    given = probability, labels, index, weights
    families: Families = [
        (
            ["accuracy", "balanced_accuracy", "worst_class", *by_class],
            lambda: from_confusion(confusions(logits, labels, index, weights), classes),
        ),
        (["brier"], lambda: {"brier": _brier(*given)}),
        (["ece"], lambda: {"ece": _ece(*given, measures.bins)}),
        (["auroc_macro"], lambda: {"auroc_macro": auroc_macro(*given)}),
    ]
    for group in measures.groups:
        score, positive = one_vs_rest(probability, labels, members(group, measures, classes))
        families += _of_group(score, positive, index, weights, group, measures, limits or {})
    known = [name for names, _ in families for name in names]
    if only is not None and only not in known:
        raise UserError(f"metric {only!r} is not measured here; there are {', '.join(known)}")
    found: Values = {}
    for names, compute in families:
        if only is None or only in names:
            found |= compute()
    return found if only is None else {only: found[only]}


def _of_group(
    score: np.ndarray,
    positive: np.ndarray,
    index: np.ndarray,
    weights: np.ndarray,
    group: str,
    measures: Measures,
    limits: Mapping[str, float],
) -> Families:
    """Areas and operating points of a group of classes against the rest."""
    floor = level(measures.floor, group)
    areas = [f"auroc/{group}", f"pauc@{floor}", f"pauc_norm@{floor}"]
    wanted = (level(s, group) for s in measures.specificities)
    points = {at: limits[at] for at in wanted if at in limits}
    names = [f"{side}@{at}" for at in points for side in ("sensitivity", "specificity")]
    return [
        (areas, lambda: _areas(score, positive, index, weights, areas, measures.floor)),
        (names, lambda: _points(score, positive, index, weights, points)),
    ]


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts [K, K]: row = label, column = predicted (largest logit, of equals the first)."""
    k = logits.shape[1]
    return np.bincount(labels * k + logits.argmax(1), minlength=k * k).reshape(k, k)


def confusions(
    logits: np.ndarray, labels: np.ndarray, index: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Weighted confusion matrices [R, K, K]: weights [R, G] times the groups' own counts [G, K *
    K].
    """
    k = logits.shape[1]
    cell = labels * k + logits.argmax(1)
    found: np.ndarray = weights @ _by_group(cell, None, index, weights.shape[1], k * k)
    return found.reshape(-1, k, k)


def from_confusion(counts: np.ndarray, classes: Sequence[str]) -> Values:
    """counts [R, K, K] (row = label, column = predicted), whole or weighted -> name -> [R]; NaN
    where undefined.
    """
    counts = counts.astype(np.float64)
    right = counts.diagonal(axis1=1, axis2=2)
    of_label, of_predicted, total = counts.sum(2), counts.sum(1), counts.sum((1, 2))
    others = total[:, None] - of_label
    occurs = of_label > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity = right / of_label
        specificity = (others - (of_predicted - right)) / others
        accuracy = right.sum(1) / total
        balanced = np.where(occurs, sensitivity, 0).sum(1) / occurs.sum(1)
    worst = np.where(occurs, sensitivity, np.inf).min(1)
    out = {
        "accuracy": accuracy,
        "balanced_accuracy": balanced,
        "worst_class": np.where(np.isfinite(worst), worst, np.nan),
    }
    for i, name in enumerate(classes):
        out[f"sensitivity/{name}"], out[f"specificity/{name}"] = (
            sensitivity[:, i],
            specificity[:, i],
        )
    return out


def auroc_macro(
    probability: np.ndarray, labels: np.ndarray, index: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Macro AUROC [R] over the classes each resample has both of: images of the class, and others.
    NaN where none.
    """
    curves = [(probability[:, k], labels == k, 0.0) for k in range(probability.shape[1])]
    area = areas(curves, index, weights)
    defined = np.isfinite(area)
    with np.errstate(invalid="ignore"):
        found: np.ndarray = np.where(defined, area, 0).sum(0) / defined.sum(0)
        return found


def areas(
    curves: Sequence[tuple[np.ndarray, np.ndarray, float]], index: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Areas [C, R] under ROC curves, each (score [N], positive bool [N], floor): the part above
    that sensitivity. NaN: undefined.

    floor 0 is AUROC (ties count one half). Else it is the integral of max(sensitivity - floor, 0)
    over 1 - specificity, in [0, 1 - floor], the curve drawn straight through ties: pAUC of the ISIC
    2024 challenge (github.com/ISIC-Research/ Challenge-2024-Metrics), where the labels are turned
    over, so that it is specificity summed over the 1 - floor lowest positives. That sum is what is
    computed.
    """
    rows = max(1, _CELLS // len(index))
    plans = [_part_area(*curve) if curve[2] else _whole_area(*curve[:2]) for curve in curves]
    found = np.empty((len(curves), len(weights)))
    for start in range(0, len(weights), rows):
        w = weights[start : start + rows][:, index]
        for c, area in enumerate(plans):
            found[c, start : start + rows] = area(w)
    return found


def _whole_area(score: np.ndarray, positive: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """AUROC [R] of weights [R, N]: the weight of pairs whose positive has the larger score, and
    half of that of ties.
    """
    pos, neg = np.flatnonzero(positive), np.flatnonzero(~positive)
    neg = neg[np.argsort(score[neg], kind="stable")]
    low, high = (np.searchsorted(score[neg], score[pos], side) for side in ("left", "right"))

    def area(w: np.ndarray) -> np.ndarray:
        below = np.zeros((len(w), len(neg) + 1))
        np.cumsum(w[:, neg], axis=1, out=below[:, 1:])
        p = w[:, pos]
        won = np.einsum("rp,rp->r", p, below[:, low]) + np.einsum("rp,rp->r", p, below[:, high])
        with np.errstate(invalid="ignore", divide="ignore"):
            found: np.ndarray = won / 2 / (p.sum(1) * below[:, -1])
            return found

    return area


def _part_area(
    score: np.ndarray, positive: np.ndarray, floor: float
) -> Callable[[np.ndarray], np.ndarray]:
    order, starts = _ranked(score)
    return lambda w: _area(w[:, order], positive[order], starts, floor)


def _ranked(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending order of scores [N], and where in it each run of equal scores starts."""
    order = np.argsort(score, kind="stable")
    return order, np.flatnonzero(np.diff(score[order], prepend=-np.inf))


def _area(w: np.ndarray, positive: np.ndarray, starts: np.ndarray, floor: float) -> np.ndarray:
    """[R] from weights [R, N] in ascending order of score."""
    p, n = (
        np.add.reduceat(w * positive, starts, axis=1),
        np.add.reduceat(w * ~positive, starts, axis=1),
    )
    below, positives, negatives = np.cumsum(n, 1) - n, p.sum(1), n.sum(1)
    room = (1 - floor) * positives[:, None] - (
        np.cumsum(p, 1) - p
    )  # what of the lowest positives is yet to be counted
    part = np.clip(np.divide(room, p, out=np.zeros_like(p), where=p > 0), 0, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = (part * p * (below + part * n / 2)).sum(1) / (positives * negatives)
        return found


def _areas(
    score: np.ndarray,
    positive: np.ndarray,
    index: np.ndarray,
    weights: np.ndarray,
    names: Sequence[str],
    floor: float,
) -> Values:
    whole, part = areas([(score, positive, 0.0), (score, positive, floor)], index, weights)
    return dict(zip(names, (whole, part, part / (1 - floor)), strict=True))


def _points(
    score: np.ndarray,
    positive: np.ndarray,
    index: np.ndarray,
    weights: np.ndarray,
    limits: Mapping[str, float],
) -> Values:
    """Sensitivity and specificity [R] at each threshold, score > threshold being positive."""
    found: Values = {}
    for at, limit in limits.items():
        cell = positive * 2 + (
            score > limit
        )  # 0 true negative, 1 false positive, 2 false negative, 3 true positive
        tn, fp, fn, tp = (weights @ _by_group(cell, None, index, weights.shape[1], 4)).T
        with np.errstate(invalid="ignore", divide="ignore"):
            found[f"sensitivity@{at}"], found[f"specificity@{at}"] = tp / (tp + fn), tn / (tn + fp)
    return found


def _brier(
    probability: np.ndarray, labels: np.ndarray, index: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Mean over images of the sum over classes of (p - y)^2 (Brier 1950): in [0, 2]."""
    off = ((probability - np.eye(probability.shape[1])[labels]) ** 2).sum(1)
    whole = np.zeros(len(labels), int)
    g = weights.shape[1]
    found: np.ndarray = (weights @ _by_group(whole, off, index, g, 1))[:, 0] / (
        weights @ _by_group(whole, None, index, g, 1)
    )[:, 0]
    return found


def _ece(
    probability: np.ndarray, labels: np.ndarray, index: np.ndarray, weights: np.ndarray, bins: int
) -> np.ndarray:
    """Expected calibration error of the top label (Guo et al. 2017), in [0, 1]."""
    confidence, right = probability.max(1), probability.argmax(1) == labels
    cell = bin_of(confidence, bins)
    gap = weights @ _by_group(cell, confidence - right, index, weights.shape[1], bins)
    total = weights @ np.bincount(index, minlength=weights.shape[1])
    found: np.ndarray = np.abs(gap).sum(1) / total
    return found


def _by_group(
    cell: np.ndarray, amount: np.ndarray | None, index: np.ndarray, groups: int, cells: int
) -> np.ndarray:
    """[G, cells]: the sum of each image's amount (1 where None) in its group's row and its own
    cell.
    """
    return (
        np.bincount(index * cells + cell, amount, minlength=groups * cells)
        .reshape(groups, cells)
        .astype(np.float64)
    )
