"""Copies planted on purpose: what the near-copy check must catch, made from a real image. For
tests, benchmarks and self-checks.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from adversa.common.symmetry import symmetry

CROP = 0.9  # share of each side that a cropped copy keeps


def exact(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image


def turned(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another of the eight mirror images and quarter turns (of four where height and width
    differ).
    """
    whole = (
        symmetry(image, k, 0, 1) for k in (5, 3, 6, 1, 4, 2, 7)
    )  # the order says which a seed draws
    others = [x for x in whole if x.shape == image.shape]
    return others[int(rng.integers(len(others)))]


def cropped(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """90% of each side, from a corner or the centre, resized back to the whole."""
    h, w = image.shape[:2]
    ch, cw = round(CROP * h), round(CROP * w)
    top, left = (
        (0, 0),
        (0, w - cw),
        (h - ch, 0),
        (h - ch, w - cw),
        ((h - ch) // 2, (w - cw) // 2),
    )[int(rng.integers(5))]
    cut = Image.fromarray(np.ascontiguousarray(image[top : top + ch, left : left + cw]))
    return np.asarray(cut.resize((w, h), Image.Resampling.BICUBIC))


def jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Compressed at a quality of 30 to 90."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(
        buffer, format="JPEG", quality=int(rng.integers(30, 91))
    )
    return np.asarray(Image.open(buffer))


def brightness(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Contrast times 0.7 to 1.3 about the mean, 10 to 40 grey levels up or down, cut off at 0 and
    255.
    """
    mean, gain = image.mean(), rng.uniform(0.7, 1.3)
    shift = rng.uniform(10, 40) * rng.choice([-1, 1])
    found: np.ndarray = np.clip(np.rint((image - mean) * gain + mean + shift), 0, 255)
    return found.astype(np.uint8)


def noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of standard deviation 4 to 8, independent in each pixel and channel."""
    return np.clip(np.rint(image + rng.normal(0, rng.uniform(4, 8), image.shape)), 0, 255).astype(
        np.uint8
    )


def shifted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moved by -3 to 3 pixels along each axis (not by none), what comes in repeats the edge."""
    dy, dx = 0, 0
    while dy == dx == 0:
        dy, dx = (int(v) for v in rng.integers(-3, 4, 2))
    h, w = image.shape[:2]
    rows, columns = np.clip(np.arange(h) - dy, 0, h - 1), np.clip(np.arange(w) - dx, 0, w - 1)
    return image[rows][:, columns]


KINDS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "exact": exact,
    "turned": turned,
    "cropped": cropped,
    "jpeg": jpeg,
    "brightness": brightness,
    "noisy": noisy,
    "shifted": shifted,
}


def plant(images: np.ndarray, kind: str, seed: int = 0) -> np.ndarray:
    """A copy of each image, uint8 [N, H, W, 3] to the same shape. Row i depends on its image,
    `kind`, `seed` and i alone.
    """
    make = KINDS[kind]
    number = list(KINDS).index(kind)
    return np.stack(
        [make(image, np.random.default_rng([seed, number, i])) for i, image in enumerate(images)]
    )
