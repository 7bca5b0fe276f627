"""What a training sees, as a pure function of the step: ids drawn by weight, images read by id.

Ray Data and the local engine call the same `Feed.batch(step)`, so both give the same batches, and a
training that resumes at step k sees exactly what an undisturbed one sees from k on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from adversa.data.loader import ImageTable, draw_order
from adversa.storage import files, tables
from adversa.storage.path import StoragePath
from adversa.types import Floats, share_of

# "id": list[str], "label": int64 [B], and "image": uint8 [B, H, W, 3] or "latent": float32 [B, C,
# h, w]; "size": int, the rows of the whole batch, of which these B are one worker's
Batch = dict[str, Any]
STATS = "stats.json"  # beside latents: their mean and standard deviation, channel by channel


@dataclass(frozen=True)
class Feed:
    """`steps` batches drawn from the rows of a mix (tables.MIX), or every row of `folders` once, in
    order, where mix is None.

    balance b draws class c with probability proportional to (its weight)^(1 - b): 0 as they come, 1
    every class equally often. latent_std: the folders hold latents (tables.latents_schema), given
    with zero mean and this standard deviation in each channel, one of each row's views drawn by the
    seed; None: they hold images.
    """

    folders: tuple[StoragePath, ...]
    batch_size: int
    mix: StoragePath | None = None
    steps: int = 0
    balance: float = 0.0
    seed: int = 0
    latent_std: float | None = None

    def batches(self, start: int = 0) -> Iterator[Batch]:
        for step in range(start, self.count()):
            yield self.batch(step)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The step's batch, or worker `rank`'s rows of it: only those are read."""
        return _open(self).batch(step, rank, world)

    def count(self) -> int:
        """Number of batches."""
        return self.steps if self.mix is not None else _open(self).count()


class _Opened:
    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.stats = None if feed.latent_std is None else files.read_json(feed.folders[0] / STATS)
        if feed.mix is None:
            rows = [tables.read(f, ["id", "label"], tables.EXAMPLES) for f in feed.folders]
            self.ids = _bytes([i for t in rows for i in t["id"].to_pylist()])
            self.labels = np.array(
                [x for t in rows for x in t["label"].to_pylist()], dtype=np.int64
            )
            self.order = np.arange(len(self.ids))
        else:
            mix = tables.read(feed.mix, schema=tables.MIX)
            self.ids = _bytes(mix["id"].to_pylist())
            self.labels = mix["label"].to_numpy().astype(np.int64)
            weights = balanced(mix["weight"].to_numpy(), self.labels, feed.balance)
            self.order = draw_order(weights, feed.steps * feed.batch_size, feed.seed)

    @cached_property
    def images(self) -> ImageTable:
        """Opened by those who read batches; to count them takes no image."""
        return ImageTable(self.feed.folders, "image" if self.feed.latent_std is None else "latent")

    def count(self) -> int:
        return -(-len(self.order) // self.feed.batch_size)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        picked = self.order[step * self.feed.batch_size : (step + 1) * self.feed.batch_size]
        rows = share_of(len(picked), rank, world)
        if (
            rows.start == rows.stop
        ):  # of a last batch too short for all workers: arrays of no rows, in the usual shape
            return {k: v if k == "size" else v[:0] for k, v in self.batch(step, 0, 1).items()}
        ids = [i.decode() for i in self.ids[picked[rows]].tolist()]
        pixels = self.feed.latent_std is None
        found = (
            {"image": self.images.fetch(ids)}
            if pixels
            else {"latent": self._latents(ids, step, len(picked), rows)}
        )
        return {"id": ids, "label": self.labels[picked[rows]], "size": len(picked)} | found

    def _latents(self, ids: list[str], step: int, size: int, rows: slice) -> np.ndarray:
        assert self.stats is not None and self.feed.latent_std is not None, self.feed
        views = self.images.fetch(ids)
        drawn = np.random.default_rng([self.feed.seed, step]).integers(0, views.shape[1], size)[
            rows
        ]
        mean, std = (np.array(self.stats[k], np.float32)[:, None, None] for k in ("mean", "std"))
        return (views[np.arange(len(ids)), drawn].astype(np.float32) - mean) * (
            self.feed.latent_std / std
        )


def _bytes(ids: list[str]) -> np.ndarray:
    """A quarter of what numpy takes for the same as text."""
    return np.array([i.encode() for i in ids], dtype="S")


@lru_cache(maxsize=2)
def _open(feed: Feed) -> _Opened:
    """One opening a process: Ray Data's tasks share what earlier tasks of the same worker have
    read.
    """
    return _Opened(feed)


def close() -> None:
    """Let go of what this process has opened: its folders may be made anew."""
    _open.cache_clear()


def balanced(weights: np.ndarray, labels: np.ndarray, balance: float) -> Floats:
    """Weights [N] scaled within each class so that class c's total is proportional to (its
    total)^(1 - balance).
    """
    totals = np.bincount(labels, weights=weights)
    scale = np.divide(1.0, totals**balance, out=np.zeros_like(totals), where=totals > 0)
    found: Floats = weights * scale[labels]
    return found
