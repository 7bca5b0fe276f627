"""Which images of the mine role are worth generating more of.

Taken are the misclassified and the nearly misclassified, with a budget for each class by its error,
and farthest-first among the hardest of a class, so that one failure mode does not fill the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adversa.config import Mine
from adversa.mine import scorers
from adversa.mine.budget import allocate, shares
from adversa.types import HardCase

MISCLASSIFIED, NEAR_MISS = "misclassified", "near miss"


@dataclass(frozen=True)
class Difficulty:
    """How hard N images are: predicted int64 [N]; float64 [N]: loss and entropy in nats, margin in
    [-1, 1].
    """

    predicted: np.ndarray
    loss: np.ndarray
    margin: np.ndarray
    entropy: np.ndarray


def difficulty(logits: np.ndarray, labels: np.ndarray) -> Difficulty:
    """Loss -ln p[label], margin p[label] - max other p, entropy -sum p ln p, from logits [N, K] of
    any float type.

    In float64: at a logit lead of 20, 1 - p[label] is 2e-9, which float32 rounds to 0.
    """
    evidence = scorers.Evidence(np.asarray(labels), np.asarray(logits)[None])
    return Difficulty(
        predicted=np.asarray(logits).argmax(axis=1),
        loss=scorers.loss(evidence),
        margin=-scorers.margin(evidence),
        entropy=scorers.entropy(evidence),
    )


def farthest_first(points: np.ndarray, count: int) -> list[int]:
    """`count` indices of points [N, D]: the first row, then each time the row farthest from all
    taken (ties: earlier).

    Gonzalez 1985: the covering radius is within a factor 2 of the best.
    """
    taken: list[int] = []
    distance = np.full(len(points), np.inf)
    while len(taken) < min(count, len(points)):
        taken.append(int(distance.argmax()) if taken else 0)
        distance = np.minimum(distance, ((points - points[taken[-1]]) ** 2).sum(axis=1))
        distance[
            taken[-1]
        ] = -1  # below every distance: a twin of a taken row comes last, a taken row never
    return taken


def hard_cases(
    ids: Sequence[str],
    labels: np.ndarray,
    logits: np.ndarray,
    embeddings: np.ndarray,
    config: Mine,
    *,
    scorer: str = "loss",
    temperature: float | None = None,
    ratio_cap: float | None = None,
    ensemble: np.ndarray | None = None,
    history: np.ndarray | None = None,
) -> list[HardCase]:
    """The hard cases of N images, best first; the same whatever the order of the rows.

    ids are unique; labels int [N]; logits [N, K] of the target classifier, which says what is
    wrong or nearly wrong; embeddings [N, D] (D may be 0: then the hardest are taken), compared by
    cosine. The list goes round the classes (everyone's first pick, then everyone's second ...), so
    that any beginning of it is diverse too.

    A class's share of the budget is its error rate, misclassified / images, because balanced
    accuracy is one minus the mean of these rates: 3 errors among 10 weigh more than 30 among 1,000.
    temperature, ratio_cap: see `budget.shares`. scorer: a name of `scorers.SCORERS`, by which a
    class's candidates are put in order (ties: by loss, then by id). It sees `ensemble` [M, N, K]
    where that is given, else the one classifier, and `history` bool [T, N]. UserError where it
    lacks them.
    """
    assert len(set(ids)) == len(ids) == len(labels) == len(embeddings), (
        "ids must be unique, one row each"
    )
    order = np.argsort(np.asarray(ids, dtype=object), kind="stable")
    names, labels = [ids[i] for i in order], np.asarray(labels, np.int64)[order]
    hard = difficulty(np.asarray(logits)[order], labels)
    members = np.asarray(logits)[None] if ensemble is None else np.asarray(ensemble)
    past = None if history is None else np.asarray(history, bool)[:, order]
    score = scorers.scores(scorer, scorers.Evidence(labels, members[:, order], past))
    points = unit(np.asarray(embeddings, np.float64)[order])

    wrong = hard.predicted != labels
    taken_in = wrong | (hard.margin < config.near_margin)
    classes = np.arange(np.shape(logits)[1])
    images = np.maximum([np.sum(labels == c) for c in classes], 1)
    errors = np.array([np.sum(wrong & (labels == c)) for c in classes])
    room = np.array([np.sum(taken_in & (labels == c)) for c in classes])

    places = allocate(config.budget, shares(errors / images, room, temperature, ratio_cap), room)
    picks: list[tuple[int, float, float, str, int]] = []
    for c, count in enumerate(places):
        rows = np.flatnonzero(taken_in & (labels == c))
        rows = rows[np.lexsort((-hard.loss[rows], -score[rows]))][: config.candidates * count]
        chosen = rows[farthest_first(points[rows], count)].tolist()
        picks += [(turn, -score[i], -hard.loss[i], names[i], i) for turn, i in enumerate(chosen)]
    return [
        _case(names[i], int(labels[i]), hard, i, rank) for rank, (*_, i) in enumerate(sorted(picks))
    ]


def _case(name: str, label: int, hard: Difficulty, row: int, rank: int) -> HardCase:
    predicted = int(hard.predicted[row])
    return HardCase(
        example=name,
        label=label,
        predicted=predicted,
        loss=float(hard.loss[row]),
        margin=float(hard.margin[row]),
        reason=NEAR_MISS if predicted == label else MISCLASSIFIED,
        rank=rank,
    )


def unit(points: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros stays one."""
    assert np.isfinite(points).all(), "embeddings that are not finite reached mining"
    length = np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    scaled: np.ndarray = points / length
    return scaled
