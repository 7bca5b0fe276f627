"""Images (or latents) by id, over several folders, and the order in which a training draws them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adversa.storage.arrays import Column, RoleArray
from adversa.storage.path import StoragePath
from adversa.types import UserError


class ImageTable:
    """Random access by id to the images of folders of `tables.EXAMPLES` or `tables.SYNTHETIC`, or
    to the latents of one. Ids must be unique over all folders.
    """

    def __init__(
        self, folders: Sequence[StoragePath], column: Column = "image", build: bool = True
    ) -> None:
        """build: as of RoleArray."""
        self.arrays = [RoleArray(f, column, build) for f in folders]
        ids = np.concatenate([np.zeros(0, "S1"), *(a.ids for a in self.arrays)])
        # first row of each folder, rows counted over all
        self._starts = np.cumsum([0, *(len(a.ids) for a in self.arrays)])
        self._order = np.argsort(ids, kind="stable")
        self._ids = ids[self._order]
        twice = np.flatnonzero(self._ids[1:] == self._ids[:-1])
        if len(twice):
            where = self.arrays[int(self._array_of(self._order[twice[:1] + 1])[0])].folder
            raise UserError(
                f"{where} holds the id {self._ids[twice[0]].decode()} a second time; delete the "
                "folder's parts and run again"
            )

    def fetch(self, ids: Sequence[str]) -> np.ndarray:
        """uint8 [B, H, W, 3] (of latents: float16 [B, views, C, side, side]) in the order of `ids`
        (an id may come twice).

        All of one size. UserError where one is missing.
        """
        if not len(ids):
            raise ValueError("fetch needs at least one id")
        rows = self._rows(ids)
        which = self._array_of(rows)
        out = np.zeros(0)
        for n, array in enumerate(self.arrays):
            if not len(uses := np.flatnonzero(which == n)):
                continue
            images = array.take(rows[uses] - self._starts[n])
            if len(uses) == len(ids):
                return images
            if not len(out):
                out = np.empty((len(ids), *images.shape[1:]), images.dtype)
            if images.shape[1:] != out.shape[1:]:
                raise UserError(
                    f"{array.folder} has images of {images.shape[1:]}, others "
                    f"{out.shape[1:]}; prepare them anew"
                )
            out[uses] = images
        return out

    def _rows(self, ids: Sequence[str]) -> np.ndarray:
        wanted = np.array([i.encode() for i in ids])
        at = np.searchsorted(self._ids, wanted)
        at[at == len(self._ids)] = 0
        missing = np.flatnonzero(self._ids[at] != wanted) if len(self._ids) else [0]
        if len(missing):
            where = self.arrays[0].folder if self.arrays else "an empty table"
            raise UserError(f"no image with the id {ids[missing[0]]} in {where}")
        return self._order[at]

    def _array_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, rows, side="right") - 1


def draw_order(weights: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` indices into weights [N] (>= 0, not all 0), int64.

    Item i comes up count * w_i / sum(w) times in expectation. Systematic resampling in passes of N
    draws: in each pass an item comes floor or ceil of its expectation, in a random order. Pass p
    depends on (weights, seed, p) alone: a longer `count` only continues the sequence.
    """
    weights = np.asarray(weights, np.float64)
    if (
        weights.ndim != 1
        or not len(weights)
        or not np.isfinite(weights).all()
        or (weights < 0).any()
        or weights.sum() <= 0
    ):
        raise ValueError("weights must be one or more finite numbers >= 0, not all 0")
    n = len(weights)
    edges = np.cumsum(weights) / weights.sum() * n
    edges[-1] = n
    last = int(np.flatnonzero(weights)[-1])
    passes = []
    for p in range(-(-count // n)):
        rng = np.random.default_rng([seed, p])
        picks = np.minimum(np.searchsorted(edges, rng.random() + np.arange(n), side="right"), last)
        passes.append(rng.permutation(picks))
    return np.concatenate(passes)[:count].astype(np.int64) if passes else np.zeros(0, np.int64)
