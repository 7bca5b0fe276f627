"""What a training sees, as a pure function of the step: ids drawn by weight, images read by id.

Ray Data and the local engine call the same `Feed.batch(step)`, so both give the same batches, and a training that resumes at
step k sees exactly what an undisturbed one sees from k on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from adversa import tables
from adversa.data.loader import ImageTable, draw_order

Batch = dict[str, Any]  # "id": list[str], "image": uint8 [B, H, W, 3], "label": int64 [B]


@dataclass(frozen=True)
class Feed:
    """`steps` batches drawn from the rows of a mix (tables.MIX), or every row of `folders` once, in order, where mix is None.

    balance b draws class c with probability proportional to (its weight)^(1 - b): 0 as they come, 1 every class equally often.
    """

    folders: tuple[Path, ...]
    batch_size: int
    mix: Path | None = None
    steps: int = 0
    balance: float = 0.0
    seed: int = 0

    def batches(self, start: int = 0) -> Iterator[Batch]:
        for step in range(start, self.count()):
            yield self.batch(step)

    def batch(self, step: int) -> Batch:
        return _open(self).batch(step)

    def count(self) -> int:
        """Number of batches."""
        return self.steps if self.mix is not None else _open(self).count()


class _Opened:
    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.images = ImageTable(list(feed.folders))
        if feed.mix is None:
            rows = [tables.read(f, ["id", "label"], tables.EXAMPLES) for f in feed.folders]
            self.ids = np.array([i for t in rows for i in t["id"].to_pylist()])
            self.labels = np.array([x for t in rows for x in t["label"].to_pylist()], dtype=np.int64)
            self.order = np.arange(len(self.ids))
        else:
            mix = tables.read(feed.mix, schema=tables.MIX)
            self.ids = np.array(mix["id"].to_pylist())
            self.labels = mix["label"].to_numpy().astype(np.int64)
            weights = balanced(mix["weight"].to_numpy(), self.labels, feed.balance)
            self.order = draw_order(weights, feed.steps * feed.batch_size, feed.seed)

    def count(self) -> int:
        return -(-len(self.order) // self.feed.batch_size)

    def batch(self, step: int) -> Batch:
        picked = self.order[step * self.feed.batch_size : (step + 1) * self.feed.batch_size]
        ids = self.ids[picked].tolist()
        return {"id": ids, "image": self.images.fetch(ids), "label": self.labels[picked]}


@lru_cache(maxsize=2)
def _open(feed: Feed) -> _Opened:
    """One opening a process: Ray Data's tasks share what earlier tasks of the same worker have read."""
    return _Opened(feed)


def balanced(weights: np.ndarray, labels: np.ndarray, balance: float) -> np.ndarray:
    """Weights [N] scaled within each class so that class c's total is proportional to (its total)^(1 - balance)."""
    totals = np.bincount(labels, weights=weights)
    scale = np.divide(1.0, totals**balance, out=np.zeros_like(totals), where=totals > 0)
    return weights * scale[labels]
