"""How far from real pictures is this one? In features, against the manifold of real ones.

The manifold is that of Kynkaanniemi et al. 2019 (arXiv:1904.06991): around each real picture a ball
that reaches to its k-th nearest. A picture's ratio is the smallest, over real pictures, of its
distance by that ball's radius: at most 1 is within the manifold. The radii above the median are
left out, as their realism score does: a ball around an outlier is large and would let anything in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adversa.curate.search import nearest

NEIGHBOUR = 3  # the k of the paper
BLOCK, NEAR = 1024, 64


class Manifold:
    """Of real features, float [N, D]; groups[i] is the lesion of row i: a ball reaches to other
    lesions only.
    """

    def __init__(
        self, features: np.ndarray, groups: Sequence[str], neighbour: int = NEIGHBOUR
    ) -> None:
        x = np.ascontiguousarray(features, np.float32)
        assert x.ndim == 2 and len(x) == len(groups) and np.isfinite(x).all(), x.shape
        codes = np.unique(np.array(groups, dtype=object), return_inverse=True)[1]
        assert codes.max(initial=0) >= neighbour, f"a manifold needs more than {neighbour} lesions"
        radius = _radii(x, codes, neighbour)
        kept = radius <= np.median(radius)
        self._centres = x[kept]
        self._radius = np.maximum(radius[kept], 1e-6)

    def ratio(self, features: np.ndarray) -> np.ndarray:
        """float64 [M]; NaN where a row is not finite. Read off the 64 nearest balls' centres."""
        x = np.ascontiguousarray(features, np.float32)
        known = np.all(np.isfinite(x), axis=1)
        distance, row = nearest(np.where(known[:, None], x, 0), self._centres, NEAR)
        ratio = (distance / self._radius[row]).min(axis=1)
        return np.where(known, np.round(ratio.astype(np.float64), 5), np.nan)


def thresholds(
    ratios: np.ndarray, labels: np.ndarray, classes: int, quantile: float = 0.98
) -> np.ndarray:
    """Largest ratio allowed in each class, float64 [classes]: the quantile of held-out real
    pictures' ratios [M].

    A class with too few held-out pictures to know its quantile (fewer than 2 / (1 - quantile)) has
    that of all.
    """
    ratios, labels = np.asarray(ratios, np.float64), np.asarray(labels)
    assert len(ratios) and np.isfinite(ratios).all(), "held-out real pictures have finite ratios"
    pooled = float(np.quantile(ratios, quantile))
    least = 2 / max(1 - quantile, 1e-9)
    own = (ratios[labels == k] for k in range(classes))
    return np.array([float(np.quantile(r, quantile)) if len(r) >= least else pooled for r in own])


def _radii(x: np.ndarray, codes: np.ndarray, neighbour: int) -> np.ndarray:
    """Distance [N] of each row to the `neighbour`-th nearest row of another lesion."""
    wanted = neighbour + int(np.bincount(codes).max())
    radius = np.empty(len(x))
    for start in range(0, len(x), BLOCK):
        here = slice(start, start + BLOCK)
        distance, row = nearest(x[here], x, wanted)
        distance[codes[row] == codes[here][:, None]] = np.inf
        radius[here] = np.sort(distance, axis=1)[:, neighbour - 1]
    return radius
