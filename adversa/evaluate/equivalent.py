"""How many real images one synthetic image is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adversa.evaluate import replicates
from adversa.types import UserError

_ROUNDING = 1e-12  # scores that differ by no more are equal


@dataclass(frozen=True)
class EquivalentImages:
    """Real images that one synthetic image is worth: (equivalent - at_count) / synthetic_count.
    Plain numbers, for JSON.

    equivalent: how many real images alone score `score`. Both None where the score lies outside
    those of the real images: then `side` is "at least" or "at most", and `bound` the value at the
    end of the data. low, high: interval; None: not bounded by the data. above, below: share of
    replicates beyond either end.
    """

    per_image: float | None
    low: float | None
    high: float | None
    equivalent: float | None
    side: str
    bound: float | None
    above: float
    below: float
    score: float
    at_count: float
    synthetic_count: float
    level: float
    words: str


def equivalent_images(
    real_counts: Sequence[float],
    real_scores: np.ndarray,
    at_count: float,
    synthetic_count: float,
    scores: float | np.ndarray,
    draws_real: np.ndarray | None = None,
    draws_score: np.ndarray | None = None,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 1000,
) -> EquivalentImages:
    """How many real images alone score what at_count real and synthetic_count synthetic ones do.
    Real curve: see `real_curve`.

    real_counts [R], at least 2, > 0, distinct; real_scores [R] or [R, S], NaN where a trial is
    missing; scores: the cell's score, or [S] of the same seeds; draws_real [B, R], draws_score [B]:
    replicates of the means, paired (the same lesions in both), with the luck of seeds in them;
    default `seed_draws` of the seeds. A replicate beyond the real images' scores counts as beyond
    the data: where more than (1 - level) / 2 of them do, the interval has no such end. UserError
    for what does not fit.
    """
    n, y, order = replicates.table(real_counts, real_scores, 2, "real count")
    if n[0] <= 0 or not (0 < at_count < np.inf and 0 < synthetic_count < np.inf):
        raise UserError(
            f"{n[0]:g} real images on the curve, {at_count:g} and {synthetic_count:g} "
            "synthetic; each must be above 0"
        )
    cell = np.atleast_1d(np.asarray(scores, np.float64))
    if cell.ndim != 1 or not np.isfinite(cell).any() or np.isinf(cell).any():
        raise UserError(
            f"scores of shape {cell.shape}; give the cell's score, or one for each seed, "
            "NaN where missing"
        )
    paired = len(cell) == y.shape[1]
    draws = _draws(draws_real, draws_score, order)
    if draws is None and not paired:
        raise UserError(f"{len(cell)} scores for {y.shape[1]} seeds; {PAIRED}")
    both = np.vstack([y, cell]) if paired else y
    if paired:
        mean = replicates.means(both)[0]
    else:
        mean = np.append(replicates.means(y)[0], np.nanmean(cell))
    rng = np.random.default_rng(seed)
    drawn = mean + replicates.noise(draws, both, resamples, rng, level)
    logs = np.sort(_equivalent(np.log(n), real_curve(drawn[:, :-1]), drawn[:, -1]))
    found = float(_equivalent(np.log(n), real_curve(mean[None, :-1]), mean[-1:])[0])
    tail = int((1 - level) / 2 * (len(logs) - 1))
    ends = min(logs[tail], found), max(logs[-1 - tail], found)
    counts = float(mean[-1]), float(at_count), float(synthetic_count)
    return _equivalent_images(found, ends, logs, n, *counts, level)


PAIRED = "give the same seeds, or draws_real and draws_score, which are paired"


def _draws(
    real: np.ndarray | None, score: np.ndarray | None, order: np.ndarray
) -> np.ndarray | None:
    """[B, R + 1]: replicates of the real images' means by ascending count, then of the score."""
    if real is None and score is None:
        return None
    if real is None or score is None:
        raise UserError(f"draws of one kind alone; {PAIRED}")
    real, score = np.asarray(real, np.float64), np.asarray(score, np.float64)
    if score.ndim != 1 or real.shape != (len(score), len(order)):
        raise UserError(
            f"draws_real of shape {real.shape}, draws_score {score.shape}; give "
            f"[B, {len(order)}] and [B]"
        )
    return np.hstack([real[:, order], score[:, None]])


def real_curve(means: np.ndarray) -> np.ndarray:
    """means [B, R], by ascending number of real images -> the closest scores that never fall
    (isotonic, equal weights).

    Between measured counts the curve is straight in the logarithm of the count; learning curves
    bend down there, so that in truth a little fewer real images may do. By the min-max formula
    (Robertson, Wright and Dykstra 1988, "Order restricted statistical inference", 1.4): max over i
    <= r of the min over j >= r of the mean of i .. j.
    """
    r = means.shape[1]
    total = np.concatenate([np.zeros((len(means), 1)), means.cumsum(1)], 1)
    first, last = np.arange(r)[:, None], np.arange(r)
    of = np.where(
        first <= last,
        (total[:, None, 1:] - total[:, :-1, None]) / np.maximum(last - first + 1, 1),
        np.inf,
    )
    least = np.minimum.accumulate(of[:, :, ::-1], axis=2)[:, :, ::-1]  # over j >= r
    found: np.ndarray = np.where(first <= last, least, -np.inf).max(1)
    return found


def _equivalent(log_counts: np.ndarray, curves: np.ndarray, score: np.ndarray) -> np.ndarray:
    """log_counts [R], curves [B, R] that never fall, score [B] -> log of the least count that
    reaches it; -inf, inf beyond.
    """
    reached = curves >= score[:, None] - _ROUNDING
    j = np.clip(reached.argmax(1), 1, None)
    row = np.arange(len(curves))
    low, high = curves[row, j - 1], curves[row, j]
    share = np.where(high > low, (score - low) / np.where(high > low, high - low, 1), 0.0)
    inner = log_counts[j - 1] + np.clip(share, 0, 1) * (log_counts[j] - log_counts[j - 1])
    return np.where(
        score < curves[:, 0] - _ROUNDING, -np.inf, np.where(reached.any(1), inner, np.inf)
    )


def _equivalent_images(
    found: float,
    ends: tuple[float, float],
    drawn: np.ndarray,
    n: np.ndarray,
    score: float,
    at: float,
    synthetic: float,
    level: float,
) -> EquivalentImages:
    """found, ends, drawn: logs of equivalent counts, infinite beyond the data."""
    least, most = ((float(v) - at) / synthetic for v in (n[0], n[-1]))
    value, low, high = (
        (float(np.exp(v)) - at) / synthetic if np.isfinite(v) else None for v in (found, *ends)
    )
    low, high = most if ends[0] == np.inf else low, least if ends[1] == -np.inf else high
    side = "" if value is not None else "at least" if found > 0 else "at most"
    bound = {"": None, "at least": most, "at most": least}[side]
    interval = f"{100 * level:g}%: " + (
        "not bounded by these data"
        if low is None and high is None
        else f"at least {low:.3g}"
        if high is None
        else f"at most {high:.3g}"
        if low is None
        else f"{low:.3g} to {high:.3g}"
    )
    where = {"": "", "at least": "beyond the data: ", "at most": "below the data: "}[side]
    words = (
        f"{where}one synthetic image is worth "
        f"{side + ' ' if side else ''}{bound if value is None else value:.3g} real ({interval})"
    )
    return EquivalentImages(
        value,
        low,
        high,
        None if value is None else float(np.exp(found)),
        side,
        bound,
        float(np.mean(drawn == np.inf)),
        float(np.mean(drawn == -np.inf)),
        score,
        at,
        synthetic,
        level,
        words,
    )
