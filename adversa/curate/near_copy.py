"""Is this picture (nearly) a copy of a real one?

A picture's fingerprint is its 16x16 colour miniature, each channel centred, the whole scaled to length 1. The
similarity of two pictures is the correlation of their fingerprints, the largest over the 8 mirror images and quarter
turns: 1 for a copy, also when it is flipped, turned, brighter or of more contrast. What counts as near is measured, not
set: it depends on how similar pictures of different lesions are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from adversa.types import digest

SIDE = 16
# A copy stays a copy: the largest threshold, below the 1 - 1e-6 that float32 gives to an exact one.
LARGEST_THRESHOLD = 0.999
# A miniature whose channels all vary by less than this (RMS, grey levels) is flat: it resembles nothing.
FLAT = 0.25
QUERIES, REALS = 256, 8192  # block of the matrix products: 8 * 256 * 8192 float32 = 64 MiB
SAMPLE = 2000


def fingerprints(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] of any H and W to float32 [N, 768], rows of length 1 (of zeros for a flat picture)."""
    assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3, (images.dtype, images.shape)
    small = np.empty((len(images), SIDE, SIDE, 3), np.float32)
    rows, columns = area_average(images.shape[1]), area_average(images.shape[2])
    for start in range(0, len(images), QUERIES):
        block = images[start : start + QUERIES].astype(np.float32)
        block = np.tensordot(rows, block, axes=(1, 1)).transpose(1, 0, 2, 3)  # [n, 16, W, 3]
        small[start : start + QUERIES] = np.tensordot(columns, block, axes=(1, 2)).transpose(1, 2, 0, 3)
    small -= small.mean(axis=(1, 2), keepdims=True)
    prints = small.reshape(len(images), -1)
    norm = np.linalg.norm(prints, axis=1, keepdims=True)
    return np.where(norm < FLAT * np.sqrt(prints.shape[1]), 0, prints / np.maximum(norm, 1e-12)).astype(np.float32)


def area_average(size: int) -> np.ndarray:
    """float32 [16, size]: row i averages the pixels under the i-th sixteenth of a side, by the share under it."""
    edges = np.linspace(0, size, SIDE + 1)
    pixel = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return (np.clip(overlap, 0, None) * SIDE / size).astype(np.float32)


def turned(prints: np.ndarray) -> np.ndarray:
    """[N, 768] to [8, N, 768]: the fingerprints of the 8 mirror images and quarter turns of the same pictures."""
    grid = prints.reshape(-1, SIDE, SIDE, 3)
    both = (grid, grid[:, :, ::-1])
    return np.stack([np.rot90(g, k, axes=(1, 2)).reshape(prints.shape) for g in both for k in range(4)])


class NearCopy:
    """An index of real images: their fingerprints, 3 KB an image, in the order of their ids.

    images: uint8 [N, H, W, 3], or an iterable of such blocks, so that not all of them need be in memory at once. The
    order of the rows makes no difference.
    """

    def __init__(self, ids: Sequence[str], images: np.ndarray | Iterable[np.ndarray]) -> None:
        blocks = [images] if isinstance(images, np.ndarray) else images
        prints = np.concatenate([fingerprints(block) for block in blocks])
        assert len(prints) == len(ids) == len(set(ids)) > 0, "one image for each id, each id once"
        order = sorted(range(len(ids)), key=ids.__getitem__)
        self.ids, self.prints = [ids[i] for i in order], prints[order]

    def nearest(self, images: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """(similarity float64 [M] in [-1, 1], id of the most similar real image [M]) of uint8 images [M, H, W, 3]."""
        similarity, row = self._search(fingerprints(images), None, None)
        return similarity, [self.ids[i] for i in row]

    def threshold(self, ids: Sequence[str], groups: Sequence[str], quantile: float) -> float:
        """The similarity from which on a picture is a near copy; groups[i] is the lesion of ids[i], for all indexed.

        Each of up to 2,000 real images (drawn by the hash of their ids: the same for any order) is compared with its
        most similar real image of another group; the threshold is the quantile of these. So a picture of one more,
        different lesion is flagged at about the rate 1 - quantile. At most 0.999: an exact copy is always flagged.
        """
        group_of = dict(zip(ids, groups, strict=True))
        names = np.array([group_of[i] for i in self.ids], dtype=object)
        _, codes = np.unique(names, return_inverse=True)
        if codes.max(initial=0) == 0:
            return LARGEST_THRESHOLD
        sample = sorted(range(len(self.ids)), key=lambda i: digest("near copy", self.ids[i]))[:SAMPLE]
        similarity, _ = self._search(self.prints[sample], codes[sample], codes)
        return float(min(np.quantile(similarity, quantile), LARGEST_THRESHOLD))

    def _search(
        self, queries: np.ndarray, query_group: np.ndarray | None, group: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Largest correlation over turns and real images (of another group, where groups are given), and its row."""
        best, row = np.full(len(queries), -np.inf, np.float32), np.zeros(len(queries), np.int64)
        for q in range(0, len(queries), QUERIES):
            block = turned(queries[q : q + QUERIES])
            here = slice(q, q + block.shape[1])
            for r in range(0, len(self.ids), REALS):
                product = block.reshape(-1, block.shape[2]) @ self.prints[r : r + REALS].T
                similar = product.reshape(8, block.shape[1], -1).max(axis=0)
                if query_group is not None and group is not None:
                    similar[query_group[here, None] == group[None, r : r + REALS]] = -np.inf
                column = similar.argmax(axis=1)
                value = similar[np.arange(len(column)), column]
                better = value > best[here]  # strictly: of equals the smallest id
                best[here] = np.where(better, value, best[here])
                row[here] = np.where(better, r + column, row[here])
        # Matrix products of other shapes differ in the last bits: rounded, a verdict does not hang on them.
        return np.round(best.astype(np.float64), 5), row
