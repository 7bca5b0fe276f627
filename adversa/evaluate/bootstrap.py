"""Intervals and comparisons by a bootstrap clustered by lesion: pictures of one lesion are not
independent.

A resample draws G of the G groups with replacement, so a group's weight is multinomial (Field and
Welsh 2007, "Bootstrapping clustered data", JRSS B 69). With several seeds the luck of training is
added (see inference.py). Thresholds set on another role are part of the classifier: intervals hold
them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adversa.evaluate.inference import ALPHA, Spread, spread
from adversa.evaluate.operating import Measures
from adversa.evaluate.scores import checked
from adversa.evaluate.weighted import values
from adversa.types import UserError

LEVEL = 100 * (1 - ALPHA)
_NORMAL = 1.959963984540054  # of the percentiles' own width: half-widths are stretched from it
_ROUNDING = 1e-12  # a difference no larger is none

# The thresholds of one classifier, or of each of S.
Limits = Mapping[str, float] | Sequence[Mapping[str, float]] | None


@dataclass(frozen=True)
class Comparison:
    """a minus b: the mean over pairs, its 95% interval, the two-sided p value of no difference, and
    what could have been seen.

    se: standard error. detectable: the effect found with 80% power at this many lesions and seeds
    (None: cannot be known). each: the difference of every pair. note: what the interval does not
    hold, in words; empty where there is nothing to say.
    """

    difference: float
    low: float
    high: float
    p: float
    se: float
    detectable: float | None
    seeds: int
    lesions: int
    each: tuple[float, ...]
    note: str
    spread: Spread


def intervals(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    classes: Sequence[str],
    resamples: int,
    seed: int,
    measures: Measures | None = None,
    thresholds: Limits = None,
    only: str | None = None,
) -> dict[str, tuple[float, float]]:
    """logits [N, K], or [S, N, K] of S seeds; labels [N], groups [N] -> name -> (low, high), 95%,
    for the names of `metrics`.

    With S seeds it is of the mean over them, with the luck of training in it. The ends are the
    percentiles of the resamples, moved so that their mean is the value (the resamples of
    worst_class and ece lie to one side of it), stretched to the half-width of Spread, cut to the
    metric's range. A resample without a single image of a class counts for the metrics that are
    still defined. Empty where there is one lesion only: nothing is known about others. only: that
    metric alone.
    """
    drawn, lesions = draws(
        logits, labels, groups, resamples, seed, classes, measures, thresholds, only
    )
    found = {name: interval(name, x, lesions, measures) for name, x in drawn.items()}
    return {name: ends for name, ends in found.items() if ends is not None}


def compare(
    logits_a: np.ndarray,
    logits_b: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    resamples: int,
    seed: int,
    metric: str = "balanced_accuracy",
    classes: Sequence[str] | None = None,
    measures: Measures | None = None,
    thresholds_a: Limits = None,
    thresholds_b: Limits = None,
    unit: str = "lesion",
) -> Comparison:
    """logits [S, N, K] of arms a and b, S classifiers each, paired by seed and scored on the same N
    images.

    The difference is the mean over seeds of a's metric minus b's; every seed and both arms see the
    same resamples. metric: any name of `metrics` (UserError otherwise, and where it has no value);
    classes: names, default "0", "1", ..; thresholds: where the metric is at a target specificity.
    The interval holds the choice of lesions and, from two seeds on, the luck of training. unit:
    what a group is called in the note.
    """
    assert logits_a.shape == logits_b.shape and logits_a.ndim == 3, (logits_a.shape, logits_b.shape)
    classes = classes or [str(k) for k in range(logits_a.shape[2])]
    index, weights = resample(groups, resamples, seed)
    lesions = weights.shape[1]
    a, b = (
        _each(logits, labels, index, weights, classes, measures, limits, metric)[metric]
        for logits, limits in ((logits_a, thresholds_a), (logits_b, thresholds_b))
    )
    found = difference(a, b, lesions, unit)
    if found is None:
        raise UserError(
            f"{metric} has no value on these {len(labels)} images; compare another metric, "
            "or add images"
        )
    return found


def difference(
    a: np.ndarray, b: np.ndarray, lesions: int, unit: str = "lesion"
) -> Comparison | None:
    """As `compare`, from what `draws` gave of each arm: a, b [S, 1 + R], of the same resamples.
    None where there is no value.
    """
    each = a - b
    each = np.where(np.abs(each) < _ROUNDING, 0.0, each)
    drawn = each[:, 1:][:, np.isfinite(each[:, 1:]).all(0)]
    if not np.isfinite(each[:, 0]).all() or not drawn.shape[1]:
        return None
    s = spread(each[:, 0], drawn, lesions)
    mean = float(each[:, 0].mean())
    seen = lesions > 1
    half = s.half() if seen else float("inf")
    return Comparison(
        mean,
        mean - half if seen else -1.0,
        mean + half if seen else 1.0,
        s.p(mean),
        s.se,
        s.detectable(),
        len(each),
        lesions,
        tuple(float(x) for x in each[:, 0]),
        _note(s, unit),
        s,
    )


def draws(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    resamples: int,
    seed: int,
    classes: Sequence[str],
    measures: Measures | None = None,
    thresholds: Limits = None,
    only: str | None = None,
) -> tuple[dict[str, np.ndarray], int]:
    """(name -> [S, 1 + R], number of lesions): each seed's value as it is, then in each resample.
    logits as in `intervals`.
    """
    index, weights = resample(groups, resamples, seed)
    return _each(
        logits, labels, index, weights, classes, measures, thresholds, only
    ), weights.shape[1]


def _each(
    logits: np.ndarray,
    labels: np.ndarray,
    index: np.ndarray,
    weights: np.ndarray,
    classes: Sequence[str],
    measures: Measures | None,
    thresholds: Limits,
    only: str | None,
) -> dict[str, np.ndarray]:
    """name -> [S, 1 + R], the data as they are first; the names that every seed has."""
    logits = np.asarray(logits)
    logits = logits if logits.ndim == 3 else logits[None]
    limits = (
        [thresholds] * len(logits)
        if thresholds is None or isinstance(thresholds, Mapping)
        else list(thresholds)
    )
    assert len(limits) == len(logits), (len(limits), len(logits))
    weights = np.concatenate([np.ones((1, weights.shape[1])), weights])
    found = []
    for one, limit in zip(logits, limits, strict=True):
        x, y = checked(one, labels, len(classes))
        found.append(values(x, y, index, weights, classes, measures or Measures(), limit, only))
    return {
        name: np.stack([f[name] for f in found])
        for name in found[0]
        if all(name in f for f in found)
    }


def resample(groups: Sequence[str], resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(index [N] of each image's group, weights [R, G]): how often each resample draws each
    group.
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    g = len(names)
    weights = np.random.default_rng(seed).multinomial(g, np.full(g, 1 / g), size=resamples)
    return index, weights.astype(np.float64)


def interval(
    name: str, x: np.ndarray, lesions: int, measures: Measures | None = None
) -> tuple[float, float] | None:
    """x [S, 1 + R], of `draws` -> (low, high) as in `intervals`; None where the value or every
    resample is undefined, or of one lesion.
    """
    if lesions < 2:
        return None
    drawn = x[:, 1:][:, np.isfinite(x[:, 1:]).all(0)]
    if not np.isfinite(x[:, 0]).all() or not drawn.shape[1]:
        return None
    s, value, mean = spread(x[:, 0], drawn, lesions), float(x[:, 0].mean()), drawn.mean(0)
    half, usual = s.half(), _NORMAL * float(np.sqrt(s.of_lesions))
    tail = (100 - LEVEL) / 2
    ends = np.percentile(mean, [tail, 100 - tail]) - mean.mean()
    ends = ends * (half / usual) if usual > _ROUNDING else np.array([-half, half])
    low, high = np.clip(value + ends, 0, _most(name, measures or Measures()))
    return float(min(low, value)), float(max(high, value))


def _most(name: str, measures: Measures) -> float:
    """The largest value a metric can have."""
    return 2.0 if name == "brier" else 1 - measures.floor if name.startswith("pauc@") else 1.0


def _note(s: Spread, unit: str) -> str:
    if s.lesions < 2:
        return f"one {unit} only: nothing can be said of others"
    if s.se < _ROUNDING:
        return (
            f"both arms answer alike, on every {unit} and with every seed: how much others "
            "would differ cannot be told"
        )
    if s.seeds == 1:
        return f"one seed: the interval holds the choice of {unit}s, not the luck of training"
    if s.seeds == 2:
        return (
            "two seeds say little about the luck of training, so the interval is very wide; "
            "three say far more"
        )
    return ""
