"""From differences to words: two sources of chance, the smallest effect a study can see,
corrections, other tests beside.

With seeds s = 1 .. K and test lesions drawn at random, the difference of a pair of classifiers is
d_s = effect + B_s + L + E_s: B_s the luck of training pair s, L the luck of the lesions that all
pairs share, E_s what the lesions do to pair s alone. Of the mean over pairs, Var = Var(L) + Var(E)
/ K + Var(B) / K. Resampling lesions with the classifiers as they are gives the covariance of L +
E_s between pairs: its mean off the diagonal is Var(L) (`common`), its mean on the diagonal less
that is Var(E) (`apart`). The variance of d_s between pairs, as observed, is of B_s + E_s
(`between`), since L moves them all alike. So Var(mean) = common + between / K, of which `common` is
known from many lesions and `between` from K - 1 degrees of freedom. The half-width of the interval
is the root of (t_G-1)^2 common + (t_K-1)^2 between / K (Howe 1974, "Approximate confidence limits
on the mean of X + Y", JASA 69: the sum of two such half-widths' squares), and never less than
lesions alone give, t_G-1 times the root of common + apart / K. Two sharper ways were tried and call
no effect an effect too often in studies of three seeds: to add only what `between` has beyond
`apart` (up to 9%), and that with Satterthwaite's quantile (8 to 12%).

scipy is imported where it is used: it takes longer than the rest of what `status` imports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adversa.types import UserError

ALPHA = 0.05
POWER = 0.80
_TINY = 1e-24  # variance: a difference of rounding only


@dataclass(frozen=True)
class Spread:
    """The variances of a mean over K = `seeds` pairs of classifiers on G = `lesions` lesions (see
    above).

    between is None where K = 1: then `common` holds `apart` too, and the luck of training is in no
    figure.
    """

    seeds: int
    lesions: int
    common: float
    apart: float
    between: float | None

    @property
    def of_lesions(self) -> float:
        """Variance of the mean by the choice of lesions, for these very classifiers."""
        return self.common + self.apart / self.seeds

    @property
    def se(self) -> float:
        """Standard error of the mean."""
        return float(
            np.sqrt(max(self.of_lesions, self.common + (self.between or 0.0) / self.seeds))
        )

    def half(self, alpha: float = ALPHA) -> float:
        """Half-width of the 1 - alpha interval."""
        return self._reach(
            _t(alpha / 2, self.lesions - 1), self._seed_quantile(alpha / 2), self.seeds
        )

    def p(self, difference: float) -> float:
        """Two-sided p of no difference: the alpha whose interval ends at 0. No less than a sign
        test over G lesions can give.
        """
        least = min(1.0, 2.0 ** (1 - self.lesions))
        if difference == 0 or self.lesions < 2:
            return 1.0
        if self.se**2 <= _TINY:
            return least
        low, high = 1e-15, 1 - 1e-9
        if self.half(low) <= abs(difference):
            return max(least, low)
        from scipy.optimize import brentq

        if self.half(high) >= abs(difference):
            return 1.0
        root = brentq(
            lambda x: self.half(np.exp(x)) - abs(difference), np.log(low), np.log(high), xtol=1e-9
        )
        return float(max(least, np.exp(root)))

    def detectable(
        self, seeds: int | None = None, alpha: float = ALPHA, power: float = POWER
    ) -> float | None:
        """The effect (>= 0) that a study like this one, with `seeds` pairs, finds with this power.
        None where it cannot be known.

        (t of alpha / 2 + t of 1 - power) standard errors, each source with its own degrees of
        freedom.
        """
        if self.se**2 <= _TINY:
            return (
                None  # the arms answer alike: how much others would differ cannot be told from that
            )
        k = self.seeds if seeds is None else seeds
        if self.lesions < 2 or (k > 1 and self.between is None):
            return None
        quantile = _t(alpha / 2, self.lesions - 1) + _t(1 - power, self.lesions - 1)
        of_seeds = _t(alpha / 2, k - 1) + _t(1 - power, k - 1) if k > 1 else 0.0
        return self._reach(quantile, of_seeds, k)

    def seeds_needed(self, effect: float, most: int = 100) -> int | None:
        """The least number of pairs with which |effect| is detectable on these lesions.

        None where `most` are too few, so also where the lesions alone forbid it, and where one seed
        says nothing about seeds.
        """
        if self.between is None or self.detectable(2) is None:
            return None
        return next(
            (k for k in range(2, most + 1) if (self.detectable(k) or 0.0) <= abs(effect)), None
        )

    def _seed_quantile(self, tail: float) -> float:
        return _t(tail, self.seeds - 1) if self.seeds > 1 else 0.0

    def _reach(self, lesions: float, seeds: float, k: int) -> float:
        alone = lesions**2 * (self.common + self.apart / k)
        both = lesions**2 * self.common + seeds**2 * (self.between or 0.0) / k
        return float(np.sqrt(max(alone, both)))


def _t(tail: float, df: int) -> float:
    """The value that Student's t with df degrees of freedom exceeds with probability `tail`."""
    from scipy.special import stdtrit

    return -float(stdtrit(df, tail))


def spread(observed: np.ndarray, drawn: np.ndarray, lesions: int) -> Spread:
    """observed [S], the values as they are; drawn [S, R], the same in each resample of G lesions,
    finite -> their Spread.
    """
    seeds = len(observed)
    covariance = np.atleast_2d(np.cov(drawn)) if drawn.shape[1] > 1 else np.zeros((seeds, seeds))
    if seeds == 1:
        return Spread(1, lesions, float(covariance[0, 0]), 0.0, None)
    diagonal = float(np.trace(covariance)) / seeds
    shared = (float(covariance.sum()) / seeds - diagonal) / (seeds - 1)
    common = float(np.clip(shared, 0, diagonal))
    return Spread(seeds, lesions, common, diagonal - common, float(np.var(observed, ddof=1)))


def word(low: float, high: float) -> str:
    """The interval of a difference in one of three words: better, worse, not shown."""
    return "better" if low > 0 else "worse" if high < 0 else "not shown"


@dataclass(frozen=True)
class McNemar:
    """Lesions of which a gets more images right than b (`won`), and fewer (`lost`); exact two-sided
    p of won = lost.
    """

    won: int
    lost: int
    p: float


def mcnemar(
    logits_a: np.ndarray, logits_b: np.ndarray, labels: np.ndarray, groups: Sequence[str]
) -> McNemar:
    """McNemar's test of one pair of classifiers, logits [N, K] each: accuracy, not balanced
    accuracy, by the binomial distribution.

    The unit is the lesion, because its images are not independent: one image a lesion makes it
    McNemar 1947, its exact form at any number of discordant pairs. With several seeds give one
    result each: pooled, a lesion would count K times and p be too small.
    """
    from scipy.stats import binomtest

    labels = np.asarray(labels)
    gain = (np.asarray(logits_a).argmax(1) == labels).astype(int) - (
        np.asarray(logits_b).argmax(1) == labels
    )
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    net = np.bincount(index, gain)
    won, lost = int((net > 0).sum()), int((net < 0).sum())
    return McNemar(won, lost, float(binomtest(won, won + lost).pvalue) if won + lost else 1.0)


@dataclass(frozen=True)
class Gain:
    """A difference and its interval per device-hour that it cost."""

    gain: float
    low: float
    high: float
    device_hours: float


def gain_per_hour(difference: float, low: float, high: float, device_seconds: float) -> Gain:
    """device_seconds: what the better arm cost beyond the other, > 0; the cost is taken as known.
    UserError otherwise.
    """
    if not device_seconds > 0:
        raise UserError(f"device_seconds is {device_seconds}; a gain per hour needs a cost above 0")
    hours = device_seconds / 3600
    return Gain(difference / hours, low / hours, high / hours, hours)
