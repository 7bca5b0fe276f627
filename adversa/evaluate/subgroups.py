"""Metrics and comparisons within the values of an attribute: age, sex, site, skin type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adversa.common.statistics import holm
from adversa.evaluate.bootstrap import Comparison, Limits, compare, draws, intervals
from adversa.evaluate.inference import word
from adversa.evaluate.operating import Measures
from adversa.types import UserError

SMALL = 30  # fewer lesions are shown, and never tested
# nor are groups with a class of fewer: a difference in one lesion would be the whole of that
# class's sensitivity
FEW = 5
UNKNOWN = "unknown"  # of an image without the attribute

Attributes = Sequence[Mapping[str, str]] | Sequence[str]


@dataclass(frozen=True)
class Subgroup:
    """The images with one value of an attribute. n: images. small: fewer than 30 lesions, so also
    where n < 30.

    metrics: as of `metrics`, the mean over seeds. intervals: empty where small, and where a class
    is there in one lesion alone.
    """

    attribute: str
    value: str
    n: int
    lesions: int
    small: bool
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class SubgroupComparison:
    """Arm a against b within a subgroup. small: fewer than 30 lesions, or fewer than 5 of a class
    that occurs.

    comparison, p_holm (over the subgroups tested) and word are None where it is small or the metric
    has no value.
    """

    attribute: str
    value: str
    n: int
    lesions: int
    small: bool
    comparison: Comparison | None
    p_holm: float | None
    word: str | None


def by_attribute(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    classes: Sequence[str],
    attributes: Attributes,
    attribute: str,
    resamples: int,
    seed: int,
    measures: Measures | None = None,
    thresholds: Limits = None,
    only: str | None = None,
) -> list[Subgroup]:
    """logits [N, K] or [S, N, K]; attributes [N]: each image's value, or its attributes -> a
    Subgroup a value, by name.

    only: that metric alone. Small is counted in lesions: 40 pictures of 12 lesions are 12 pieces of
    evidence. UserError where no image has the attribute.
    """
    logits = np.asarray(logits)
    logits = logits if logits.ndim == 3 else logits[None]
    labels, group = np.asarray(labels), np.asarray(groups)
    found = []
    for value, rows, lesions in _parts(attributes, attribute, group):
        given = logits[:, rows], labels[rows], group[rows]
        point, _ = draws(*given, 0, seed, classes, measures, thresholds, only)
        metrics = {
            name: float(x[:, 0].mean()) for name, x in point.items() if np.isfinite(x[:, 0]).all()
        }
        small = lesions < SMALL
        alone = fewest(labels[rows], group[rows]) < 2
        ranges = (
            {}
            if small or alone
            else intervals(*given, classes, resamples, seed, measures, thresholds, only)
        )
        found.append(Subgroup(attribute, value, len(rows), lesions, small, metrics, ranges))
    return found


def compare_by_attribute(
    logits_a: np.ndarray,
    logits_b: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    attributes: Attributes,
    attribute: str,
    resamples: int,
    seed: int,
    metric: str = "balanced_accuracy",
    classes: Sequence[str] | None = None,
) -> list[SubgroupComparison]:
    """`compare` (logits [S, N, K]) within every subgroup that is not small and where the metric has
    a value, Holm over those.
    """
    labels, group = np.asarray(labels), np.asarray(groups)
    parts = _parts(attributes, attribute, group)
    names = classes or [str(k) for k in range(logits_a.shape[2])]
    small = {
        value: n < SMALL or fewest(labels[rows], group[rows]) < FEW for value, rows, n in parts
    }
    tested = {}
    for value, rows, _ in parts:
        a, b, given = logits_a[:, rows], logits_b[:, rows], (labels[rows], group[rows])
        if (
            not small[value]
            and np.isfinite(draws(a, *given, 0, seed, names, only=metric)[0][metric]).all()
        ):
            tested[value] = compare(a, b, *given, resamples, seed, metric, names)
    adjusted = dict(zip(tested, holm([c.p for c in tested.values()]).tolist(), strict=True))
    found = []
    for value, rows, lesions in parts:
        c, p = tested.get(value), adjusted.get(value)
        said = None if c is None or p is None else word(c.low, c.high) if p < 0.05 else "not shown"
        found.append(
            SubgroupComparison(attribute, value, len(rows), lesions, small[value], c, p, said)
        )
    return found


def fewest(labels: np.ndarray, groups: np.ndarray) -> int:
    """Lesions of the class that has fewest, among those that occur. labels [N] >= 0; groups [N]."""
    return min(len(np.unique(groups[labels == k])) for k in np.unique(labels))


def _parts(
    attributes: Attributes, attribute: str, groups: np.ndarray
) -> list[tuple[str, np.ndarray, int]]:
    """(value, rows, lesions) of each value, by name; an image without one, or with an empty one, is
    `unknown`.
    """
    given = [a.get(attribute, "") if isinstance(a, Mapping) else a for a in attributes]
    assert len(given) == len(groups), (len(given), len(groups))
    if not any(given):
        raise UserError(f"no image has the attribute {attribute!r}; name one that the data have")
    values = np.array([str(v) if v else UNKNOWN for v in given])
    rows = {str(v): np.flatnonzero(values == v) for v in np.unique(values)}
    return [(v, r, len(np.unique(groups[r]))) for v, r in rows.items()]
