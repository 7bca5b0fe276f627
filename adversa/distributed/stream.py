"""Ray Data: work over parts, and batches streamed to training workers in an order fixed by the recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
from ray.data import DataContext, ExecutionOptions
from ray.data._internal.execution.execution_callback import ExecutionCallback

from adversa.loop.engine import Done, Make, Part, Report, Work, do_part, missing
from adversa.loop.feed import Batch, Feed
from adversa.types import UserError

# Uncompressed bytes of a block of training batches: large enough to pay for a task, small against any object store.
BLOCK_BYTES = 16 << 20


def ordered() -> ExecutionOptions:
    """Blocks leave in the order they were asked for, however fast each was made."""
    return ExecutionOptions(preserve_order=True)


def quiet(verbose: bool) -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = verbose
    context.enable_rich_progress_bars = False
    context.print_on_execution_start = verbose


def map_batches(make: Make, parts: Sequence[Part], out: Path, report: Report, options: dict[str, Any]) -> list[Done]:
    """Each missing part as one row of a streaming dataset: read, work, commit happen in the task; only counts come back.

    options: of each task (num_gpus). Tasks, not actors: they run in the workers that Ray keeps warm, and `make()` is called
    once a worker.
    """
    todo, total = missing(parts, out), sum(p.rows for p in parts)
    finished = total - sum(p.rows for p in todo)
    report({"done": finished, "total": total, "unit": "image"})
    if not todo:
        return []
    dataset = ray.data.from_items([{"part": p} for p in todo], override_num_blocks=len(todo))
    dataset = dataset.map_batches(_PartTask(make, out), batch_size=None, **options)
    done = []
    for row in dataset.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        done.append(Done(int(row["index"]), int(row["rows"]), float(row["seconds"])))
        finished += done[-1].rows
        report({"done": finished, "total": total, "unit": "image"})
    return sorted(done, key=lambda d: d.index)


class _PartTask:
    """Runs on the worker: a batch of parts to a batch of counts.

    What the user can mend comes home as a value: Ray Data would wrap the exception and lose which one it was.
    """

    def __init__(self, make: Make, out: Path) -> None:
        self.make, self.out = make, out

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        try:
            work = made(self.make)
            done = [do_part(work, part, self.out) for part in batch["part"]]
        except UserError as e:
            return {"index": [0], "rows": [0], "seconds": [0.0], "error": [str(e)]}
        return {k: [getattr(d, k) for d in done] for k in ("index", "rows", "seconds")} | {"error": [""] * len(done)}


_made: dict[bytes, Work] = {}


def made(make: Make) -> Work:
    """What `make` makes, once a process: a warm worker keeps the last one, models loaded."""
    import ray.cloudpickle

    key = ray.cloudpickle.dumps(make)
    if key not in _made:
        _made.clear()
        _made[key] = make()
    return _made[key]


def training_dataset(feed: Feed, start: int, image_bytes: int) -> ray.data.Dataset:
    """The feed's batches from step `start` on, one row a batch, as a streaming dataset; its order is the feed's."""
    steps = feed.count() - start
    rows = max(1, BLOCK_BYTES // max(1, feed.batch_size * image_bytes))
    dataset = ray.data.range(steps, override_num_blocks=-(-steps // min(rows, steps)))
    dataset = dataset.map_batches(_FeedTask(feed, start), batch_size=None)
    dataset.context.custom_execution_callback_classes = [Pace]
    return dataset


class Pace(ExecutionCallback):
    """Makes Ray Data's scheduling loop take at least 20 ms a step.

    While a finished block waits for a training step to make room, the loop's wait returns at once and it spins: 70% of a core,
    which on two cores made training half as fast (benchmarks/LOG.md, 2026-11-21).
    """

    SECONDS = 0.02

    def __init__(self) -> None:
        self.last = 0.0

    def on_execution_step(self, executor: Any) -> None:
        spare = self.last + self.SECONDS - time.monotonic()
        if spare > 0:
            time.sleep(spare)
        self.last = time.monotonic()


class _FeedTask:
    """Runs on the worker: step numbers to whole batches. A short last batch is padded; `size` says how much of it is real."""

    def __init__(self, feed: Feed, start: int) -> None:
        self.feed, self.start = feed, start

    def __call__(self, steps: dict[str, np.ndarray]) -> dict[str, Any]:
        batches = [self.feed.batch(self.start + int(i)) for i in steps["id"]]
        size = self.feed.batch_size
        return {
            "image": np.stack([_pad(b["image"], size) for b in batches]),
            "label": np.stack([_pad(b["label"], size) for b in batches]),
            "ids": np.array([" ".join(b["id"]) for b in batches]),
            "size": np.array([len(b["id"]) for b in batches]),
        }


def _pad(a: np.ndarray, size: int) -> np.ndarray:
    return a if len(a) == size else np.concatenate([a, np.zeros((size - len(a), *a.shape[1:]), a.dtype)])


def batches(shard: Any) -> Callable[[], Iterator[Batch]]:
    """The inverse on the training worker: rows of a dataset shard to batches; each call streams it once."""

    def stream() -> Iterator[Batch]:
        for row in shard.iter_batches(batch_size=1, prefetch_batches=4):
            n = int(row["size"][0])
            yield {"id": str(row["ids"][0]).split(" "), "image": row["image"][0][:n], "label": row["label"][0][:n]}

    return stream
