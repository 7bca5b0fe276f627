"""Images (or latents) by id from Parquet, for training: only what a batch needs is decoded, and
once.
"""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from adversa.storage import files, tables
from adversa.storage.path import StoragePath
from adversa.types import UserError


class ImageTable:
    """Random access by id to the images of folders of `tables.EXAMPLES` or `tables.SYNTHETIC`, or
    to the latents of one.

    A row group is decoded whole when one of its images is first asked for, and kept in a temporary
    file, least recently used dropped first, up to `disk_bytes` (at least one stays). So the memory
    of the process does not grow with the images; the system's page cache holds what is hot. Ids
    must be unique over all folders.
    """

    def __init__(
        self, folders: Sequence[StoragePath], disk_bytes: int = 16 << 30, column: str = "image"
    ) -> None:
        """column: image or latent."""
        self.disk_bytes, self.column = disk_bytes, column
        self._decode = {"image": tables.decode_images, "latent": tables.decode_latents}[column]
        paths = [path for folder in folders for path in tables.parts(folder)]
        self._groups: list[tuple[StoragePath, int]] = []
        found, counts = [np.zeros(0, "S1")], []
        for path in paths:
            for group, ids in enumerate(_ids(path)):
                self._groups.append((path, group))
                found.append(ids)
                counts.append(len(ids))
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(
            np.int64
        )  # first row of each group, rows counted over all
        ids = np.concatenate(found)
        self._order = np.argsort(ids, kind="stable")
        self._ids = ids[self._order]
        twice = np.flatnonzero(self._ids[1:] == self._ids[:-1])
        if len(twice):
            path, id_ = (
                self._groups[self._group_of(self._order[twice[:1] + 1])[0]][0],
                self._ids[twice[0]].decode(),
            )
            raise UserError(
                f"{path} holds the id {id_} a second time; delete the folder's parts and run again"
            )
        self._slots: OrderedDict[int, int] = (
            OrderedDict()
        )  # group -> its place in the file, in units of the largest group
        self._file: BinaryIO | None = None
        self._shape: tuple[int, ...] = ()
        self._dtype = np.dtype(np.uint8)

    def fetch(self, ids: Sequence[str]) -> np.ndarray:
        """uint8 [B, H, W, 3] (of latents: float16 [B, views, C, side, side]) in the order of `ids`
        (an id may come twice).

        All of one size. UserError where one is missing.
        """
        if not len(ids):
            raise ValueError("fetch needs at least one id")
        rows = self._rows(ids)
        groups = self._group_of(rows)
        out: np.ndarray | None = None
        for group in dict.fromkeys(
            groups.tolist()
        ):  # one at a time: right even where the batch does not fit in disk_bytes
            uses = np.flatnonzero(groups == group)
            images = self._read(group, rows[uses] - self._starts[group])
            if out is None:
                out = np.empty((len(ids), *images.shape[1:]), images.dtype)
            out[uses] = images
        assert out is not None
        return out

    def _rows(self, ids: Sequence[str]) -> np.ndarray:
        wanted = np.array([i.encode() for i in ids])
        at = np.searchsorted(self._ids, wanted)
        at[at == len(self._ids)] = 0
        missing = np.flatnonzero(self._ids[at] != wanted) if len(self._ids) else [0]
        if len(missing):
            where = self._groups[0][0].parent if self._groups else "an empty table"
            raise UserError(f"no image with the id {ids[missing[0]]} in {where}")
        return self._order[at]

    def _group_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, rows, side="right") - 1

    def _read(self, group: int, rows: np.ndarray) -> np.ndarray:
        """Images of the rows (counted within the group)."""
        if group not in self._slots:
            path, number = self._groups[group]
            with tables.opened(path) as f:
                images = self._decode(f.read_row_group(number, columns=[self.column]).column(0))
            self._keep(group, np.ascontiguousarray(images))
            found: np.ndarray = images[rows]
            return found
        self._slots.move_to_end(group)
        assert self._file is not None
        size, start = self._size(), self._slots[group] * self._slot_bytes()
        data = b"".join(
            os.pread(self._file.fileno(), size, start + row * size) for row in rows.tolist()
        )
        return np.frombuffer(data, self._dtype).reshape(len(rows), *self._shape)

    def _keep(self, group: int, images: np.ndarray) -> None:
        folder = Path(tempfile.gettempdir())
        with files.writing(folder):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (it lives as long as the table)
                self._shape, self._dtype = images.shape[1:], images.dtype
            if images.shape[1:] != self._shape:
                raise UserError(
                    f"{self._groups[group][0]} has images of {images.shape[1:]}, others "
                    f"{self._shape}; prepare them anew"
                )
            slot = len(self._slots)
            if slot and (slot + 1) * self._slot_bytes() > self.disk_bytes:
                slot = self._slots.popitem(last=False)[1]
            start, view = slot * self._slot_bytes(), images.data.cast("B")
            while len(view):  # a write may be cut short
                done = os.pwrite(self._file.fileno(), view, start)
                start, view = start + done, view[done:]
        self._slots[group] = slot

    def _size(self) -> int:
        return int(np.prod(self._shape)) * self._dtype.itemsize

    def _slot_bytes(self) -> int:
        return int(np.diff(self._starts).max()) * self._size()


def _ids(path: StoragePath) -> Iterator[np.ndarray]:
    """The ids of each row group, as bytes: a tenth of what a dict of strings takes."""
    with tables.opened(path) as file:
        key = "id" if "id" in file.schema_arrow.names else "request_id"
        for group in range(file.num_row_groups):
            yield np.array(
                [
                    i.encode()
                    for i in file.read_row_group(group, columns=[key]).column(0).to_pylist()
                ],
                dtype="S",
            )


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
