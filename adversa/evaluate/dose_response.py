"""How much synthetic data helps: the score against the ratio (synthetic images per real one), its
saturation point.

The curve is  f(x) = base + gain (1 - exp(-(x - low) / scale)),  low the least ratio measured: the
exponential learning curve with an asymptote (EXP3 in the table of forms of Viering and Loog 2022,
"The shape of learning curves: a review", IEEE TPAMI; with a free exponent EXP4, one of the forms of
Domhan, Springenberg and Hutter 2015, IJCAI). Three parameters can be told from three ratios; it
saturates, so it has a saturation point; it starts at ratio 0, where power laws have a pole or need
one parameter more; a negative gain describes harm. The saturation point's place depends on the
scale alone, so its interval is one of the scale.

Noise of seeds: evaluate/replicates.py.

The scale's interval is by the grid bootstrap (Hansen 1999, Review of Economics and Statistics 81):
a scale is in it unless the best curve is better than the best of that scale by more than noise
makes it. Percentiles of refitted scales would not do: a flat or a straight row of scores fits any
scale, or no largest one, and percentiles hide that. Nothing is said outside the ratios.

Saturation point and gain are of the form: seven ratios and three to five seeds seldom tell it from
a hyperbola or a logarithm (2 to 12% of such sweeps are called a misfit), whose 90% point lies
later, inside the saturation point's interval in 37 to 60% only. `measured` assumes no form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from adversa.evaluate import replicates
from adversa.types import UserError

SATURATION_SHARE = 0.9
SCALES = 64  # of the grid; a step is about a tenth of the scale
FEWEST = (
    1 / 3
    # of the least step between ratios: the curve then has 95% of its gain at the next ratio, and a
    # saturation point before it
)
MOST = 3.0  # of the range of ratios: the saturation point then lies within 2% of a straight line's
MISFIT = 0.01
_TINY = 1e-18  # a sum of squares of rounding only


@dataclass(frozen=True)
class Curve:
    """base: score at the ratio `low`; gain: the asymptote less that; scale: in ratios, > 0 (says
    nothing where gain is 0).

    low, high: the range of ratios it was fitted on. rmse: root mean square of the (weighted)
    residuals, in scores.
    """

    base: float
    gain: float
    scale: float
    low: float
    high: float
    rmse: float

    def at(self, x: float | np.ndarray) -> float | np.ndarray:
        """The score at ratio x, of x's shape. UserError outside [low, high]: nothing was measured
        there.
        """
        asked = np.asarray(x, np.float64)
        if not ((asked >= self.low) & (asked <= self.high)).all():
            outside = float(asked[~((asked >= self.low) & (asked <= self.high))].flat[0])
            raise UserError(
                f"ratio {outside:g} lies outside the measured ratios {self.low:g} to "
                f"{self.high:g}; no curve is known there"
            )
        found = self.base + self.gain * _shape(asked - self.low, self.scale)
        return found if found.ndim else float(found)

    @property
    def rise(self) -> float:
        """Score at the largest ratio less that at the least."""
        return self.gain * float(_shape(self.high - self.low, self.scale))

    def saturation_point(self, share: float = SATURATION_SHARE) -> float:
        """The least ratio with `share`, in (0, 1), of the rise over [low, high]; share of that
        range were the curve straight.
        """
        return float(_saturation_point(self.scale, self.low, self.high, share))


@dataclass(frozen=True)
class Response:
    """A sweep in plain numbers, for JSON by dataclasses.asdict; low and high are intervals at
    `level`.

    ratios, scores, seeds: ascending; mean score; most trials at one ratio. grid, middle, low, high:
    the curve and its pointwise band. gain: curve at the largest ratio less that at the least;
    measured: of the mean scores, whatever the curve. kind: "saturates", or why none is told, as
    `reason` says in words (empty for a saturation point): "no gain" (the interval of `gain` holds
    0), "falls", "misfit", "rising" (the saturation point is beyond the data), "unclear" (early or
    beyond the data). saturation point: least ratio with SATURATION_SHARE of the gain.
    saturation_low: of these two also, as a bound; the least ratio where the saturation point may
    lie however early; else None with the others. misfit: share of replicates of the curve that lie
    as far from it as the scores do; None with three ratios: curves go through all.
    """

    curve: Curve
    ratios: tuple[float, ...]
    scores: tuple[float, ...]
    seeds: int
    grid: tuple[float, ...]
    middle: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    gain: float
    gain_low: float
    gain_high: float
    measured: float
    measured_low: float
    measured_high: float
    kind: str
    saturation_point: float | None
    saturation_low: float | None
    saturation_high: float | None
    misfit: float | None
    level: float
    reason: str
    words: str


def fit(ratios: Sequence[float], scores: np.ndarray, weights: np.ndarray | None = None) -> Curve:
    """ratios [D], at least 3, distinct, >= 0; scores [D] or [D, S], NaN where a trial is missing ->
    the least-squares Curve.

    weights [D], > 0: of the ratio means; default the number of trials. The scale lies within its
    limits above: at the upper one the curve is all but straight. UserError for what does not fit.
    """
    x, y, order = replicates.table(ratios, scores)
    w = np.isfinite(y).sum(1).astype(np.float64)
    if weights is not None:
        w = np.asarray(weights, np.float64)
        if w.shape != x.shape or not (np.isfinite(w) & (w > 0)).all():
            raise UserError(
                f"weights {w.tolist()}; give one above 0 for each of the {len(x)} ratios"
            )
        w = w[order]
    return _fit(x, replicates.means(y)[0], w / w.sum())


def response(
    ratios: Sequence[float],
    scores: np.ndarray,
    draws: np.ndarray | None = None,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 1000,
    grid: int | Sequence[float] = 101,
) -> Response:
    """ratios, scores as in `fit`; draws [B, D]: replicates of the mean at each ratio, paired across
    ratios, with the luck of lesions and of seeds in them (default `seed_draws`, seeds alone; rows
    with NaN are left out); grid: ratios inside the data, or how many.

    A saturation point is told where the gain's interval lies above 0, the curve describes the
    scores (MISFIT), and its interval does not hold the straight rise. UserError for what does not
    fit.
    """
    x, y, order = replicates.table(ratios, scores)
    mean, count = replicates.means(y)[0], np.isfinite(y).sum(1)
    weights = count / count.sum()
    curve, scales = _fit(x, mean, weights), _scales(x)
    draws, rng = replicates.in_order(draws, order), np.random.default_rng(seed)
    noise = replicates.noise(draws, y, resamples, rng, level)
    points = np.linspace(x[0], x[-1], grid) if isinstance(grid, int) else np.asarray(grid, float)
    middle, tails = np.asarray(curve.at(points)), [50 * (1 - level), 50 * (1 + level)]
    rises, band = _refits(x, mean + noise, weights, scales, points)
    low, high = np.percentile(band, tails, axis=0)
    gain_low, gain_high = np.percentile(rises, tails).tolist()
    p, far, flat = _compatible(x, weights, scales, mean, noise, curve.rmse**2)
    if flat > 1 - level:  # noise about a flat row finds, among all scales, as good a curve
        gain_low, gain_high = min(gain_low, 0.0), max(gain_high, 0.0)
    saturation_low, saturation_high = _saturation_points(x, scales, p, 1 - level, curve)
    misfit = far if len(x) > 3 else None
    kind = _kind(gain_low, gain_high, misfit, saturation_low, saturation_high, x)
    measured, luck = float(mean[-1] - mean[0]), noise[:, -1] - noise[:, 0]
    least, most = (measured + np.percentile(luck, tails)).tolist()
    return Response(
        curve,
        _plain(x),
        _plain(mean),
        int(count.max()),
        _plain(points),
        _plain(middle),
        _plain(np.minimum(low, middle)),
        _plain(np.maximum(high, middle)),
        curve.rise,
        min(gain_low, curve.rise),
        max(gain_high, curve.rise),
        measured,
        least,
        most,
        kind,
        curve.saturation_point() if kind == "saturates" else None,
        saturation_low if kind in ("saturates", "rising", "unclear") else None,
        saturation_high if kind == "saturates" else None,
        misfit,
        level,
        _REASONS[kind].format(saturation_low),
        _words(curve, (gain_low, gain_high), kind, saturation_low, saturation_high, level),
    )


_REASONS = {
    "saturates": "",
    "no gain": "no saturation point: no gain shown",
    "falls": "no saturation point: the score falls",
    "misfit": "no saturation point told: the scores do not follow a saturating curve, "
    "read them and not the curve",
    "rising": "still rising at the largest ratio: saturation point beyond the data, "
    "not before {:.3g}",
    "unclear": "no saturation point told: it may lie anywhere from ratio {:.3g} to beyond the data",
}


def _kind(
    low: float,
    high: float,
    misfit: float | None,
    saturation_low: float,
    saturation_high: float | None,
    x: np.ndarray,
) -> str:
    """low, high: of the gain. "rising": even the earliest saturation point leaves more than 1 -
    SATURATION_SHARE of the gain to the last step.
    """
    if low <= 0:
        return "falls" if high < 0 else "no gain"
    if misfit is not None and misfit < MISFIT:
        return "misfit"
    return (
        "saturates"
        if saturation_high is not None
        else "rising"
        if saturation_low >= x[-2]
        else "unclear"
    )


def _words(
    curve: Curve, gain: tuple[float, float], kind: str, low: float, high: float | None, level: float
) -> str:
    first = (
        f"{curve.rise:+.3f} at ratio {curve.high:g} ({100 * level:g}%: {gain[0]:+.3f} to "
        f"{gain[1]:+.3f})"
    )
    if kind != "saturates":
        return f"{first}; {_REASONS[kind].format(low)}"
    by = f"{100 * SATURATION_SHARE:g}% of it by ratio {curve.saturation_point():.3g}"
    return f"{first}; {by} ({100 * level:g}%, if the curve is exponential: {low:.3g} to {high:.3g})"


def _plain(x: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in x)


def _shape(x: float | np.ndarray, scale: float | np.ndarray) -> np.ndarray:
    """1 - exp(-x / scale)."""
    return -np.expm1(-np.asarray(x) / scale)


def _saturation_point(
    scale: float | np.ndarray, low: float, high: float, share: float
) -> float | np.ndarray:
    """The x with 1 - exp(-(x - low) / scale) = share (1 - exp(-(high - low) / scale)), increasing
    in the scale.
    """
    return low - scale * np.log1p(-share * _shape(high - low, scale))


def _scales(x: np.ndarray) -> np.ndarray:
    """The grid of scales [K], ascending by one ratio."""
    return np.geomspace(FEWEST * np.diff(x).min(), MOST * (x[-1] - x[0]), SCALES)


def _apart(x: np.ndarray, weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[K, D]: each scale's curve at the ratios less its weighted mean, times the root of the
    weights.

    With u its direction, a scale's least-squares fit to scores m takes (u . root m)^2 off their
    weighted sum of squares.
    """
    curve = _shape(x - x[0], scales[:, None])
    found: np.ndarray = np.sqrt(weights) * (curve - (curve @ weights)[:, None])
    return found


def _solve(x: np.ndarray, mean: np.ndarray, weights: np.ndarray, scale: float) -> Curve:
    """base and gain by linear least squares; weights sum to 1."""
    curve = _shape(x - x[0], scale)
    apart = curve - weights @ curve
    gain = float((weights * apart) @ mean / ((weights * apart) @ apart))
    base = float(weights @ mean - gain * (weights @ curve))
    rmse = float(np.sqrt(weights @ (mean - base - gain * curve) ** 2))
    return Curve(base, gain, float(scale), float(x[0]), float(x[-1]), rmse)


def _fit(x: np.ndarray, mean: np.ndarray, weights: np.ndarray) -> Curve:
    """The best scale of the grid, then the best between its neighbours."""
    scales = _scales(x)
    apart = _apart(x, weights, scales)
    k = int(
        np.argmax((apart @ (np.sqrt(weights) * (mean - weights @ mean))) ** 2 / (apart**2).sum(1))
    )
    ends = np.log(scales[max(k - 1, 0)]), np.log(scales[min(k + 1, SCALES - 1)])
    found = minimize_scalar(
        lambda t: _solve(x, mean, weights, np.exp(t)).rmse,
        bounds=ends,
        method="bounded",
        options={"xatol": 1e-12},
    )
    return min(
        (_solve(x, mean, weights, s) for s in (scales[k], float(np.exp(found.x)))),
        key=lambda c: c.rmse,
    )


def _refits(
    x: np.ndarray, means: np.ndarray, weights: np.ndarray, scales: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """means [B, D] -> (rise over the ratios [B], curve at the points [B, P]) of each replicate's
    best curve on the grid.
    """
    apart = _apart(x, weights, scales)
    size = np.linalg.norm(apart, axis=1)
    along = (means * np.sqrt(weights)) @ apart.T / size
    best = (along**2).argmax(1)
    gain = along[np.arange(len(along)), best] / size[best]
    base = means @ weights - gain * (_shape(x - x[0], scales[:, None]) @ weights)[best]
    rise = gain * _shape(x[-1] - x[0], scales)[best]
    return rise, base[:, None] + gain[:, None] * _shape(points - x[0], scales[:, None])[best]


def _compatible(
    x: np.ndarray,
    weights: np.ndarray,
    scales: np.ndarray,
    mean: np.ndarray,
    noise: np.ndarray,
    least: float,
) -> tuple[np.ndarray, float, float]:
    """scales [K]; mean [D], noise [B, D] -> (p [K], of the best, of none).

    p[k]: of replicates made of scale k's best curve and the noise, the share that prefer another
    scale (in sums of squares) by as much as the scores do. Of the best: of its replicates, the
    share that lie as far from every curve as the scores do, `least`. Of none: the share of the
    noise alone that a curve takes as much off as off the scores (Davies 1987, Biometrika 74: the
    scale is not there to be known where the gain is 0, so the largest over scales is compared).
    """
    basis = _apart(x, weights, scales)
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    signal, noise = (np.sqrt(weights) * (m.T - m @ weights).T for m in (mean, noise))
    along, cross, free = basis @ signal, basis @ basis.T, basis @ noise.T
    best = int(np.argmax(along**2))

    def most(k: int) -> np.ndarray:
        taken = (cross[k] * along[k])[:, None] + free
        found: np.ndarray = np.square(taken, out=taken).max(0)
        return found

    less = along[best] ** 2 - along**2 - _TINY
    p = np.array(
        [np.mean(most(k) - (along[k] + free[k]) ** 2 >= less[k]) for k in range(len(basis))]
    )
    far = along[best] ** 2 + 2 * along[best] * free[best] + (noise**2).sum(1) - most(best)
    flat = np.mean((free**2).max(0) >= along[best] ** 2 - _TINY)
    return p, float(np.mean(far >= least - _TINY)), float(flat)


def _saturation_points(
    x: np.ndarray, scales: np.ndarray, p: np.ndarray, alpha: float, curve: Curve
) -> tuple[float, float | None]:
    """The earliest and the latest saturation point of the scales with p > alpha.

    x[0], None where the set reaches the grid's end: a saturation point before the second ratio,
    however early; a line all but straight.
    """
    inside = np.nonzero(p > alpha)[0]
    first, last = inside[0], inside[-1]
    low, high = float(x[0]), None
    if first > 0:
        low = min(
            curve.saturation_point(),
            float(
                _saturation_point(
                    _between(scales, p, first - 1, first, alpha), x[0], x[-1], SATURATION_SHARE
                )
            ),
        )
    if last < len(p) - 1:
        high = max(
            curve.saturation_point(),
            float(
                _saturation_point(
                    _between(scales, p, last + 1, last, alpha), x[0], x[-1], SATURATION_SHARE
                )
            ),
        )
    return low, high


def _between(scales: np.ndarray, p: np.ndarray, out: int, within: int, alpha: float) -> float:
    """The scale where p is alpha, by log-linear interpolation between two of the grid."""
    share = (alpha - p[out]) / (p[within] - p[out])
    return float(scales[out] * (scales[within] / scales[out]) ** share)
