"""Images by id from Parquet, for training: only what a batch needs is decoded, what is hot stays in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from adversa import tables
from adversa.types import UserError


class ImageTable:
    """Random access by id to the images of folders of `tables.EXAMPLES` or `tables.SYNTHETIC`.

    Row groups are decoded whole and kept, least recently used dropped first, up to `memory_bytes` of pixels (at least
    one stays). Not for sharing between threads. Ids must be unique over all folders.
    """

    def __init__(self, folders: Sequence[Path], memory_bytes: int = 1 << 30) -> None:
        self.memory_bytes = memory_bytes
        self._place: dict[str, tuple[int, int, int]] = {}  # id -> file, row group, row within it
        self._files: list[Path] = []
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._held = 0
        for folder in folders:
            for path in tables.parts(folder):
                self._index(path)

    def _index(self, path: Path) -> None:
        with pq.ParquetFile(path) as file:
            key = "id" if "id" in file.schema_arrow.names else "request_id"
            for group in range(file.num_row_groups):
                for row, id_ in enumerate(file.read_row_group(group, columns=[key]).column(0).to_pylist()):
                    if id_ in self._place:
                        raise UserError(f"{path} holds the id {id_} a second time; delete the folder's parts and run again")
                    self._place[id_] = (len(self._files), group, row)
        self._files.append(path)

    def fetch(self, ids: Sequence[str]) -> np.ndarray:
        """uint8 [B, H, W, 3] in the order of `ids` (an id may come twice). UserError where one is missing.

        All of one size.
        """
        if not len(ids):
            raise ValueError("fetch needs at least one id")
        missing = [i for i in ids if i not in self._place]
        if missing:
            raise UserError(f"no image with the id {missing[0]} in {self._files[0].parent if self._files else 'an empty table'}")
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for position, id_ in enumerate(ids):
            file, group, row = self._place[id_]
            wanted.setdefault((file, group), []).append((position, row))
        out: np.ndarray | None = None
        for (
            place,
            uses,
        ) in wanted.items():  # a row group at a time: right even where the batch does not fit in memory_bytes
            images = self._group(*place)
            if out is None:
                out = np.empty((len(ids), *images.shape[1:]), np.uint8)
            positions, rows = zip(*uses, strict=True)
            out[list(positions)] = images[list(rows)]
        assert out is not None
        return out

    def _group(self, file: int, group: int) -> np.ndarray:
        place = (file, group)
        if place in self._cache:
            self._cache.move_to_end(place)
            return self._cache[place]
        with pq.ParquetFile(self._files[file]) as f:
            images = tables.decode_images(f.read_row_group(group, columns=["image"]).column(0))
        self._cache[place] = images
        self._held += images.nbytes
        while self._held > self.memory_bytes and len(self._cache) > 1:
            self._held -= self._cache.popitem(last=False)[1].nbytes
        return images


def draw_order(weights: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` indices into weights [N] (>= 0, not all 0), int64.

    Item i comes up count * w_i / sum(w) times in expectation. Systematic resampling in passes of N draws: in each pass
    an item comes floor or ceil of its expectation, in a random order. Pass p depends on (weights, seed, p) alone: a
    longer `count` only continues the sequence.
    """
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 1 or not len(weights) or not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
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
