"""Arms: what each classifier is trained on. All are matched in optimizer steps, images seen and,
per class, in what is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from adversa.common.rounding import largest_remainder
from adversa.storage import tables
from adversa.types import GENERATED

Pairs = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Added:
    """What is added to the real images in a round.

    ratio: synthetic images (or repeats) a real one, at most; None: not chosen yet. caps: class
    (label) -> the most images, of the classes that were stopped before the round: none are planned
    for them.
    """

    ratio: float | None = None
    caps: Mapping[int, int] = field(default_factory=dict)


UNCHOSEN = Added()


def shares(weights: Sequence[float], total: int, caps: Sequence[int]) -> list[int]:
    """Integers that add up to min(total, sum(caps)), proportional to the weights, none above its
    cap.

    Rounded down again and again, what is left being shared anew; at last one each, the largest
    weights first.
    """
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
        if step.sum() == 0:  # only remainders are left
            step = largest_remainder(ideal, left)
        given += step
        left -= int(step.sum())
    return given.tolist()


def matched_counts(
    kept: Mapping[str, Sequence[int]],
    classes: int,
    real: int,
    ratio: float,
    most: Mapping[int, int] | None = None,
) -> list[int]:
    """Synthetic images per class that every synthetic arm gets: the least any arm has, within ratio
    x real in all.

    kept: arm -> labels of its accepted images. most: of some classes, no more than so many.
    """
    have = [
        np.bincount(np.asarray(labels, dtype=np.int64), minlength=classes)
        for labels in kept.values()
    ]
    if not have:
        return [0] * classes
    least = _at_most(np.min(have, axis=0), most)
    return shares(least, budget(ratio, real), least)


def budget(ratio: float, real: int) -> int:
    """Images that a ratio asks for; any number of them, and no more than an integer holds."""
    return int(min(ratio * real, 2.0**62))


def repeats(
    mined: Sequence[int],
    classes: int,
    per_case: int,
    real: int,
    ratio: float,
    most: Mapping[int, int] | None = None,
) -> list[int]:
    """What the controls repeat where no arm generates: per_case of each mined image, within ratio x
    real in all. mined: labels.
    """
    wanted = _at_most(
        per_case * np.bincount(np.asarray(mined, dtype=np.int64), minlength=classes), most
    )
    return shares(wanted, budget(ratio, real), wanted)


def _at_most(counts: np.ndarray, most: Mapping[int, int] | None) -> list[int]:
    return [min(n, (most or {}).get(c, n)) for c, n in enumerate(counts.tolist())]


def mix(arm: str, real: Pairs, mined: Pairs, synthetic: Pairs, counts: Sequence[int]) -> pa.Table:
    """Rows of tables.MIX: the weights an arm's images are drawn by. Pairs are (id, label).

    Every arm has the real and the mined images, once. On top of that, counts[c] images of class c
    are, in weight,

    - `real`: none;
    - `resample`: all its real and mined images of the class again, each as often: the classes of
      the other arms, no new image;
    - `replay`: its mined images of the class again;
    - `unguided`, `guided`: its first counts[c] accepted images in order of their ids, which are
      hashes: as good as random.
    """
    base, weights = [*real, *mined], np.ones(len(real) + len(mined))
    labels = np.array([label for _, label in base], dtype=np.int64)
    again = {"resample": np.ones(len(base), bool), "replay": np.arange(len(base)) >= len(real)}.get(
        arm
    )
    if again is not None:
        for c, count in enumerate(counts):
            rows = again & (labels == c)
            assert rows.any() or not count, (
                f"{arm} has no image of class {c} to repeat {count} times"
            )
            weights[rows] += count / max(rows.sum(), 1)
    taken = _first(synthetic, counts) if arm in GENERATED else []
    rows = [*base, *taken]
    kinds = ["real"] * len(real) + ["mined"] * len(mined) + ["synthetic"] * len(taken)
    columns = {"id": [i for i, _ in rows], "kind": kinds, "label": [label for _, label in rows]}
    return pa.table(
        columns | {"weight": [*weights.tolist(), *[1.0] * len(taken)]}, schema=tables.MIX
    )


def _first(synthetic: Pairs, counts: Sequence[int]) -> list[tuple[str, int]]:
    left = list(counts)
    taken = []
    for request, label in sorted(synthetic):
        if left[label] > 0:
            left[label] -= 1
            taken.append((request, label))
    assert not any(left), f"an arm lacks {left} images of its matched counts"
    return taken
