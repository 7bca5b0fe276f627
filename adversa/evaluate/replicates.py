"""Scores of trials at several counts or ratios, and replicates of their means that hold the luck of
seeds.

With seeds s = 1 .. S that all ratios share, a score is m_d + a_s + e_ds: the luck of a seed that
moves its whole curve, and the rest. Resampling S = 2 .. 5 seeds gives replicates of rank S - 1 that
are too narrow; `seed_draws` draws instead from normal laws whose variances are pooled over the
ratios and divided by their own chi-square (Student's t). It takes e to vary alike at all ratios.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adversa.types import UserError


def seed_draws(
    scores: np.ndarray, resamples: int, rng: np.random.Generator, lesions: np.ndarray | None = None
) -> np.ndarray:
    """scores [D, S], a column a seed, NaN where missing -> [B, D] replicates of the mean at each
    ratio, holding the luck of seeds.

    lesions [B, D]: replicates of the mean over these very classifiers, by lesions drawn anew, the
    same ones at all ratios; their luck is added (what lesions do to one classifier alone is then
    counted twice: too wide sooner than too narrow). B is `resamples`, or the rows of `lesions`.
    UserError where no ratio has a second seed: nothing is known about seeds then.
    """
    y = np.asarray(scores, np.float64)
    if y.ndim != 2 or np.isinf(y).any() or np.isnan(y).all(1).any():
        raise UserError(
            f"scores of shape {y.shape}; give [ratios, seeds], finite or NaN, with a score "
            "at each ratio"
        )
    mean, root, sd, freedom, effects = means(y)
    if freedom < 1:
        raise UserError(
            f"{int(np.isfinite(y).sum())} trials at {len(y)} ratios say nothing about the "
            "luck of seeds; train a second seed"
        )
    b = resamples if lesions is None else len(lesions)
    noise = (
        rng.normal(size=(b, len(y)))
        @ root.T
        * sd
        * np.sqrt(freedom / rng.chisquare(freedom, b))[:, None]
    )
    if len(effects) > 1:
        apart = max(0.0, float(np.var(effects, ddof=1)) - sd**2 / len(y)) / len(effects)
        noise += np.sqrt(apart) * rng.standard_t(len(effects) - 1, size=(b, 1))
    found: np.ndarray = mean + noise + (0.0 if lesions is None else lesions - np.mean(lesions, 0))
    return found


def table(
    ratios: Sequence[float], scores: np.ndarray, least: int = 3, what: str = "ratio"
) -> tuple[np.ndarray, ...]:
    """(ratios [D] ascending, scores [D, S] in that order, the order [D]); UserError where they are
    not a curve's.
    """
    x, y = np.asarray(ratios, np.float64), np.asarray(scores, np.float64)
    if x.ndim != 1 or len(x) < least:
        raise UserError(f"{what}s of shape {x.shape}; a curve needs a row of at least {least}")
    wrong = x[~(np.isfinite(x) & (x >= 0))]
    if len(wrong):
        raise UserError(f"{what} {wrong[0]:g}; each must be finite and not negative")
    if len(np.unique(x)) < len(x):
        raise UserError(
            f"{what}s {', '.join(f'{v:g}' for v in x)} are not distinct; give the trials "
            f"of one {what} in one row"
        )
    if y.ndim not in (1, 2) or len(y) != len(x):
        raise UserError(
            f"scores of shape {y.shape} for {len(x)} {what}s; give [{len(x)}] or [{len(x)}, seeds]"
        )
    y = y.reshape(len(x), -1)
    if np.isinf(y).any():
        raise UserError("a score is infinite; NaN stands for a missing trial")
    empty = x[np.isnan(y).all(1)]
    if len(empty):
        raise UserError(f"{what} {empty[0]:g} has no score; leave it out")
    order = np.argsort(x)
    return x[order], y[order], order


def means(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, int, np.ndarray]:
    """y [D, S], NaN where missing -> (means m [D], root [D, D] of their covariance in units of
    sd^2, sd of e, its degrees of freedom, seeds' effects a [S], summing to 0; empty where seeds are
    not shared so that all ratios can be compared).

    Least squares of m_d + a_s: with no trial missing m are the plain means; else a ratio is not
    credited with having lucky seeds.
    """
    d, keep = len(y), np.isfinite(y).any(0)
    y = y[:, keep]
    s = y.shape[1]
    row, column = np.nonzero(np.isfinite(y))
    value, effect = y[row, column], np.vstack([np.eye(s - 1), -np.ones(s - 1)])
    design = np.hstack([np.eye(d)[row], effect[column]])
    if s > 1 and np.linalg.matrix_rank(design) < d + s - 1:
        design = design[:, :d]
    inverse = np.linalg.inv(design.T @ design)
    found = inverse @ (design.T @ value)
    freedom = len(value) - design.shape[1]
    sd = float(np.sqrt(((value - design @ found) ** 2).sum() / freedom)) if freedom else 0.0
    return (
        found[:d],
        np.linalg.cholesky(inverse[:d, :d]),
        sd,
        freedom,
        effect @ found[d:] if len(found) > d else np.zeros(0),
    )


def in_order(draws: np.ndarray | None, order: np.ndarray) -> np.ndarray | None:
    """draws [B, D] in the order of ascending ratios."""
    if draws is None:
        return None
    found = np.asarray(draws, np.float64)
    if found.ndim != 2 or found.shape[1] != len(order):
        raise UserError(f"draws of shape {found.shape}; give [replicates, {len(order)}]")
    return found[:, order]


def noise(
    draws: np.ndarray | None, y: np.ndarray, resamples: int, rng: np.random.Generator, level: float
) -> np.ndarray:
    """[B, D], mean 0: the replicates' distances from their mean, which resampling may have
    moved.
    """
    if not 0 < level < 1:
        raise UserError(f"level {level:g}; it lies between 0 and 1, as 0.95")
    found = seed_draws(y, resamples, rng) if draws is None else draws
    found = found[np.isfinite(found).all(1)]
    least = int(np.ceil(2 / (1 - level) - 1e-9))
    if len(found) < least:
        raise UserError(f"{len(found)} replicates; an interval at {level:g} needs at least {least}")
    centred: np.ndarray = found - found.mean(0)
    return centred
