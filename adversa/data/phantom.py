"""Procedural dermoscopy pictures: no download, the same for a seed on any machine.

Skin of a stated ITA angle, Beer-Lambert absorption by melanin and blood, lesions drawn by the ABCD
rule of dermoscopy (asymmetry, border, colour, diameter; Stolz et al. 1994), hair, gel bubbles,
rulers, vignetting. Five classes with a long tail. One class hides a rare sub-mode (amelanotic
melanoma: pink, next to no pigment), recorded in the attributes alone. `python -m
adversa.data.phantom FILE.png` writes a contact sheet.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from adversa.config import Phantom
from adversa.data import draw
from adversa.data.draw import Array
from adversa.data.lesions import COMMON_MODE, RARE_CLASS, RARE_MODE, lesion
from adversa.types import Pixels, seed_of

CLASSES = ("nevus", "keratosis", "melanoma", "carcinoma", "vascular")  # from frequent to rare
KINDS = [(label, mode) for label in CLASSES for mode in (COMMON_MODE, RARE_MODE)]
# ITA in degrees: the six bands of del Bino and Bernerd 2013, read as Fitzpatrick types; shares lean
# to light skin, as those of dermoscopy archives do.
SKIN = {
    "I": (55, 68),
    "II": (41, 55),
    "III": (28, 41),
    "IV": (10, 28),
    "V": (-30, 10),
    "VI": (-55, -30),
}
SKIN_SHARE = (0.17, 0.33, 0.24, 0.13, 0.08, 0.05)
# Absorption of one unit in linear R, G, B, after Jacques 2013: melanin falls with wavelength, blood
# peaks in green.
MELANIN, BLOOD = np.array([0.62, 1.05, 1.45]), np.array([0.16, 1.05, 0.85])
VEIL, PALE = np.array([0.11, 0.15, 0.21]), np.array([0.78, 0.66, 0.62])


@dataclass(frozen=True)
class Slot:
    """Who is in picture `index`."""

    lesion: int
    view: int  # 0 is the first picture of the lesion
    label: str
    mode: str


class Slots(Sequence[Slot]):
    """The slots of a phantom's pictures in order, in 6 bytes each: a worker that draws one picture
    has them all.
    """

    def __init__(self, lesion: np.ndarray, view: np.ndarray, kind: np.ndarray) -> None:
        self.lesion, self.view, self.kind = (
            lesion.astype(np.int32),
            view.astype(np.uint8),
            kind.astype(np.uint8),
        )

    def __len__(self) -> int:
        return len(self.lesion)

    def __getitem__(self, i: int) -> Slot:  # type: ignore[override]  # no slices
        return Slot(int(self.lesion[i]), int(self.view[i]), *KINDS[self.kind[i]])


@lru_cache(maxsize=2)
def slots(config: Phantom) -> Slots:
    """The lesion, class and mode of every picture.

    Class k has a share proportional to tail^k, every class at least 8 pictures.
    """
    rng = np.random.default_rng(seed_of("phantom slots", config.seed))
    share = config.tail ** np.arange(len(CLASSES))
    counts = np.maximum(8, np.floor(share / share.sum() * config.images)).astype(int)
    counts[0] += config.images - counts.sum()
    kinds: list[int] = []  # of each lesion
    sizes: list[int] = []  # its pictures
    for label, count in zip(CLASSES, counts.tolist(), strict=True):
        first, left = len(sizes), count
        while left > 0:
            sizes.append(min(left, 1 + int(rng.poisson(config.images_per_lesion - 1))))
            left -= sizes[-1]
        wanted, rare = config.rare * count * (label == RARE_CLASS), 0
        for size in sizes[first:]:
            mode = RARE_MODE if rare + size / 2 <= wanted else COMMON_MODE
            rare += size * (mode == RARE_MODE)
            kinds.append(KINDS.index((label, mode)))
    order = rng.permutation(len(sizes))
    pictures = np.array(sizes)[order]
    lesion = np.repeat(np.arange(len(pictures)), pictures)
    view = np.arange(len(lesion)) - np.repeat(np.cumsum(pictures) - pictures, pictures)
    picked = rng.permutation(len(lesion))
    return Slots(lesion[picked], view[picked], np.array(kinds)[order][lesion[picked]])


def picture(
    index: int, config: Phantom, size: int = 96
) -> tuple[Pixels, Pixels, str, str, dict[str, str]]:
    """Picture `index` in [0, config.images).

    Image uint8 [S, S, 3], mask uint8 [S, S] (0 or 255), label, group, attributes.
    """
    slot = slots(config)[index]
    mine = np.random.default_rng(
        seed_of("phantom lesion", config.seed, slot.lesion)
    )  # shared by the lesion's pictures
    view = np.random.default_rng(seed_of("phantom view", config.seed, slot.lesion, slot.view))
    x, y = draw.grid(size)
    px = 2 / size

    type_, ita, skin, hairy = _skin(mine)
    turn, zoom, shift = (
        view.uniform(0, 2 * np.pi),
        np.exp(view.normal(0, 0.1)),
        view.normal(0, 0.09, 2),
    )
    c, s = np.cos(turn) / zoom, np.sin(turn) / zoom
    u, v = (x - shift[0]) * c + (y - shift[1]) * s, (y - shift[1]) * c - (x - shift[0]) * s
    layers, inside = lesion(mine, slot.label, slot.mode, u, v, px / zoom)

    blotches, pores = draw.fractal(view, 3, 3, size), draw.fractal(view, 24, 2, size, 0.8)
    base = np.exp(0.05 * blotches + 0.03 * pores)[..., None] * skin
    base = base * np.exp(-0.10 * np.clip(draw.smooth(view, 4, size), -1, 2)[..., None] * BLOOD)
    light = base * np.exp(-(layers.melanin[..., None] * MELANIN + layers.blood[..., None] * BLOOD))
    tone = 0.35 + 0.65 * skin / 0.5  # a veil or a scar is darker in darker skin
    light += layers.veil[..., None] * (VEIL * np.minimum(tone, 1) - light)
    light += layers.pale[..., None] * (PALE * np.minimum(tone, 1) - light)

    light, marks = _artefacts(view, light, x, y, px, hairy, type_)
    image = draw.encode(light) * 255 + view.normal(0, 1.2, (size, size, 1))
    attributes = {"mode": slot.mode, "fitzpatrick": type_, "ita": f"{ita:.0f}", **marks}
    mask = np.where(inside > 0.5, 255, 0).astype(np.uint8)
    return (
        np.clip(np.rint(image), 0, 255).astype(np.uint8),
        mask,
        slot.label,
        f"lesion-{slot.lesion:05d}",
        attributes,
    )


def _skin(rng: np.random.Generator) -> tuple[str, float, Array, float]:
    """Fitzpatrick type, ITA in degrees, linear RGB [3], hairiness. ITA = atan((L* - 50) / b*) in
    CIE L*a*b*.
    """
    type_ = list(SKIN)[int(rng.choice(len(SKIN), p=SKIN_SHARE))]
    ita = float(rng.uniform(*SKIN[type_]))
    yellow = rng.uniform(15.5, 20) - 0.08 * abs(ita - 15)
    skin = draw.lab_to_linear(50 + yellow * np.tan(np.radians(ita)), rng.uniform(9, 15), yellow)
    return type_, ita, skin, float(rng.choice([0.0, 1.0, 3.0, 9.0], p=[0.4, 0.25, 0.23, 0.12]))


def _artefacts(
    rng: np.random.Generator, light: Array, x: Array, y: Array, px: float, hairy: float, type_: str
) -> tuple[Array, dict[str, str]]:
    """Hair, gel bubbles, a ruler, uneven lamps, white balance, vignette: of the picture, not of the
    lesion.
    """
    n = int(rng.poisson(hairy))
    angle = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.5, n)
    start = rng.uniform(-0.9, 0.9, (n, 2)) - 1.2 * np.stack([np.cos(angle), np.sin(angle)], 1)
    hair = draw.arcs(
        x,
        y,
        px,
        start,
        angle,
        rng.normal(0, 0.25, n),
        rng.uniform(1.6, 3.2, n),
        rng.uniform(0.008, 0.016, n),
    )
    blond = type_ in ("I", "II") and rng.random() < 0.35
    colour = np.array([0.42, 0.28, 0.14]) if blond else np.array([0.035, 0.025, 0.02])
    light = light + (0.75 * hair)[..., None] * (colour - light)

    n = int(rng.poisson(2.0)) if rng.random() < 0.25 else 0
    for cx, cy, r in zip(
        rng.uniform(-1, 1, n), rng.uniform(-1, 1, n), rng.uniform(0.03, 0.13, n), strict=True
    ):
        d = np.hypot(x - cx, y - cy)
        ring = np.exp(-(((d - r) / (0.018 + px / 2)) ** 2)) * (
            0.5 + 0.5 * np.cos(np.arctan2(y - cy, x - cx) + 2.2)
        )
        light = light + (0.55 * ring)[..., None] * (1 - light) - (0.10 * (d < r))[..., None] * light
    ruled = bool(rng.random() < 0.12)
    if ruled:
        along, across = (x, 1 - y) if rng.random() < 0.5 else (y, 1 - x)
        tick = rng.uniform(0.10, 0.14)
        phase = (along / tick) % 1
        major = np.floor(along / tick) % 5 == 0
        line = (
            (np.minimum(phase, 1 - phase) * tick < 0.008 + px / 4)
            & (across < np.where(major, 0.22, 0.12))
            & (across > 0.03)
        )
        light = light + (0.65 * line)[..., None] * (0.04 - light)
    lamp = 1 + rng.normal(0, 0.05) * x + rng.normal(0, 0.05) * y
    balance = np.exp(rng.normal(0.08, 0.07) + rng.normal(0, 0.035, 3))
    r = np.hypot(x, y)
    vignette = 1 - rng.uniform(0.08, 0.4) * np.clip(r - 0.35, 0, None) ** 2
    framed = bool(rng.random() < 0.12)
    if framed:
        vignette = vignette * (0.03 + 0.97 * draw.step(rng.uniform(0.98, 1.2) - r, 0.05 + px))
    marks = {
        "hair": "none" if hair.max() == 0 else "some",
        "bubbles": str(n),
        "ruler": "yes" if ruled else "no",
    }
    return light * (lamp * vignette)[..., None] * balance, {
        **marks,
        "frame": "yes" if framed else "no",
    }


def sheet(path: str, columns: int = 9, size: int = 88) -> None:
    """A contact sheet: a row for each class, then one for the rare sub-mode; skin from light to
    dark along a row.
    """
    from PIL import Image

    config = Phantom()
    rows = [(label, COMMON_MODE) for label in CLASSES] + [(RARE_CLASS, RARE_MODE)]
    order = list(SKIN)
    canvas = np.full((len(rows) * (size + 4) + 4, columns * (size + 4) + 4, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        found = [
            k for k, s in enumerate(slots(config)) if (s.label, s.mode) == row and s.view == 0
        ][:120]
        drawn = [picture(k, config, size) for k in found]
        drawn.sort(key=lambda p: order.index(p[4]["fitzpatrick"]))
        picks = np.linspace(0, len(drawn) - 1, columns).round().astype(int)
        for j, k in enumerate(picks):
            top, left = 4 + i * (size + 4), 4 + j * (size + 4)
            canvas[top : top + size, left : left + size] = drawn[k][0]
    Image.fromarray(canvas & 0xF8 | 4).save(
        path, optimize=True
    )  # 5 bits a channel: a third of the bytes


if __name__ == "__main__":
    sheet(sys.argv[1])
