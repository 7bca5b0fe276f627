"""The numbers by which pictures are compared: DCT coefficients of a window, and how much copies and
pictures of other lesions differ in them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.fft import dct

from adversa.common.symmetry import COUNT as TURNS
from adversa.common.symmetry import symmetry

SIDE, WINDOW = (
    32,
    26,
)  # pixels of a miniature's side and of the window compared: it may move by 3 pixels each way
GREY, TINT = (
    14,
    7,
)  # lowest frequencies a side that are read of brightness and of the two colour differences
# Rows: brightness, red - blue, green - magenta; orthonormal, so that noise is alike in all three.
COLOURS = (np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])).astype(
    np.float32
)
# A picture whose coefficients are smaller than this, RMS, in grey levels a pixel, is flat.
FLAT = 0.25
# Residues are read as noise of the measured spectrum times one of these: from a copy to the bit to
# a coarse alignment.
LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Contrast that a copy may have, of its original.
LEAST_GAIN, LARGEST_GAIN = 0.6, 1.6


@lru_cache(maxsize=16)
def area_average(size: int) -> np.ndarray:
    """float32 [32, size]: row i averages the pixels under the i-th part of a side, by the share
    under it.
    """
    edges = np.linspace(0, size, SIDE + 1)
    pixel = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    found: np.ndarray = (np.clip(overlap, 0, None) * SIDE / size).astype(np.float32)
    return found


def miniatures(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] of any H and W to uint8 [N, 32, 32, 3]."""
    assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3, (
        images.dtype,
        images.shape,
    )
    if images.shape[1:3] == (SIDE, SIDE):
        return images
    rows, columns = area_average(images.shape[1]), area_average(images.shape[2])
    small = np.einsum("ih,nhwc,jw->nijc", rows, images.astype(np.float32), columns, optimize=True)
    found: np.ndarray = np.clip(np.rint(small), 0, 255).astype(np.uint8)
    return found


def planes(small: np.ndarray) -> np.ndarray:
    """Miniatures uint8 [N, 32, 32, 3] to float32 [N, 3, 32, 32]: brightness and two colour
    differences.
    """
    found: np.ndarray = np.einsum("nhwc,kc->nkhw", small.astype(np.float32), COLOURS, optimize=True)
    return found


def window(zoom: float, move: float) -> np.ndarray:
    """float32 [14, 32]: the DCT of 26 points `zoom` pixels apart, whose middle lies `move` pixels
    off that of 32 pixels.

    Between pixels: Keys' cubic convolution (1981, a = -1/2); beyond the edge: the edge.
    """
    at = np.clip((SIDE - 1) / 2 + move + zoom * (np.arange(WINDOW) - (WINDOW - 1) / 2), 0, SIDE - 1)
    t = np.abs(at[:, None] - np.arange(SIDE))
    w = np.where(
        t < 1, 1.5 * t**3 - 2.5 * t**2 + 1, np.where(t < 2, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0)
    )
    found: np.ndarray = dct(w / w.sum(axis=1, keepdims=True), axis=0, norm="ortho")
    return found[:GREY].astype(np.float32)


_F = np.arange(GREY)
_RADIUS = np.hypot(_F[:, None], _F[None])
USED_GREY = (_RADIUS <= GREY) & (_RADIUS > 0)
USED_TINT = ((_RADIUS < TINT) & (_RADIUS > 0))[:TINT, :TINT]
RADII = np.concatenate(
    [_RADIUS[USED_GREY], *[_RADIUS[:TINT, :TINT][USED_TINT]] * 2]
)  # of each coefficient
CHANNEL = np.repeat([0, 1, 2], [USED_GREY.sum(), USED_TINT.sum(), USED_TINT.sum()])
COUNT = len(RADII)
# The coefficients that find candidates: those that JPEG and a pixel's misalignment leave alone.
COARSE = np.where(CHANNEL == 0, RADII < 8, RADII < 4.5)


def coefficients(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Planes [N, 3, 32, 32] to float32 [N, COUNT]: seen through windows rows and columns, [14, 32]
    or [N, 14, 32].
    """
    grey = rows @ x[:, 0] @ np.swapaxes(columns, -1, -2)
    r, c = (m[:, None] if m.ndim == 3 else m for m in (rows[..., :TINT, :], columns[..., :TINT, :]))
    tint = r @ x[:, 1:] @ np.swapaxes(c, -1, -2)
    return np.concatenate(
        [grey[:, USED_GREY], tint[:, 0][:, USED_TINT], tint[:, 1][:, USED_TINT]], axis=1
    )


def turned(x: np.ndarray) -> np.ndarray:
    """Planes [N, 3, S, S] to [8, N, 3, S, S]: the 8 mirror images and quarter turns."""
    return np.stack([symmetry(x, k) for k in range(TURNS)])


def smooth(power: np.ndarray) -> np.ndarray:
    """[COUNT]: each coefficient's power replaced by the mean over its channel and (rounded)
    frequency.
    """
    bins = CHANNEL * 32 + np.rint(RADII).astype(int)
    found: np.ndarray = (np.bincount(bins, power) / np.maximum(np.bincount(bins), 1))[bins]
    return found


def evidence(
    query: np.ndarray, real: np.ndarray, signal: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How much likelier each query is as a copy of its real picture than as a picture of its own,
    [N] in nats.

    query, real: coefficients [N, COUNT]; signal, noise [COUNT]: power of pictures, and of what
    copying adds. A copy is gain * real + noise times a level, gain and level chosen to fit; a
    picture of its own is drawn from signal + noise: the logarithm of the ratio of the two Gaussian
    densities. Also the residue, RMS in grey levels a pixel, [N].
    """
    inverse = 1 / noise
    rr = np.einsum("nf,nf,f->n", real, real, inverse)
    gain = np.clip(
        np.einsum("nf,nf,f->n", query, real, inverse) / np.maximum(rr, 1e-9),
        LEAST_GAIN,
        LARGEST_GAIN,
    )
    square = (query - gain[:, None] * real) ** 2
    residue = square @ inverse
    best = np.full(len(query), -np.inf)
    for level in LEVELS:
        other = signal + level * noise
        value = (query**2) @ (1 / other) - residue / level + np.log(other / (level * noise)).sum()
        best = np.maximum(best, value / 2)
    return best, np.sqrt(square.sum(axis=1) / WINDOW**2 / 3)
