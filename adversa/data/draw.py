"""Closed-form marks for `phantom`: smooth fields, lines, dots, networks.

Float64, so that a rounded pixel hardly ever depends on the machine. Coordinates are in units of
half a picture: x to the right and y down, both in [-1, 1] inside the picture. `px` is the size of a
pixel in these units (2 / S): edges are softened over one pixel, so that a mark keeps its look at
any size.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
TILE = 48


@lru_cache(maxsize=8)
def grid(size: int) -> tuple[Array, Array]:
    """x, y [S, S] of the pixels' centres."""
    axis = (np.arange(size) + 0.5) * (2 / size) - 1
    x, y = np.meshgrid(axis, axis)
    x.setflags(write=False)
    y.setflags(write=False)
    return x, y


@lru_cache(maxsize=64)
def _spline(cells: int, size: int) -> Array:
    """[S, cells] weights of a periodic cubic B-spline with `cells` knots."""
    t = (np.arange(size) + 0.5) * (cells / size)
    k = np.floor(t).astype(int)
    f = t - k
    weights = (
        np.stack([(1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3], 1)
        / 6
    )
    out = np.zeros((size, cells))
    for j in range(4):
        np.add.at(out, (np.arange(size), (k + j - 1) % cells), weights[:, j])
    return out


def smooth(rng: np.random.Generator, cells: int, size: int) -> Array:
    """A smooth periodic random field [S, S] of unit variance, with `cells` bumps a side."""
    w = _spline(cells, size)
    field = w @ rng.standard_normal((cells, cells)) @ w.T
    found: Array = (field - field.mean()) / (field.std() + 1e-9)
    return found


def fractal(
    rng: np.random.Generator, cells: int, octaves: int, size: int, fall: float = 0.6
) -> Array:
    """Sum of `octaves` smooth fields, each twice as fine and `fall` times as strong; unit variance.
    [S, S].
    """
    total = sum(fall**i * smooth(rng, min(cells * 2**i, size), size) for i in range(octaves))
    found: Array = total / np.sqrt(sum(fall ** (2 * i) for i in range(octaves)))
    return found


def sample(tile: Array, u: Array, v: Array, span: float = 4.0) -> Array:
    """A periodic tile read at u, v (one period is `span` units) by bilinear interpolation."""
    n = tile.shape[0]
    a, b = (u / span) * n % n, (v / span) * n % n
    i, j = a.astype(int), b.astype(int)
    f, g = a - i, b - j
    i, j = i % n, j % n
    i1, j1 = (i + 1) % n, (j + 1) % n
    found: Array = (1 - g) * ((1 - f) * tile[j, i] + f * tile[j, i1]) + g * (
        (1 - f) * tile[j1, i] + f * tile[j1, i1]
    )
    return found


def arcs(
    x: Array,
    y: Array,
    px: float,
    start: Array,
    angle: Array,
    bend: Array,
    length: Array,
    width: Array,
) -> Array:
    """Coverage [S, S] in [0, 1] of n tapering parabolic arcs. start [n, 2].

    Angle, bend, length, width (half, at the root) [n].
    """
    if len(angle) == 0:
        return np.zeros_like(x)
    c, s = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    dx, dy = x[None] - start[:, 0, None, None], y[None] - start[:, 1, None, None]
    along, across = dx * c + dy * s, dy * c - dx * s
    bend, length, width = bend[:, None, None], length[:, None, None], width[:, None, None]
    distance = np.abs(across - bend * along**2) / np.sqrt(1 + (2 * bend * along) ** 2)
    half = width * np.clip(1.15 - along / length, 0, 1)
    cover = np.clip((half - distance) / px + 0.5, 0, np.minimum(1, 2 * half / px)) * (along > 0)
    found: Array = cover.max(0)
    return found


def dots(x: Array, y: Array, centres: Array, radius: Array, soft: float) -> Array:
    """Coverage [S, S] in [0, 1] of n discs. centres [n, 2], radius [n]; edges softened over
    `soft`.
    """
    if len(radius) == 0:
        return np.zeros_like(x)
    d = np.hypot(x[None] - centres[:, 0, None, None], y[None] - centres[:, 1, None, None])
    found: Array = np.clip((radius[:, None, None] - d) / soft + 0.5, 0, 1).max(0)
    return found


def honeycomb(x: Array, y: Array, frequency: float) -> Array:
    """A net in [0, 1], 1 on its lines: three plane waves at 120 degrees; `frequency` in radians a
    unit.
    """
    h = np.sqrt(3) / 2
    c = (
        np.cos(frequency * x)
        + np.cos(frequency * (h * y - x / 2))
        + np.cos(frequency * (-h * y - x / 2))
    )
    found: Array = 1 - (c + 1.5) / 4.5
    return found


def disc_points(rng: np.random.Generator, n: int, radius: float) -> Array:
    """n points [n, 2], uniform in a disc."""
    r, a = radius * np.sqrt(rng.random(n)), rng.random(n) * 2 * np.pi
    return np.stack([r * np.cos(a), r * np.sin(a)], 1)


def step(x: Array, width: float = 1.0) -> Array:
    """A smooth step: 0 below -width/2, 1 above width/2."""
    t = np.clip(x / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def lab_to_linear(lightness: float, a: float, b: float) -> Array:
    """CIE L*a*b* (D65) to linear sRGB [3], clipped to [0.01, 1]."""
    fy = (lightness + 16) / 116
    f = np.array([fy + a / 500, fy, fy - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * np.array(
        [0.95047, 1.0, 1.08883]
    )
    to_rgb = np.array(
        [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]]
    )
    found: Array = np.clip(to_rgb @ xyz, 0.01, 1)
    return found


def encode(linear: Array) -> Array:
    """Linear light to sRGB in [0, 1]."""
    x = np.clip(linear, 0, 1)
    return np.where(x > 0.0031308, 1.055 * x ** (1 / 2.4) - 0.055, 12.92 * x)
