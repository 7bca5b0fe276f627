"""Does the denoiser repeat its training images? How near synthetic pictures lie to them, against
held-out real ones.

A denoiser that learnt the distribution paints pictures that are as near to the training images as
other real pictures are (the reasoning of the data-copying test of Meehan et al. 2020,
arXiv:2004.05675).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
POINTS = 200


@dataclass(frozen=True)
class Memorisation:
    """Similarities to the nearest real image: of synthetic pictures, and of held-out real ones (of
    another lesion).

    curve: at most 200 points (share, similarity of synthetic, similarity of held-out real): each
    sample sorted, at equal shares. quantiles: {share: (synthetic, held-out)}. nearer: the
    probability that a synthetic picture is nearer to its nearest real image than a held-out real
    one to its own (ties count half): 0.5 where the denoiser copies no more than real pictures
    resemble each other, 1 where it only copies. beyond: the share of synthetic pictures more
    similar than 99% of held-out ones; 0.01 is expected.
    """

    synthetic: int
    held_out: int
    curve: tuple[tuple[float, float, float], ...]
    quantiles: dict[float, tuple[float, float]]
    nearer: float
    beyond: float


def memorisation(synthetic: np.ndarray, held_out: np.ndarray) -> Memorisation | None:
    """Of similarities [M] and [N] (larger is nearer), as `NearCopy.nearest` gives them; None where
    either is empty.

    The order of either makes no difference. Pictures without a finite similarity are left out (and
    not counted).
    """
    s, h = (np.sort(np.asarray(x, np.float64)[np.isfinite(x)]) for x in (synthetic, held_out))
    if not len(s) or not len(h):
        return None
    shares = np.linspace(0, 1, min(POINTS, max(len(s), len(h), 2)))
    below = np.searchsorted(h, s, "left") + np.searchsorted(h, s, "right")
    return Memorisation(
        synthetic=len(s),
        held_out=len(h),
        curve=tuple(
            zip(
                shares.tolist(),
                np.quantile(s, shares).tolist(),
                np.quantile(h, shares).tolist(),
                strict=True,
            )
        ),
        quantiles={q: (float(np.quantile(s, q)), float(np.quantile(h, q))) for q in QUANTILES},
        nearer=float(below.mean() / (2 * len(h))),
        beyond=float(np.mean(s > np.quantile(h, 0.99))),
    )
