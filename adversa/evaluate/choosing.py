"""Choosing how many images to add: of several ratios the smallest that is as good as the best, and
which classes the images helped.

Everything is of one role that nothing was fitted to (select), from classifiers that differ in
nothing but the ratio. Standard errors are of the choice of lesions, for these very classifiers:
with m_r the mean over seeds of a metric in resample r of the lesions (bootstrap.resample), of R,

    se = sqrt( sum_r (m_r - mean of all m)^2 / (R - 1) ),

over the resamples in which the metric is defined. docs/decisions/0013 says what these rules do not
do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adversa.evaluate.bootstrap import draws
from adversa.evaluate.subgroups import FEW

METRIC = "balanced_accuracy"
HELPED, NOT_HELPED, UNKNOWN = "helped", "not helped", "unknown"
_ROUNDING = 1e-12  # of a mean or a difference


@dataclass(frozen=True)
class Figure:
    """Of the classifiers of one ratio: each seed's value as it is, their mean, and the mean's
    standard error.
    """

    each: tuple[float, ...]
    mean: float
    se: float


@dataclass(frozen=True)
class Choice:
    """chosen: the smallest ratio whose mean is at least `bar`, the best ratio's mean less its
    standard error.
    """

    chosen: float
    best: float
    bar: float
    figures: dict[float, Figure]


@dataclass(frozen=True)
class Help:
    """A class's sensitivity with images minus without, mean over seeds, its standard error by
    paired resamples, and what it must exceed to be told from luck. None where the role has no image
    of the class.

    lesions: of the class in the role. word: of HELPED, NOT_HELPED, UNKNOWN.
    """

    difference: float | None
    se: float | None
    bar: float | None
    lesions: int
    word: str


def choose(
    logits: Mapping[float, np.ndarray],
    labels: np.ndarray,
    groups: Sequence[str],
    classes: Sequence[str],
    resamples: int,
    seed: int,
) -> Choice:
    """The one-standard-error rule (Breiman et al. 1984, "Classification and Regression Trees",
    section 3.4.3) over ratios.

    logits: ratio -> [S, N, K] of its S classifiers, all on the same N images; labels [N], groups
    [N]: lesions; classes: K names. Of equally good ratios the smallest is the best.
    """
    figures = {
        ratio: _figure(draws(x, labels, groups, resamples, seed, classes, only=METRIC)[0][METRIC])
        for ratio, x in sorted(logits.items())
    }
    best = pick(figures)
    bar = figures[best].mean - figures[best].se
    return Choice(
        next(r for r, f in figures.items() if f.mean >= bar - _ROUNDING), best, bar, figures
    )


def pick(figures: Mapping[float, Figure]) -> float:
    """The ratio of the largest mean; the smallest of several."""
    most = max(f.mean for f in figures.values())
    return min(r for r, f in figures.items() if f.mean >= most - _ROUNDING)


def help_by_class(
    with_images: np.ndarray,
    without: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    classes: Sequence[str],
    added: Sequence[int],
    resamples: int,
    seed: int,
) -> dict[str, Help]:
    """class -> whether its images helped it. logits [S, N, K] each, paired by seed; added [K]:
    images that were added.

    Helped: the difference exceeds sqrt(se^2 + 1 / G^2), its standard error with one more of the
    class's G lesions that changes its answer (as Agresti and Min 2005, "Simple improved confidence
    intervals for comparing matched proportions", Statistics in Medicine 24, add one to the pairs
    that differ): by se alone any single lesion that turns right is help, since it is then just
    below 1 / G. Unknown: no images were added, or there are fewer than 5 lesions of the class.
    """
    found = {}
    for k, name in enumerate(classes):
        lesions = len({g for g, label in zip(groups, labels, strict=True) if label == k})
        if not lesions:
            found[name] = Help(None, None, None, 0, UNKNOWN)
            continue
        metric = f"sensitivity/{name}"
        a, b = (
            draws(x, labels, groups, resamples, seed, classes, only=metric)[0][metric]
            for x in (with_images, without)
        )
        f = _figure(a - b)
        bar = float(np.hypot(f.se, 1 / lesions))
        word = HELPED if f.mean > bar else NOT_HELPED
        found[name] = Help(
            f.mean, f.se, bar, lesions, word if added[k] > 0 and lesions >= FEW else UNKNOWN
        )
    return found


def _figure(drawn: np.ndarray) -> Figure:
    """drawn [S, 1 + R] (of bootstrap.draws): the data as they are, then the resamples, NaN where
    one leaves the value undefined.
    """
    means = drawn[:, 1:].mean(0)
    means = means[np.isfinite(means)]
    se = float(means.std(ddof=1)) if len(means) > 1 else 0.0
    return Figure(
        tuple(float(x) for x in drawn[:, 0]),
        float(drawn[:, 0].mean()),
        se if se > _ROUNDING else 0.0,
    )
