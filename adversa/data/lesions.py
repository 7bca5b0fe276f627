"""The phantom's lesions: a painter for each class, and one for the rare sub-mode.

Each draws its own parameters from `rng`. Painters take the lesion's own coordinates u, v [S, S],
two textures a, b [S, S] of unit variance and the size of a pixel, and give the layers and the
inside in [0, 1]. What they draw from `rng` does not depend on the view.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adversa.data import draw
from adversa.data.draw import Array

RARE_CLASS, RARE_MODE, COMMON_MODE = "melanoma", "amelanotic", "typical"


@dataclass(frozen=True)
class Layers:
    """What a lesion adds to the skin, [S, S] each.

    Densities of melanin and blood, shares of blue-grey veil and of pale scar.
    """

    melanin: Array
    blood: Array
    veil: Array
    pale: Array


def lesion(
    rng: np.random.Generator, label: str, mode: str, u: Array, v: Array, px: float
) -> tuple[Layers, Array]:
    """The layers of a lesion and its inside [S, S], in the lesion's own coordinates.

    Draws depend on `rng` alone, not on the view.
    """
    tile_a, tile_b = draw.fractal(rng, 6, 3, draw.TILE), draw.fractal(rng, 12, 2, draw.TILE)
    a, b = draw.sample(tile_a, u, v), draw.sample(tile_b, u, v)
    u, v = u + 0.03 * a, v + 0.03 * b
    painter = PAINTERS[label, mode]
    return painter(rng, u, v, a, b, px)


def _outline(
    rng: np.random.Generator, u: Array, v: Array, radius: float, uneven: float, soft: float
) -> tuple[Array, Array]:
    """(inside in [0, 1], depth: 1 at the centre, 0 at the border, < 0 outside). `uneven` drives
    harmonics 2 to 9.
    """
    ratio = np.exp(rng.normal(0, 0.10 + 0.25 * uneven))
    u, v = u * np.sqrt(ratio), v / np.sqrt(ratio)
    angle, r = np.arctan2(v, u), np.hypot(u, v)
    k = np.arange(2, 10)
    amplitude = rng.normal(0, 1, 8) * (0.03 + 0.25 * uneven) / k**0.9
    phase = rng.uniform(0, 2 * np.pi, 8)
    edge = radius * (
        1 + np.tensordot(amplitude, np.cos(k[:, None, None] * angle + phase[:, None, None]), 1)
    )
    edge = np.clip(edge, 0.45 * radius, 1.6 * radius)
    depth = 1 - r / edge
    return draw.step(depth, soft), depth


def _nevus(
    rng: np.random.Generator, u: Array, v: Array, a: Array, b: Array, px: float
) -> tuple[Layers, Array]:
    """Symmetric, one or two browns, fading border, fine network or globules. One in five is
    atypical.

    Larger, uneven, mottled.
    """
    odd = rng.random() < 0.22
    uneven = rng.uniform(0.3, 0.7) if odd else rng.uniform(0, 0.25)
    inside, depth = _outline(
        rng, u, v, rng.uniform(0.34, 0.62) + 0.08 * odd, uneven, rng.uniform(0.25, 0.55)
    )
    strength, centre = rng.uniform(0.6, 1.7), rng.uniform(-0.3, 0.7)
    melanin = strength * (1 + centre * np.clip(depth, 0, 1) + (0.12 + 0.25 * odd) * a)
    melanin = melanin + odd * rng.uniform(0, 1.2) * draw.step(a + b - 0.6, 1.2)
    if rng.random() < 0.65:
        net = draw.honeycomb(u + 0.05 * b, v - 0.05 * a, rng.uniform(44, 64)) * draw.step(
            a + 0.8, 2.0
        )
        melanin = melanin * (1 + rng.uniform(0.3, 0.6) * (net - 0.6))
    else:
        n = int(rng.integers(14, 30))
        melanin = melanin + 0.7 * draw.dots(
            u, v, draw.disc_points(rng, n, 0.5), rng.uniform(0.02, 0.045, n), 0.03 + px
        )
    blood = np.full_like(u, rng.uniform(0.05, 0.3)) * inside
    zero = np.zeros_like(u)
    return Layers(np.maximum(melanin, 0.1) * inside, blood, zero, zero), inside


def _melanoma(
    rng: np.random.Generator, u: Array, v: Array, a: Array, b: Array, px: float
) -> tuple[Layers, Array]:
    """Asymmetric, ragged, three to six colours.

    Browns, black blotches, blue-white veil, pale regression, streaks at one side.
    """
    stage = rng.beta(1.2, 1.3)  # early ones look like atypical nevi
    inside, depth = _outline(
        rng, u, v, rng.uniform(0.42, 0.66) + 0.12 * stage, 0.2 + 0.5 * stage, rng.uniform(0.12, 0.4)
    )
    lean = rng.uniform(0, 2 * np.pi)
    side = u * np.cos(lean) + v * np.sin(lean)
    melanin = rng.uniform(0.7, 1.2) + (0.3 + 1.3 * stage) * draw.step(
        a + 1.2 * side, 1.2
    ) * rng.uniform(0.6, 1.4)
    melanin = melanin + (0.2 + 1.2 * stage) * draw.step(b - 0.9, 0.7)
    melanin = melanin * (
        1 + 0.5 * (draw.honeycomb(u, v, rng.uniform(32, 46)) - 0.6) * draw.step(0.4 - a, 1.0)
    )
    n = int(rng.integers(3, 4 + int(10 * stage)))
    melanin = melanin + 1.5 * draw.dots(
        u, v, draw.disc_points(rng, n, 0.65), rng.uniform(0.015, 0.05, n), 0.02 + px
    )
    spokes = np.cos(rng.integers(15, 26) * np.arctan2(v, u) + 1.2 * a) + 0.9 * b
    streaks = draw.step(spokes - 0.4, 1.0) * draw.step(side - 0.1, 0.5)
    rim = np.clip(
        inside + 0.8 * stage * streaks * draw.step(depth + 0.16, 0.2) * (1 - inside), 0, 1
    )
    veil = (
        draw.step(rng.uniform(0, 0.9) * stage + 0.5 * a + 0.2 * b - 1.1 * side - 0.5, 0.9)
        * inside
        * rng.uniform(0.2, 0.9)
        * stage
    )
    pale = (
        draw.step(0.8 * a + 0.4 * b + 1.4 * side - rng.uniform(1.0, 1.8), 1.2)
        * inside
        * 0.5
        * (rng.random() < 0.6)
    )
    blood = rng.uniform(0.1, 0.5) * inside * draw.step(-a, 1.5)
    return Layers(np.maximum(melanin, 0.1) * rim, blood, veil, pale), inside


def _amelanotic(
    rng: np.random.Generator, u: Array, v: Array, a: Array, b: Array, px: float
) -> tuple[Layers, Array]:
    """Milky red to pink, uneven, dotted vessels, shiny white streaks, a remnant of pigment at the
    rim.
    """
    inside, depth = _outline(
        rng, u, v, rng.uniform(0.45, 0.7), rng.uniform(0.3, 0.6), rng.uniform(0.15, 0.35)
    )
    lean = rng.uniform(0, 2 * np.pi)
    side = u * np.cos(lean) + v * np.sin(lean)
    blood = rng.uniform(0.3, 0.9) * (1 + 0.4 * a) * inside
    n = int(rng.integers(14, 30))
    blood = (
        blood
        + 0.9
        * draw.dots(u, v, draw.disc_points(rng, n, 0.5), rng.uniform(0.015, 0.03, n), 0.02 + px)
        * inside
    )
    pale = rng.uniform(0.15, 0.4) * draw.step(b + 0.2, 1.0) * inside
    n = int(rng.integers(4, 8))
    angle = np.where(rng.random(n) < 0.5, lean, lean + np.pi / 2) + rng.normal(0, 0.1, n)
    start = draw.disc_points(rng, n, 0.35)
    lines = draw.arcs(
        u, v, px, start, angle, np.zeros(n), rng.uniform(0.15, 0.35, n), np.full(n, 0.013)
    )
    melanin = (
        rng.uniform(0.3, 0.8)
        * draw.step(side - rng.uniform(0.25, 0.45), 0.2)
        * draw.step(0.35 - depth, 0.3)
        * inside
    )
    return Layers(
        melanin,
        np.maximum(blood, 0),
        np.zeros_like(u),
        np.clip(pale + 0.35 * lines * inside, 0, 0.8),
    ), inside


def _keratosis(
    rng: np.random.Generator, u: Array, v: Array, a: Array, b: Array, px: float
) -> tuple[Layers, Array]:
    """Stuck on.

    Sharp border, waxy tan to brown, milia-like cysts (pale dots), comedo-like openings (dark dots),
    ridges.
    """
    inside, depth = _outline(
        rng, u, v, rng.uniform(0.42, 0.72), rng.uniform(0.1, 0.45), rng.uniform(0.05, 0.35)
    )
    strength = rng.uniform(0.35, 1.6)
    ridges = np.abs(
        np.sin(rng.uniform(9, 15) * u + 2.2 * a) * np.cos(rng.uniform(9, 15) * v + 2.2 * b)
    )
    melanin = strength * (0.85 + 0.15 * a + rng.uniform(0, 0.6) * (0.5 - ridges))
    plain = rng.random() < 0.3  # without marks: close to a nevus
    n = 0 if plain else int(rng.integers(1, 10))
    melanin = melanin + 1.2 * draw.dots(
        u, v, draw.disc_points(rng, n, 0.55), rng.uniform(0.014, 0.042, n), 0.03 + px
    )
    n = int(rng.integers(0, 3)) if plain else int(rng.integers(3, 16))
    cysts = draw.dots(u, v, draw.disc_points(rng, n, 0.55), rng.uniform(0.012, 0.036, n), 0.04 + px)
    zero = np.zeros_like(u)
    return Layers(
        np.maximum(melanin, 0.05) * inside, 0.15 * inside, zero, 0.55 * cysts * inside
    ), inside


def _carcinoma(
    rng: np.random.Generator, u: Array, v: Array, a: Array, b: Array, px: float
) -> tuple[Layers, Array]:
    """Pink and translucent, arborising vessels, blue-grey ovoid nests, sometimes a small ulcer."""
    inside, depth = _outline(
        rng, u, v, rng.uniform(0.4, 0.65), rng.uniform(0.1, 0.4), rng.uniform(0.25, 0.5)
    )
    trunks = int(rng.integers(1, 5))
    angle = rng.uniform(0, 2 * np.pi, trunks)
    start = -np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(
        0.35, 0.6, (trunks, 1)
    ) + rng.normal(0, 0.12, (trunks, 2))
    bend, length = rng.normal(0, 0.7, trunks), rng.uniform(0.5, 0.9, trunks)
    twigs = 3 * trunks
    of, t = (
        np.arange(twigs) % trunks,
        rng.uniform(0.15, 0.75, twigs)[:, None] * length[np.arange(twigs) % trunks][:, None],
    )
    direction = np.stack([np.cos(angle), np.sin(angle)], 1)[of]
    normal = np.stack([-direction[:, 1], direction[:, 0]], 1)
    twig_start = start[of] + t * direction + bend[of][:, None] * t**2 * normal
    vessels = draw.arcs(
        u,
        v,
        px,
        np.concatenate([start, twig_start]),
        np.concatenate(
            [angle, angle[of] + rng.choice([-1, 1], twigs) * rng.uniform(0.4, 1.0, twigs)]
        ),
        np.concatenate([bend, rng.normal(0, 1.5, twigs)]),
        np.concatenate([length, rng.uniform(0.15, 0.4, twigs)]),
        np.concatenate([np.full(trunks, 0.022), np.full(twigs, 0.013)]),
    )
    blood = (rng.uniform(0.2, 0.6) * (1 + 0.3 * a) + rng.uniform(0.6, 1.3) * vessels) * draw.step(
        depth + 0.15, 0.4
    )
    n = int(rng.integers(0, 7))
    nests = draw.dots(
        u + 0.05 * b, v + 0.05 * a, draw.disc_points(rng, n, 0.42), rng.uniform(0.05, 0.12, n), 0.08
    )
    ulcer = draw.dots(
        u + 0.04 * a, v, draw.disc_points(rng, 1, 0.25), rng.uniform(0.06, 0.13, 1), 0.05
    ) * (rng.random() < 0.35)
    brown = rng.uniform(0.4, 1.1) * (rng.random() < 0.25)  # the pigmented kind
    melanin = (0.12 + brown * draw.step(a + 0.3, 1.5)) * inside + 0.7 * ulcer
    return Layers(
        melanin, blood + 1.4 * ulcer, 0.65 * nests * inside, 0.18 * inside * draw.step(b, 1.0)
    ), inside


def _vascular(
    rng: np.random.Generator, u: Array, v: Array, a: Array, b: Array, px: float
) -> tuple[Layers, Array]:
    """Round red to purple lacunae close together, pale septa, sharp border; some clotted (near
    black).
    """
    radius = rng.uniform(0.3, 0.55)
    inside, depth = _outline(rng, u, v, radius, rng.uniform(0, 0.25), rng.uniform(0.1, 0.3))
    n = int(rng.integers(9, 22))
    lacunae = draw.dots(
        u, v, draw.disc_points(rng, n, 0.85 * radius), rng.uniform(0.2, 0.4, n) * radius, 0.08
    )
    clot = draw.dots(
        u, v, draw.disc_points(rng, 2, 0.6 * radius), rng.uniform(0.2, 0.4, 2) * radius, 0.08
    ) * (rng.random() < 0.4)
    blood = (rng.uniform(0.3, 0.8) + rng.uniform(0.4, 1.3) * lacunae + 0.15 * a) * inside
    melanin = (0.1 + 1.3 * clot + rng.uniform(0, 0.3) * lacunae) * inside
    veil = rng.uniform(0, 0.25) * lacunae * inside
    return Layers(melanin, np.maximum(blood, 0), veil, 0.12 * (1 - lacunae) * inside), inside


PAINTERS = {
    ("nevus", COMMON_MODE): _nevus,
    ("keratosis", COMMON_MODE): _keratosis,
    ("melanoma", COMMON_MODE): _melanoma,
    ("carcinoma", COMMON_MODE): _carcinoma,
    ("vascular", COMMON_MODE): _vascular,
    (RARE_CLASS, RARE_MODE): _amelanotic,
}
