"""Which images of the mine role are worth painting more of.

Taken are the misclassified and the nearly misclassified, with a budget for each class by its error, and farthest-first
among the hardest of a class, so that one failure mode does not fill the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adversa.config import Mine
from adversa.types import HardCase

MISCLASSIFIED, NEAR_MISS = "misclassified", "near miss"


@dataclass(frozen=True)
class Difficulty:
    """How hard N images are: predicted int64 [N]; float64 [N]: loss and entropy in nats, margin in [-1, 1]."""

    predicted: np.ndarray
    loss: np.ndarray
    margin: np.ndarray
    entropy: np.ndarray


def difficulty(logits: np.ndarray, labels: np.ndarray) -> Difficulty:
    """Loss -ln p[label], margin p[label] - max other p, entropy -sum p ln p, from logits [N, K] of any float type.

    In float64: at a logit lead of 20, 1 - p[label] is 2e-9, which float32 rounds to 0. The other classes' largest p is
    taken by itself, not as 1 - p[label], for the same reason.
    """
    logits, rows = np.asarray(logits, np.float64), np.arange(len(labels))
    assert logits.ndim == 2 and logits.shape[1] >= 2 and len(logits) == len(labels), (logits.shape, len(labels))
    assert np.isfinite(logits).all(), "logits that are not finite reached mining"
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    others = p.copy()
    others[rows, labels] = -1
    return Difficulty(
        predicted=logits.argmax(axis=1),
        loss=-log_p[rows, labels],
        margin=p[rows, labels] - others.max(axis=1),
        entropy=-(p * log_p).sum(axis=1),
    )


def allocate(budget: int, weights: np.ndarray, room: np.ndarray) -> np.ndarray:
    """int64 [K] places adding up to min(budget, sum of room): proportional to weights >= 0, none above its room.

    A class whose share exceeds its room gets its room, and the others share what is left again; rounding is by largest
    remainder, ties to the first class. Classes of weight 0 share, by their room, what no other class can use.
    """
    taken = np.zeros(len(room), np.int64)
    left = int(min(budget, room.sum()))
    while left:
        free = room - taken
        w = np.where(free > 0, weights, 0.0)
        w = w if w.sum() > 0 else free.astype(np.float64)
        quota = left * w / w.sum()
        full = (quota >= free) & (free > 0)
        if full.any():
            taken[full] = room[full]
        else:
            taken += np.floor(quota).astype(np.int64)
            rest = int(min(budget, room.sum()) - taken.sum())
            taken[np.argsort(-(quota % 1), kind="stable")[:rest]] += 1
        left = int(min(budget, room.sum()) - taken.sum())
    return taken


def farthest_first(points: np.ndarray, count: int) -> list[int]:
    """`count` indices of points [N, D]: the first row, then each time the row farthest from all taken (ties: earlier).

    Gonzalez 1985: the covering radius is within a factor 2 of the best.
    """
    taken, distance = [], np.full(len(points), np.inf)
    while len(taken) < min(count, len(points)):
        taken.append(int(distance.argmax()) if taken else 0)
        distance = np.minimum(distance, ((points - points[taken[-1]]) ** 2).sum(axis=1))
        distance[taken] = -1  # below every distance: a twin of a taken row comes last, a taken row never
    return taken


def hard_cases(ids: Sequence[str], labels: np.ndarray, logits: np.ndarray, embeddings: np.ndarray, config: Mine) -> list[HardCase]:
    """The hard cases of N images, best first; the same whatever the order of the rows.

    ids are unique; labels int [N]; logits [N, K]; embeddings [N, D] (D may be 0: then the hardest are taken), compared
    by cosine. A class's share of the budget is its error rate, misclassified / images, because balanced accuracy is one
    minus the mean of these rates: 3 errors among 10 weigh more than 30 among 1,000. The list goes round the classes
    (everyone's first pick, then everyone's second ...), so that any beginning of it is diverse too.
    """
    assert len(set(ids)) == len(ids) == len(labels) == len(embeddings), "ids must be unique, one row each"
    order = np.argsort(np.asarray(ids, dtype=object), kind="stable")
    names, labels = [ids[i] for i in order], np.asarray(labels, np.int64)[order]
    hard = difficulty(np.asarray(logits)[order], labels)
    points = _unit(np.asarray(embeddings, np.float64)[order])

    wrong = hard.predicted != labels
    taken_in = wrong | (hard.margin < config.near_margin)
    classes = np.arange(np.shape(logits)[1])
    images = np.maximum([np.sum(labels == c) for c in classes], 1)
    errors = np.array([np.sum(wrong & (labels == c)) for c in classes])
    room = np.array([np.sum(taken_in & (labels == c)) for c in classes])

    picks: list[tuple[int, float, str, int]] = []
    for c, places in enumerate(allocate(config.budget, errors / images, room)):
        rows = np.flatnonzero(taken_in & (labels == c))
        rows = rows[np.argsort(-hard.loss[rows], kind="stable")][: config.candidates * places]
        chosen = rows[farthest_first(points[rows], places)]
        picks += [(turn, -hard.loss[i], names[i], int(i)) for turn, i in enumerate(chosen)]

    return [
        HardCase(
            example=name,
            label=int(labels[i]),
            predicted=int(hard.predicted[i]),
            loss=float(hard.loss[i]),
            margin=float(hard.margin[i]),
            reason=MISCLASSIFIED if wrong[i] else NEAR_MISS,
            rank=rank,
        )
        for rank, (_, _, name, i) in enumerate(sorted(picks))
    ]


def _unit(points: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros stays one."""
    assert np.isfinite(points).all(), "embeddings that are not finite reached mining"
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
