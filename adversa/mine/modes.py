"""Failure modes: groups of alike hard cases, each with its neighbours and with the attributes that
set it apart in its class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import silhouette_score

from adversa.mine import association
from adversa.mine.association import Finding
from adversa.mine.hard import difficulty, unit


@dataclass(frozen=True)
class ModeSettings:
    """smallest: images a mode should have for its class to be parted at all. most: modes of a
    class. silhouette: what parting a class must reach at least, in [-1, 1]. clustered: images of a
    class that are clustered, the hardest; others join the nearest mode. alpha: probability of any
    false finding at all. neighbours: shown of each mode.
    """

    smallest: int = 3
    most: int = 8
    silhouette: float = 0.1
    clustered: int = 2000
    alpha: float = 0.05
    neighbours: int = 5


@dataclass(frozen=True)
class Neighbour:
    """A correctly classified image and its cosine similarity to a mode's medoid."""

    example: str
    label: int
    similarity: float


@dataclass(frozen=True)
class Mode:
    """Hard images of one class that lie together.

    confused: (other class, images of the mode that are taken for it, or nearly), most first. errors
    of size are misclassified, the others near misses; share = errors / all errors of the role.
    members: hardest first. medoid: the member most like the others.
    """

    id: str
    name: str
    label: int
    confused: tuple[tuple[int, int], ...]
    size: int
    errors: int
    share: float
    members: tuple[str, ...]
    medoid: str
    neighbours: tuple[Neighbour, ...]
    attributes: tuple[Finding, ...]


@dataclass(frozen=True)
class FailureModes:
    """The modes, most errors first; the role's errors and images; what findings are corrected for
    (tests) and held to (alpha).
    """

    modes: tuple[Mode, ...]
    errors: int
    images: int
    tests: int
    alpha: float


@dataclass(frozen=True)
class _Role:
    """The role's images in order of their ids, so that rows in any order give the same modes."""

    names: list[str]
    labels: np.ndarray  # int64 [N]
    loss: np.ndarray  # float64 [N]
    rival: np.ndarray  # int64 [N], the most probable other class
    wrong: np.ndarray  # bool [N]
    hard: np.ndarray  # bool [N]
    points: np.ndarray  # float64 [N, D] of length 1


def failure_modes(
    ids: Sequence[str],
    labels: np.ndarray,
    logits: np.ndarray,
    embeddings: np.ndarray,
    classes: Sequence[str],
    attributes: Sequence[Mapping[str, str]],
    groups: Sequence[str] | None = None,
    near_margin: float = 0.1,
    settings: ModeSettings = ModeSettings(),
) -> FailureModes:
    """The modes of everything misclassified or nearly so among the N images of a role, not only of
    what a budget would take.

    ids are unique; labels int [N]; logits [N, K]; embeddings [N, D] (D may be 0: then a class is
    one mode), compared by cosine; attributes: each image's; groups: each image's lesion (None:
    every image is its own), which counts once in the tests. Clustered is within a class, and a mode
    is compared to the role's other images of that class, right or wrong: otherwise what sets the
    class apart would pass for what sets the mode apart. Attributes take no part in the clustering,
    so that a test of them is fair.
    """
    assert len(set(ids)) == len(ids) == len(labels) == len(embeddings) == len(attributes), (
        "ids must be unique, one row each"
    )
    order = np.argsort(np.asarray(ids, dtype=object), kind="stable")
    role = _role(ids, labels, logits, embeddings, near_margin, order)
    lesions = np.unique(
        np.asarray(ids if groups is None else groups, dtype=object)[order].astype(str),
        return_inverse=True,
    )[1]
    known = association.columns([attributes[i] for i in order])
    subsets = [
        rows
        for c in range(len(classes))
        for rows in _parted(role, np.flatnonzero(role.hard & (role.labels == c)), settings)
    ]
    subsets.sort(key=lambda rows: (-role.wrong[rows].sum(), -len(rows), rows[0]))
    tables = association.count(known, subsets, role.labels, lesions)
    findings, tests = association.over_represented(tables, len(subsets), settings.alpha)
    modes = [
        _mode(role, k, rows, found, classes, settings)
        for k, (rows, found) in enumerate(zip(subsets, findings, strict=True))
    ]
    return FailureModes(tuple(modes), int(role.wrong.sum()), len(role.names), tests, settings.alpha)


def mode_name(label: str, rival: str, errors: int, attributes: Sequence[Finding]) -> str:
    """The class and one or two surest attributes, "melanoma, mode=amelanotic (12 of 14; 5.1 x,
    p=0.003)"; else the error.
    """
    if not attributes:
        return f"{label}, predicted {rival}" if errors else f"{label}, nearly {rival}"
    return f"{label}, " + " and ".join(phrase(f) for f in attributes[:2])


def phrase(f: Finding) -> str:
    """ "attribute=value (lesions of the mode with it of all; times its share of the class, p)", p
    corrected.
    """
    p = "p<0.001" if f.corrected < 0.001 else f"p={f.corrected:.1g}"
    return f"{f.attribute}={f.value} ({f.inside} of {f.size}; {f.lift:.1f} x, {p})"


def cluster(points: np.ndarray, settings: ModeSettings) -> np.ndarray:
    """int [n]: which cluster each of points [n, D] (of length 1) belongs to; all 0 where parting
    them is not worth it.

    Agglomerative (average linkage, cosine) with the count of clusters, 2 to `most`, of the best
    silhouette, and the fewest of equally good ones. No random start; no image is left over as
    noise: every error is in some mode.
    """
    most, none = (
        min(settings.most, len(points) // settings.smallest),
        np.zeros(len(points), np.int64),
    )
    if most < 2 or points.shape[1] == 0:
        return none
    distance = np.clip(1 - points @ points.T, 0, None)
    np.fill_diagonal(distance, 0)
    best, chosen = settings.silhouette, none
    for count in range(2, most + 1):
        found = AgglomerativeClustering(count, metric="precomputed", linkage="average").fit_predict(
            distance
        )
        score = silhouette_score(distance, found, metric="precomputed")
        if score > best + 1e-9:
            best, chosen = score, found
    return chosen


def _role(
    ids: Sequence[str],
    labels: np.ndarray,
    logits: np.ndarray,
    embeddings: np.ndarray,
    near_margin: float,
    order: np.ndarray,
) -> _Role:
    labels, logits = np.asarray(labels, np.int64)[order], np.asarray(logits, np.float64)[order]
    hard = difficulty(logits, labels)
    wrong = hard.predicted != labels
    others = logits.copy()
    others[np.arange(len(labels)), labels] = -np.inf
    points = np.asarray(embeddings, np.float64)[order]
    return _Role(
        [ids[i] for i in order],
        labels,
        hard.loss,
        others.argmax(axis=1),
        wrong,
        wrong | (hard.margin < near_margin),
        unit(points),
    )


def _parted(role: _Role, rows: np.ndarray, settings: ModeSettings) -> list[np.ndarray]:
    """The hard rows of one class as modes: each sorted, together all of them."""
    if not len(rows):
        return []
    first = np.sort(rows[np.argsort(-role.loss[rows], kind="stable")][: settings.clustered])
    found = cluster(role.points[first], settings)
    if len(first) < len(rows):
        centres = np.stack(
            [role.points[first[found == k]].mean(axis=0) for k in range(found.max() + 1)]
        )
        nearest = (role.points[rows] @ unit(centres).T).argmax(axis=1)
        nearest[np.searchsorted(rows, first)] = found
        found = nearest
    return [rows[found == k] for k in np.unique(found)]


def _mode(
    role: _Role,
    k: int,
    rows: np.ndarray,
    found: tuple[Finding, ...],
    classes: Sequence[str],
    settings: ModeSettings,
) -> Mode:
    errors, points = int(role.wrong[rows].sum()), role.points[rows]
    medoid = rows[(points @ points.sum(axis=0)).round(12).argmax()]
    right = np.flatnonzero(~role.wrong & ~role.hard)
    alike = role.points[right] @ role.points[medoid]
    nearest = np.argsort(-alike.round(12), kind="stable")[: settings.neighbours]
    rivals = Counter(role.rival[rows].tolist())
    confused = tuple(sorted(rivals.items(), key=lambda pair: (-pair[1], pair[0])))
    label = int(role.labels[rows[0]])
    return Mode(
        id=f"mode-{k + 1}",
        name=mode_name(classes[label], classes[confused[0][0]], errors, found),
        label=label,
        confused=confused,
        size=len(rows),
        errors=errors,
        share=errors / max(int(role.wrong.sum()), 1),
        members=tuple(role.names[i] for i in rows[np.argsort(-role.loss[rows], kind="stable")]),
        medoid=role.names[medoid],
        neighbours=tuple(
            Neighbour(role.names[right[i]], int(role.labels[right[i]]), float(alike[i]))
            for i in nearest
        ),
        attributes=found,
    )
