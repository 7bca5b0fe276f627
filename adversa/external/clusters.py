"""How many clusters (patients, lesions, images) of an external cohort hold what a metric is made
of: what can be told of it.

A resample of one cluster is that cluster, so its interval says nothing of others; and a class that
one cluster alone has drops out of the resamples that do not draw it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

OVER_ALL = ("accuracy", "brier", "ece")  # of all images alike, whatever their class


@dataclass(frozen=True)
class Clusters:
    """How many clusters there are.

    Attributes:
        total: All.
        classes: Name of a class to the clusters with images of it, and with images of others.
        groups: The same for named groups of classes.
    """

    total: int
    classes: Mapping[str, tuple[int, int]]
    groups: Mapping[str, tuple[int, int]]

    @property
    def few(self) -> list[str]:
        """The classes that are there in one cluster alone."""
        return [name for name, (inside, _) in self.classes.items() if inside == 1]

    def tell(self, metric: str) -> bool:
        """Whether an interval of the metric can be had: two clusters of each thing it is made
        of.
        """
        kind, _, name = metric.partition("/")
        kind, at, _ = kind.partition("@")
        if not name:
            return self.total > 1 and (kind in OVER_ALL or not self.few)
        by_class = kind in ("sensitivity", "specificity") and not at  # else it is of a named group
        inside, outside = (self.classes if by_class else self.groups)[name]
        return (
            min({"sensitivity": (inside,), "specificity": (outside,)}.get(kind, (inside, outside)))
            > 1
        )


def clusters(
    whose: Sequence[str],
    labels: np.ndarray,
    classes: Sequence[str],
    groups: Mapping[str, Sequence[str]],
) -> Clusters:
    """The clusters of a cohort.

    whose [N]: each image's cluster; labels int [N]: its class; groups: named groups of classes.
    """
    of, names = np.asarray(whose), np.asarray(classes)[labels]

    def sides(members: Sequence[str]) -> tuple[int, int]:
        inside = np.isin(names, list(members))
        return len(np.unique(of[inside])), len(np.unique(of[~inside]))

    return Clusters(
        len(np.unique(of)),
        {c: sides([c]) for c in classes},
        {g: sides(members) for g, members in groups.items()},
    )


def counted(n: int, noun: str) -> str:
    """ "1 patient", "2 patients"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"
