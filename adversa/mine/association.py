"""Which attributes are over-represented in a subset of a class, more than chance would have it over
all that was tested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import hypergeom
from scipy.stats.contingency import odds_ratio

from adversa.common.statistics import holm

UNKNOWN = frozenset(
    {"", "unknown", "nan", "na", "n/a", "null"}
)  # an image without the attribute; none of these is a finding
MOST_VALUES = 8  # numbers with more distinct values than this are banded
AGE_EDGES = (30.0, 45.0, 60.0, 75.0)


@dataclass(frozen=True)
class Finding:
    """`value` of `attribute` is over-represented among a subset's lesions, compared to all lesions
    of its class.

    Counts are of lesions whose value is known: inside of size in the subset, everywhere of total in
    the class (subset included). lift = (inside / size) / (everywhere / total). odds_ratio, low,
    high: subset against the rest of the class, the conditional estimate and its exact 95% interval
    (not corrected); infinite where the rest has none. p: Fisher's exact test, one-sided; corrected:
    by Holm.
    """

    attribute: str
    value: str
    inside: int
    size: int
    everywhere: int
    total: int
    lift: float
    odds_ratio: float
    low: float
    high: float
    p: float
    corrected: float


@dataclass(frozen=True)
class Count:
    """A 2 x 2 table by its margins, before it is judged: inside of size, everywhere of total, as in
    Finding.
    """

    subset: int
    attribute: str
    value: str
    inside: int
    size: int
    everywhere: int
    total: int


def columns(attributes: Sequence[Mapping[str, str]]) -> dict[str, np.ndarray]:
    """Each attribute's values, object [N] of str; "" where an image has none. Numbers with many
    values become bands.

    Ages have the bands of AGE_EDGES, other numbers the quarters of what there is: bands look at no
    outcome.
    """
    found = {}
    for name in sorted({key for row in attributes for key in row}):
        raw = [str(row.get(name, "")).strip() for row in attributes]
        values = np.array(["" if v.lower() in UNKNOWN else v for v in raw], dtype=object)
        numbers = _numbers(values)
        found[name] = values if numbers is None else _banded(numbers, name)
    return found


def count(
    known: Mapping[str, np.ndarray],
    subsets: Sequence[np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray,
) -> list[Count]:
    """The tables of all subsets and values. subsets: rows of one class each; labels, groups: [N].

    A lesion (group) counts once, since its images are not independent: by its first image in the
    subset where it has one there, else by its first.
    """
    tables = []
    for s, rows in enumerate(subsets):
        inside = np.zeros(len(labels), bool)
        inside[rows] = True
        same = np.flatnonzero(labels == labels[rows[0]])
        same = same[np.argsort(~inside[same], kind="stable")]
        units = same[np.unique(groups[same], return_index=True)[1]]
        for name, values in known.items():
            here = units[values[units] != ""]
            mine = inside[here]
            for value in sorted(set(values[here])):
                has = values[here] == value
                tables.append(
                    Count(
                        s,
                        name,
                        value,
                        int((has & mine).sum()),
                        int(mine.sum()),
                        int(has.sum()),
                        len(here),
                    )
                )
    return tables


def over_represented(
    tables: Sequence[Count], subsets: int, alpha: float = 0.05
) -> tuple[list[tuple[Finding, ...]], int]:
    """(each subset's findings, the surest first; how many tests Holm corrects for). Any false
    finding at all: at most alpha.

    One-sided exact tests by the hypergeometric distribution. Tables that could not come out
    whatever the subset holds (a value of two lesions, say) are left out beforehand by their
    margins, which does not touch the error rate (Tarone 1990); the others are corrected together,
    over all subsets, attributes and values (Holm 1979).
    """
    margins = [[t.inside, t.size, t.everywhere, t.total] for t in tables]
    inside, size, everywhere, total = np.array(margins, np.int64).reshape(-1, 4).T
    least = hypergeom.sf(np.minimum(everywhere, size) - 1, total, everywhere, size)
    tested = np.flatnonzero(attainable(least, alpha))
    p = hypergeom.sf(inside[tested] - 1, total[tested], everywhere[tested], size[tested])
    corrected = holm(np.minimum(p, 1))  # a sum of probabilities, which rounding may take above 1
    found: list[list[Finding]] = [[] for _ in range(subsets)]
    for j in np.flatnonzero(corrected <= alpha):
        table = tables[tested[j]]
        found[table.subset].append(_finding(table, float(p[j]), float(corrected[j])))
    return [tuple(sorted(each, key=lambda f: (f.p, f.attribute, f.value))) for each in found], len(
        tested
    )


def attainable(least: np.ndarray, alpha: float) -> np.ndarray:
    """bool [T]: tables whose least attainable p is at most alpha / k, with the least k that as many
    tables at most pass.
    """
    ordered = np.sort(least)
    k = 1
    while np.searchsorted(ordered, alpha / k, side="right") > k:
        k += 1
    return least <= alpha / k


def _finding(t: Count, p: float, corrected: float) -> Finding:
    b, c = t.size - t.inside, t.everywhere - t.inside
    result = odds_ratio([[t.inside, b], [c, t.total - t.size - c]], kind="conditional")
    interval = result.confidence_interval(0.95)
    lift = (t.inside / t.size) / (t.everywhere / t.total)
    odds = (float(result.statistic), float(interval.low), float(interval.high))
    return Finding(
        t.attribute, t.value, t.inside, t.size, t.everywhere, t.total, lift, *odds, p, corrected
    )


def _numbers(values: np.ndarray) -> np.ndarray | None:
    """float64 [N], NaN where unknown; None if something is no number, or there are few distinct
    ones.
    """
    try:
        numbers = np.array([float(v) if v else math.nan for v in values])
    except ValueError:
        return None
    present = numbers[~np.isnan(numbers)]
    return numbers if np.isfinite(present).all() and len(np.unique(present)) > MOST_VALUES else None


def _banded(numbers: np.ndarray, name: str) -> np.ndarray:
    present = numbers[~np.isnan(numbers)]
    edges = (
        np.array(AGE_EDGES)
        if name.lower().split("_")[0] == "age"
        else np.unique(np.quantile(present, (0.25, 0.5, 0.75)).round(6))
    )
    edges = edges[edges > present.min()]
    if not len(edges):  # most have the least value: that one against the others
        edges = np.array([present[present > present.min()].min()])
    between = [f"{a:g} to below {b:g}" for a, b in zip(edges, edges[1:], strict=False)]
    names = [f"below {edges[0]:g}", *between, f"{edges[-1]:g} or more"]
    bands = np.searchsorted(edges, numbers, side="right")
    return np.array(
        ["" if math.isnan(v) else names[b] for v, b in zip(numbers, bands, strict=True)],
        dtype=object,
    )
