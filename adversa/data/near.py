"""Near-identical pictures across groups: a perceptual hash finds candidates, the detail of
thumbnails confirms them.

Hash: signs of the 8 x 8 lowest DCT-II coefficients of the grey thumbnail about their median (Zauner
2010, section
3.2.1), a function of the thumbnail alone, so that mirrored and turned copies are found too. Two
moles of one size in one place share that hash and correlate by 0.99 in 16 x 16 pixels (HAM10000).
What lies above the hash's frequencies (hair, network, border) tells them apart: there copies,
halved in size or recompressed, correlate by 0.98 (median), different lesions of HAM10000 by less
than 0.92.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.fft import dct

from adversa.common.symmetry import COUNT as TURNS
from adversa.common.symmetry import symmetry

THUMB = 32  # side of a thumbnail, in pixels
LOW = 8  # coefficients a side that the hash reads and the detail leaves out
# [LOW, THUMB] rows of the DCT-II. Two products with them are three times as fast as `dctn`.
BASIS = dct(np.eye(THUMB), axis=0, norm="ortho")[:LOW]
MIN_CORRELATION = 0.94
BLOCK, ROWS = (
    2048,
    8192,
)  # thumbnails read at once, and those whose detail is kept while all others pass by: 8 and 32 MB
PIECE = (
    64  # hashes compared with a block at once: what is in between stays in the processor's cache
)


def perceptual_hash(thumbs: np.ndarray) -> np.ndarray:
    """uint8 grey thumbnails [N, 32, 32] to uint64 [N]. A constant thumbnail hashes to 0."""
    c = np.round(BASIS @ thumbs.astype(np.float64) @ BASIS.T, 6).reshape(len(thumbs), LOW * LOW)
    bits = c > np.median(c[:, 1:], axis=1, keepdims=True)
    bits[:, 0] = False  # the mean says nothing about the picture
    placed = bits.astype(np.uint64) << np.arange(64, dtype=np.uint64)
    found: np.ndarray = placed.sum(1, dtype=np.uint64)
    return found


def detail(thumbs: np.ndarray) -> np.ndarray:
    """float32 [N, 1024]: thumbnails without the hash's frequencies, norm 1 (0 where nothing is
    left).

    A dot product is a correlation.
    """
    x = thumbs.astype(np.float32)
    basis = BASIS.astype(np.float32)
    project = basis.T @ basis
    x = (x - project @ x @ project).reshape(len(x), -1)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    found: np.ndarray = np.divide(x, norm, out=np.zeros_like(x), where=norm > 1)  # less is rounding
    return found


class Thumbs:
    """The thumbnails of a file, 1 KB each one after the other, read when asked for: memory does not
    hold them all.

    rows: which of the file's, in which order; None: all of them.
    """

    def __init__(self, path: Path, rows: np.ndarray | None = None) -> None:
        self.path = path
        self.rows = np.arange(path.stat().st_size // THUMB**2) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, wanted: np.ndarray) -> np.ndarray:
        """uint8 [n, 32, 32] of the indices [n]."""
        with open(self.path, "rb", buffering=0) as f:
            found = [
                os.pread(f.fileno(), THUMB**2, int(row) * THUMB**2) for row in self.rows[wanted]
            ]
        return np.frombuffer(b"".join(found), np.uint8).reshape(-1, THUMB, THUMB)


def near_identical(
    ids: Sequence[str],
    phashes: np.ndarray,
    thumbs: np.ndarray | Thumbs,
    groups: Sequence[str],
    bits: int,
    correlation: float = MIN_CORRELATION,
) -> list[tuple[str, str, int, float]]:
    """(id, id, bits that differ, correlation) for pairs of different groups that look alike.

    Sorted, ids in order in each pair. ids unique [N]; phashes uint64 [N]; thumbs uint8 [N, 32, 32].
    A pair counts when the hashes differ in at most `bits` bits, under one of the eight flips and
    quarter-turns, and their detail correlates by at least `correlation`. Of many equal pictures
    only a chain of pairs is given. `bits` < 0: none.
    """
    n = len(ids)
    assert len(set(ids)) == n == len(groups) == len(phashes) == len(thumbs), (
        "ids are unique and all lists are of one length"
    )
    if bits < 0 or n < 2:
        return []
    order = np.array(
        sorted(range(n), key=ids.__getitem__)
    )  # the answer must not depend on the order of rows
    codes: dict[str, int] = {}
    group = np.array([codes.setdefault(g, len(codes)) for g in groups])[order]
    head, pairs = _heads(thumbs, order, group)
    for a, b, d, r in _alike(
        thumbs,
        order[head],
        np.asarray(phashes, np.uint64)[order[head]],
        group[head],
        bits,
        correlation,
    ):
        i, j = int(head[a]), int(head[b])
        if r > pairs.get((i, j), (0, -1.0))[1]:
            pairs[i, j] = (d, round(r, 6))
    return [(ids[order[i]], ids[order[j]], *found) for (i, j), found in sorted(pairs.items())]


def _heads(
    thumbs: np.ndarray | Thumbs, order: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, dict[tuple[int, int], tuple[int, float]]]:
    """(places in `order` of the first of each set of equal thumbnails, pairs that hang the first of
    each other group on it).
    """
    digests = [
        hashlib.blake2b(t.tobytes(), digest_size=16).digest()
        for _, block in _blocks(thumbs, order)
        for t in block
    ]
    _, look = np.unique(np.frombuffer(b"".join(digests), "V16"), return_inverse=True)
    _, first = np.unique(look, return_index=True)
    _, seen = np.unique(
        look * (group.max() + 1) + group, return_index=True
    )  # the first of each look in each group
    others = np.setdiff1d(seen, first)
    return np.sort(first), {(int(first[look[i]]), int(i)): (0, 1.0) for i in others}


def _alike(
    thumbs: np.ndarray | Thumbs,
    rows: np.ndarray,
    hashes: np.ndarray,
    group: np.ndarray,
    bits: int,
    correlation: float,
) -> Iterator[tuple[int, int, int, float]]:
    """(a, b, bits, correlation) of pairs a < b of rows [M] that look alike under a turn; at most
    two blocks' detail in memory.
    """
    turned = np.empty((TURNS, len(rows)), np.uint64)
    for here, block in _blocks(thumbs, rows):
        for k in range(TURNS):
            turned[k, here] = perceptual_hash(symmetry(block, k))
    flat = np.empty((min(ROWS, len(rows)), THUMB**2), np.float32)
    for top in range(0, len(rows), ROWS):
        for here, block in _blocks(thumbs, rows[top : top + ROWS]):
            flat[here] = detail(block)
        for here, block in _blocks(thumbs, rows, top):
            columns = detail(block).reshape(-1, THUMB, THUMB)
            for k in range(TURNS):  # what is left out is the same for a turned picture
                a, b, d = _within(hashes[top : top + ROWS], turned[k, here], bits)
                keep = (a + top < b + here.start) & (group[a + top] != group[b + here.start])
                a, b, d = a[keep], b[keep], d[keep]
                r = _correlations(flat, symmetry(columns, k).reshape(len(columns), -1), a, b)
                good = np.flatnonzero(r >= correlation)
                yield from zip(
                    (a + top)[good].tolist(),
                    (b + here.start)[good].tolist(),
                    d[good].tolist(),
                    r[good].tolist(),
                    strict=True,
                )


def _within(x: np.ndarray, y: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(i, j, distance) of the hashes x [n], y [m] that differ in at most `bits` bits."""
    found = []
    for start in range(0, len(x), PIECE):
        distance = np.bitwise_count(x[start : start + PIECE, None] ^ y[None])
        at = np.flatnonzero(distance <= bits)
        found.append((at // len(y) + start, at % len(y), distance.ravel()[at]))
    i, j, d = (np.concatenate(part) for part in zip(*found, strict=True))
    return i, j, d


def _blocks(
    thumbs: np.ndarray | Thumbs, rows: np.ndarray, start: int = 0
) -> Iterator[tuple[slice, np.ndarray]]:
    """(places, thumbnails of rows[places]) from `start` on, BLOCK at a time."""
    for i in range(start, len(rows), BLOCK):
        here = slice(i, min(i + BLOCK, len(rows)))
        yield here, thumbs[rows[here]]


def _correlations(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x[a] . y[b] row by row, in bounded memory."""
    pieces = [slice(i, i + BLOCK) for i in range(0, len(a), BLOCK)]
    return np.concatenate(
        [np.einsum("nd,nd->n", x[a[p]], y[b[p]]) for p in pieces] or [np.zeros(0, np.float32)]
    )
