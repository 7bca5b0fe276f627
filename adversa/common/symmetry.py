"""The eight symmetries of the square, numbered alike for numpy's arrays and torch's tensors.

Bit 0 of a number mirrors left-right, bit 1 top-bottom, bit 2 transposes, last. 0, 5, 3, 6 are the
quarter turns (of `np.rot90`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # for its types alone: who has arrays need not load torch
    from torch import Tensor

    Images = TypeVar("Images", np.ndarray, Tensor)

COUNT = 8


def symmetry(images: Images, k: int, rows: int = -2, columns: int = -1) -> Images:
    """All images in symmetry k of 0 ... 7; an array may come back as a view.

    rows, columns: the axes of a picture. They change places where k has bit 2.
    """
    mirrored = tuple(axis for axis, bit in ((columns, 1), (rows, 2)) if k & bit)
    if mirrored:
        images = (
            np.flip(images, mirrored) if isinstance(images, np.ndarray) else images.flip(mirrored)
        )
    return images.swapaxes(rows, columns) if k & 4 else images


def turn(images: Tensor, which: Tensor) -> Tensor:
    """Images [B, C, S, S], image i in symmetry which[i] of 0 ... 7. A GPU's host waits for
    nothing.
    """
    assert images.shape[-1] == images.shape[-2], tuple(images.shape)
    which = which.to(images.device).view(-1, 1, 1, 1)
    for bit in (1, 2, 4):
        images = symmetry(images, bit).where((which & bit).bool(), images)
    return images


def matrices() -> np.ndarray:
    """float32 [8, 2, 2]: where in (x, y), from the middle, symmetry k reads what it puts at (x,
    y).
    """
    mirror, upset, transpose = np.array([[[-1, 0], [0, 1]], [[1, 0], [0, -1]], [[0, 1], [1, 0]]])
    one = np.eye(2, dtype=int)
    found = [
        (mirror if k & 1 else one) @ (upset if k & 2 else one) @ (transpose if k & 4 else one)
        for k in range(COUNT)
    ]
    return np.stack(found).astype(np.float32)
