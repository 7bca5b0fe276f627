"""Near-identical pictures across groups: a perceptual hash finds candidates, the detail of thumbnails confirms them.

Hash: signs of the 8 x 8 lowest DCT-II coefficients of the grey thumbnail about their median (Zauner 2010, section
3.2.1), a function of the thumbnail alone, so that mirrored and turned copies are found too. Two moles of one size in
one place share that hash and correlate by 0.99 in 16 x 16 pixels (HAM10000). What lies above the hash's frequencies
(hair, network, border) tells them apart: there copies, halved in size or recompressed, correlate by 0.98 (median),
different lesions of HAM10000 by less than 0.92.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

THUMB = 32  # side of a thumbnail, in pixels
LOW = 8  # coefficients a side that the hash reads and the detail leaves out
MIN_CORRELATION = 0.94
BLOCK = 1024


def _dct(n: int) -> np.ndarray:
    """[LOW, n] orthonormal rows of the DCT-II."""
    k = np.arange(LOW)[:, None]
    return np.cos(np.pi * k * (np.arange(n) + 0.5) / n) * np.sqrt(np.where(k == 0, 1, 2) / n)


def perceptual_hash(thumbs: np.ndarray) -> np.ndarray:
    """uint8 grey thumbnails [N, 32, 32] to uint64 [N]. A constant thumbnail hashes to 0."""
    basis = _dct(THUMB)
    c = np.round(basis @ thumbs.astype(np.float64) @ basis.T, 6).reshape(len(thumbs), LOW * LOW)
    bits = c > np.median(c[:, 1:], axis=1, keepdims=True)
    bits[:, 0] = False  # the mean says nothing about the picture
    return (bits.astype(np.uint64) << np.arange(64, dtype=np.uint64)).sum(1, dtype=np.uint64)


def detail(thumbs: np.ndarray) -> np.ndarray:
    """float32 [N, 1024]: thumbnails without the hash's frequencies, norm 1 (0 where nothing is left).

    A dot product is a correlation.
    """
    x = thumbs.astype(np.float32)
    basis = _dct(THUMB).astype(np.float32)
    project = basis.T @ basis
    x = (x - project @ x @ project).reshape(len(x), -1)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm > 1)  # less is rounding


def near_identical(
    ids: Sequence[str],
    phashes: np.ndarray,
    thumbs: np.ndarray,
    groups: Sequence[str],
    bits: int,
    correlation: float = MIN_CORRELATION,
) -> list[tuple[str, str, int, float]]:
    """(id, id, bits that differ, correlation) for pairs of different groups that look alike.

    Sorted, ids in order in each pair. ids unique [N]; phashes uint64 [N]; thumbs uint8 [N, 32, 32]. A pair counts when
    the hashes differ in at most `bits` bits, under one of the eight flips and quarter-turns, and their detail
    correlates by at least `correlation`. Of many equal pictures only a chain of pairs is given. `bits` < 0: none.
    """
    n = len(ids)
    assert len(set(ids)) == n == len(groups) == len(phashes) == len(thumbs), "ids are unique and all lists are of one length"
    if bits < 0 or n < 2:
        return []
    order = np.array(sorted(range(n), key=lambda i: ids[i]))  # the answer must not depend on the order of rows
    names, group = [ids[i] for i in order], np.array([groups[i] for i in order])
    thumbs, hashes = np.asarray(thumbs)[order], np.asarray(phashes, np.uint64)[order]
    pairs: dict[tuple[int, int], tuple[int, float]] = {}
    first: dict[bytes, int] = {}
    heads = []  # one of each set of equal thumbnails in a group; the rest hang on it
    last: dict[tuple[bytes, str], int] = {}
    for i in range(n):
        key = thumbs[i].tobytes()
        if (key, group[i]) in last:
            continue
        last[key, group[i]] = i
        if key in first:
            pairs[first[key], i] = (0, 1.0)
        else:
            first[key] = i
            heads.append(i)
    head = np.array(heads)
    flat = detail(thumbs[head])
    for turned in _eight(thumbs[head]):
        other, looks = perceptual_hash(turned), detail(turned)
        for start in range(0, len(head), BLOCK):
            distance = np.bitwise_count(hashes[head[start : start + BLOCK], None] ^ other[None, start:])
            a, b = np.nonzero(distance <= bits)
            d = distance[a, b]
            a, b = a + start, b + start
            keep = (a < b) & (group[head[a]] != group[head[b]])
            a, b, d = a[keep], b[keep], d[keep]
            r = _correlations(flat, looks, a, b)
            for i, j, x, y in zip(head[a], head[b], d, r, strict=True):
                if y >= correlation and y > pairs.get((int(i), int(j)), (0, -1.0))[1]:
                    pairs[int(i), int(j)] = (int(x), round(float(y), 6))
    return [(names[i], names[j], *found) for (i, j), found in sorted(pairs.items())]


def _correlations(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x[a] . y[b] row by row, in bounded memory."""
    pieces = [slice(i, i + 16 * BLOCK) for i in range(0, len(a), 16 * BLOCK)]
    return np.concatenate([np.einsum("nd,nd->n", x[a[p]], y[b[p]]) for p in pieces] or [np.zeros(0, np.float32)])


def _eight(thumbs: np.ndarray) -> Iterator[np.ndarray]:
    for turns in range(4):
        turned = np.rot90(thumbs, turns, axes=(1, 2))
        yield turned
        yield turned[:, :, ::-1]
