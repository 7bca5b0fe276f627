"""What is measured beside the classes themselves: named groups of classes, and thresholds set on
another role.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from adversa.common.statistics import softmax
from adversa.evaluate.scores import checked
from adversa.types import UserError


@dataclass(frozen=True)
class Measures:
    """groups: name -> the classes in it, each scored one against the rest by the sum of its
    classes' probabilities.

    specificities: targets in (0, 1] at which sensitivity is given. floor: the sensitivity in [0, 1)
    above which partial AUC is taken (0.8: ISIC 2024). bins: equal-width bins of ECE. UserError
    where a value is out of range.
    """

    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    specificities: tuple[float, ...] = (0.80, 0.90, 0.95)
    floor: float = 0.80
    bins: int = 15

    def __post_init__(self) -> None:
        if bad := [s for s in self.specificities if not 0 < s <= 1]:
            raise UserError(f"evaluate.specificities has {bad[0]}; give values above 0, at most 1")
        if not 0 <= self.floor < 1:
            raise UserError(
                f"evaluate.floor is {self.floor}; give a sensitivity of at least 0, below 1"
            )
        assert self.bins >= 1, self.bins


def members(name: str, measures: Measures, classes: Sequence[str]) -> np.ndarray:
    """Indices of a group's classes. UserError where it names none, an unknown one, or all of them
    (nothing is the rest then).
    """
    wanted = list(measures.groups[name])
    if unknown := [c for c in wanted if c not in classes]:
        raise UserError(
            f"evaluate.groups.{name} has {unknown[0]!r}, which is no class; the classes "
            f"are {', '.join(classes)}"
        )
    found = np.array([k for k, c in enumerate(classes) if c in wanted], dtype=int)
    if not 0 < len(found) < len(classes):
        raise UserError(
            f"evaluate.groups.{name} names {len(found)} of {len(classes)} classes; name "
            "some, not all"
        )
    return found


def one_vs_rest(
    probability: np.ndarray, labels: np.ndarray, inside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """probability [N, K], labels [N], class indices -> (score [N] in [0, 1], bool [N] whether the
    label is in the group).
    """
    return probability[:, inside].sum(1), np.isin(labels, inside)


def threshold_at(score: np.ndarray, positive: np.ndarray, specificity: float) -> float | None:
    """The smallest threshold with at least this specificity, where score > threshold means
    positive. None without a negative.

    Specificity is the share of negatives at or below the threshold, a step at each of their scores:
    of n negatives in ascending order it is the ceil(specificity * n)-th. Ties go to the negative
    side, so the specificity reached here is never below the target; it is above it where scores are
    tied or n is no multiple. On another role it is what it is: it is reported beside.
    """
    negatives = np.sort(score[~positive])
    if not len(negatives):
        return None
    # 0.95 * 20 is 19.000000000000004 in some orders of arithmetic: a hair above a whole number is
    # that number.
    return float(negatives[int(np.ceil(specificity * len(negatives) - 1e-9)) - 1])


def level(specificity: float, group: str) -> str:
    """The part of a metric's name after `@`: 0.90/malignant."""
    return (
        f"{specificity:.2f}/{group}"
        if round(specificity, 2) == specificity
        else f"{specificity:g}/{group}"
    )


def thresholds(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], measures: Measures
) -> dict[str, float]:
    """logits [N, K] and labels [N] of the role that may choose (`select`) -> {"0.90/malignant":
    threshold in [0, 1], ...}.

    For `metrics`, `intervals` and `compare` of the same classifier on another role. A group without
    a negative here is left out.
    """
    logits, labels = checked(logits, labels, len(classes))
    found = {}
    for group in measures.groups:
        score, positive = one_vs_rest(softmax(logits), labels, members(group, measures, classes))
        for s in measures.specificities:
            limit = threshold_at(score, positive, s)
            if limit is not None:
                found[level(s, group)] = limit
    return found
