"""How good a generative model's images are, from features: distances between two sets of points,
real and fake.

KID: Binkowski et al. 2018, "Demystifying MMD GANs". Precision, recall, density, coverage: Naeem et
al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models". All sums are in float64,
in blocks of bounded size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adversa.types import Json

_CELLS = 4_000_000  # entries of a matrix of pairs worked on at once: 32 MB
# Two distances that are equal come out of matrix products of other shapes with other last bits:
# nearer than this is a tie.
_TIE = 1e-9
MEASURES = ("precision", "recall", "density", "coverage")


def kid(
    features_a: np.ndarray, features_b: np.ndarray, subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """Kernel distance of features [N, D] and [M, D]: (mean, standard deviation) over random subsets
    of `mmd2`.

    A subset is drawn from each set without replacement, of subset_size rows or of as many as the
    smaller set has (at least 2). The mean is an unbiased estimate of the squared distance of the
    two distributions: around 0, and so at times negative, where they are one. The deviation says
    how much a subset varies; subsets share rows, so it is no standard error of the mean.
    """
    a, b = _checked(features_a, features_b)
    size = min(subset_size, len(a), len(b))
    assert size >= 2 and subsets >= 2, (size, subsets)
    rng = np.random.default_rng(seed)
    drawn = [
        mmd2(a[rng.choice(len(a), size, False)], b[rng.choice(len(b), size, False)])
        for _ in range(subsets)
    ]
    return float(np.mean(drawn)), float(np.std(drawn, ddof=1))


def mmd2(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD of a [N, D] and b [M, D] (N, M >= 2) with the kernel k(x, y) = (x . y /
    D + 1)^3.

    Binkowski et al. 2018, equation 4: mean of k over pairs within a, and within b, without a point
    and itself, minus twice the mean of k over pairs of both.
    """
    a, b = _checked(a, b)
    n, m = len(a), len(b)
    total = 0.0
    for x, norm in ((a, n * (n - 1)), (b, m * (m - 1))):
        itself = _kernel(np.einsum("nd,nd->n", x, x), x.shape[1]).sum()
        total += (_kernel_sum(x, x) - itself) / norm
    return float(total - 2 * _kernel_sum(a, b) / (n * m))


def prdc(real: np.ndarray, fake: np.ndarray, neighbours: int) -> dict[str, float]:
    """Precision, recall and coverage in [0, 1] and density >= 0 of fake [M, D] against real [N, D];
    N and M > neighbours.

    With B(x) the open ball around x that ends at its `neighbours`-th nearest other point of its own
    set (Naeem et al. 2020, equations 1 to 4; open, as in the authors' code): precision: share of
    fake points in the B of a real one; recall: share of real points in the B of a fake one;
    density: mean over fake points of the number of real B they lie in, over `neighbours` (1 is
    expected of one distribution); coverage: share of real points whose B holds a fake one.
    """
    real, fake = _checked(real, fake)
    assert 1 <= neighbours < min(len(real), len(fake)), (neighbours, len(real), len(fake))
    origin = real.mean(
        0
    )  # distances do not change, and their digits are not spent on a common offset
    real, fake = real - origin, fake - origin
    real_radius, fake_radius = _radii(real, neighbours), _radii(fake, neighbours)
    in_real = np.zeros(len(fake), np.int64)
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows in _blocks(len(real), len(fake)):
        d = _squared(real[rows], fake)
        inside = _within(d, real_radius[rows, None])
        in_real += inside.sum(0)
        covered[rows] = inside.any(1)
        recalled[rows] = _within(d, fake_radius[None]).any(1)
    return {
        "precision": float((in_real > 0).mean()),
        "recall": float(recalled.mean()),
        "density": float(in_real.mean() / neighbours),
        "coverage": float(covered.mean()),
    }


def prdc_by_class(
    real: np.ndarray,
    real_labels: np.ndarray,
    fake: np.ndarray,
    fake_labels: np.ndarray,
    neighbours: int,
    classes: Sequence[str],
) -> dict[str, Json]:
    """class name -> {"real": N, "fake": M, and the four of `prdc` within the class}; labels [N],
    [M] index `classes`.

    The four are None where a class has `neighbours` points or fewer on one side: the balls are not
    defined there.
    """
    found: dict[str, Json] = {}
    for k, name in enumerate(classes):
        r, f = real[np.asarray(real_labels) == k], fake[np.asarray(fake_labels) == k]
        enough = min(len(r), len(f)) > neighbours
        values: dict[str, float | None] = (
            dict(prdc(r, f, neighbours)) if enough else dict.fromkeys(MEASURES)
        )
        found[name] = {"real": len(r), "fake": len(f), **values}
    return found


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] > 0, (a.shape, b.shape)
    assert np.isfinite(a).all() and np.isfinite(b).all(), "features must be finite"
    return a, b


def _kernel(products: np.ndarray, width: int) -> np.ndarray:
    return (products / width + 1) ** 3


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(_kernel(a[rows] @ b.T, a.shape[1]).sum() for rows in _blocks(len(a), len(b))))


def _blocks(n: int, m: int) -> list[slice]:
    """Rows of an [n, m] matrix, so many at a time that a block has at most _CELLS entries (or one
    row).
    """
    step = max(1, _CELLS // max(1, m))
    return [slice(i, min(n, i + step)) for i in range(0, n, step)]


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances [N, M]; 0 where they are below what the rounding of the products leaves."""
    x, y = np.einsum("nd,nd->n", a, a)[:, None], np.einsum("md,md->m", b, b)[None]
    d = x + y - 2 * (a @ b.T)
    return np.where(d > 1e-12 * (x + y), d, 0)


def _within(squared: np.ndarray, radius: np.ndarray) -> np.ndarray:
    return squared < radius * (1 - _TIE)


def _radii(points: np.ndarray, neighbours: int) -> np.ndarray:
    """Squared distance [N] of each point to its `neighbours`-th nearest other one."""
    found = np.empty(len(points))
    for rows in _blocks(len(points), len(points)):
        d = _squared(points[rows], points)
        d[np.arange(len(d)), np.arange(rows.start, rows.stop)] = (
            np.inf
        )  # a point is no neighbour of itself
        found[rows] = np.partition(d, neighbours - 1, axis=1)[:, neighbours - 1]
    return found
