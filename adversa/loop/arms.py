"""Arms: what each classifier is trained on. All are matched in optimizer steps, images seen and, per class, synthetic images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from adversa import tables


def shares(weights: Sequence[float], total: int, caps: Sequence[int]) -> list[int]:
    """Integers that add up to min(total, sum(caps)), proportional to the weights (largest remainder), none above its cap."""
    caps_ = np.asarray(caps, dtype=np.int64)
    given = np.zeros(len(caps_), dtype=np.int64)
    left = int(min(total, caps_.sum()))
    weights_ = np.asarray(weights, dtype=np.float64)
    while left > 0:
        open_ = (given < caps_) & (weights_ > 0)
        if not open_.any():
            break
        ideal = np.where(open_, weights_, 0) / weights_[open_].sum() * left
        step = np.minimum(np.floor(ideal).astype(np.int64), caps_ - given)
        if step.sum() == 0:  # only remainders are left: one each, largest first, ties by position
            for i in sorted(np.flatnonzero(open_), key=lambda i: (-ideal[i], i))[:left]:
                step[i] = 1
        given += step
        left -= int(step.sum())
    return given.tolist()


def matched_counts(kept: Mapping[str, Sequence[int]], classes: int, real: int, ratio: float) -> list[int]:
    """Synthetic images per class that every synthetic arm gets: the least any arm has, within ratio x real in all.

    kept: arm -> labels of its accepted images.
    """
    have = [np.bincount(np.asarray(labels, dtype=np.int64), minlength=classes) for labels in kept.values()]
    if not have:
        return [0] * classes
    least = np.min(have, axis=0)
    return shares(least.tolist(), int(ratio * real), least.tolist())


def mix(real: pa.Table, synthetic: Sequence[tuple[str, int]], counts: Sequence[int]) -> pa.Table:
    """Rows of tables.MIX: every real image, and the first counts[c] accepted images of each class in order of their ids.

    real: columns id, label. synthetic: (request id, label). A request id is a hash, so its order is as good as random.
    """
    left = list(counts)
    taken = []
    for request, label in sorted(synthetic):
        if left[label] > 0:
            left[label] -= 1
            taken.append((request, label))
    assert not any(left), f"an arm lacks {left} images of its matched counts"
    ids = real["id"].to_pylist() + [r for r, _ in taken]
    labels = real["label"].to_pylist() + [label for _, label in taken]
    kinds = ["real"] * len(real) + ["synthetic"] * len(taken)
    return pa.table({"id": ids, "kind": kinds, "label": labels, "weight": [1.0] * len(ids)}, schema=tables.MIX)
