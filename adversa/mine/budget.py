"""How many hard cases each class may bring."""

from __future__ import annotations

import numpy as np

from adversa.common.rounding import largest_remainder


def shares(
    error: np.ndarray,
    room: np.ndarray,
    temperature: float | None = None,
    ratio_cap: float | None = None,
) -> np.ndarray:
    """float64 [K] adding up to 1: each class's share of the budget by its error rate in [0, 1]; 0
    where it has no room.

    temperature None: proportional to the error. Otherwise a softmax of error / temperature: 0.1
    gives a class with 10 points more error e times the share, large is even, small gives all to the
    worst. ratio_cap R >= 1: the largest share is at most R times the smallest among classes with
    room; small ones are raised to that, since lowering the large ones would starve everybody where
    one class makes no error. With no error anywhere and no temperature, all shares are 0
    (`allocate` then goes by room).
    """
    error, here = np.asarray(error, np.float64), np.asarray(room) > 0
    assert temperature is None or temperature > 0, temperature
    assert ratio_cap is None or ratio_cap >= 1, ratio_cap
    if not here.any():
        return np.zeros(len(error))
    raw = error if temperature is None else np.exp((error - error[here].max()) / temperature)
    weights = np.where(here, raw, 0.0)
    if ratio_cap is not None:
        weights = np.where(here, np.maximum(weights, weights.max() / ratio_cap), 0.0)
    return weights / weights.sum() if weights.sum() > 0 else weights


def allocate(budget: int, weights: np.ndarray, room: np.ndarray) -> np.ndarray:
    """int64 [K] places adding up to min(budget, sum of room): proportional to weights >= 0, none
    above its room.

    A class whose share exceeds its room gets its room, and the others share what is left again;
    rounding is by largest remainder, ties to the first class. Classes of weight 0 share, by their
    room, what no other class can use.
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
            taken += largest_remainder(quota, left)
        left = int(min(budget, room.sum()) - taken.sum())
    return taken
