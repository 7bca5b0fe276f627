"""Ray Data: work over parts, and batches streamed to training workers in an order fixed by the
recipe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
from ray.data import ActorPoolStrategy, DataContext, ExecutionOptions
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.train import DataConfig

from adversa.engine.batches import Batch, Feed
from adversa.engine.tasks import Done, Make, Part, Report, Work, do_part, missing
from adversa.storage.path import StoragePath
from adversa.storage.weights import committed_step
from adversa.types import UserError, share_of

# Uncompressed bytes of a block of training batches: large enough to pay for a task, small against
# any object store.
BLOCK_BYTES = 16 << 20


def ordered() -> ExecutionOptions:
    """Blocks leave in the order they were asked for, however fast each was made."""
    return ExecutionOptions(preserve_order=True)


def quiet(verbose: bool) -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = verbose
    context.enable_rich_progress_bars = False
    context.print_on_execution_start = verbose


def map_batches(
    make: Make,
    parts: Sequence[Part],
    out: StoragePath,
    report: Report,
    actors: int = 0,
    gpus: float = 0.0,
) -> list[Done]:
    """Each missing part as one row of a streaming dataset: read, work, commit happen on the worker;
    only counts come back.

    actors: a pool of so many actors at most, each asking for `gpus`, and `make()` is called once
    an actor. Ray ends the process of a task on a GPU with the task, so that every part would load
    its models anew. 0: tasks, in the workers that Ray keeps warm; `make()` is called once a worker.
    """
    todo, total = missing(parts, out), sum(p.rows for p in parts)
    finished = total - sum(p.rows for p in todo)
    report({"done": finished, "total": total, "unit": "image"})
    if not todo:
        return []
    dataset: ray.data.Dataset = ray.data.from_items(
        [{"part": p} for p in todo], override_num_blocks=len(todo)
    )
    if actors:
        dataset = dataset.map_batches(
            _PartTask,
            fn_constructor_args=(make, out),
            batch_size=1,
            num_cpus=1,
            num_gpus=gpus,
            compute=ActorPoolStrategy(min_size=1, max_size=min(actors, len(todo))),
        )
    else:
        dataset = dataset.map_batches(_PartTask(make, out), batch_size=None)
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

    What is fixable by the user comes home as a value: Ray Data would wrap the exception and lose
    which one it was.
    """

    def __init__(self, make: Make, out: StoragePath) -> None:
        self.make, self.out = make, out

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        try:
            work = made(self.make)
            done = [do_part(work, part, self.out) for part in batch["part"]]
        except UserError as e:
            return {"index": [0], "rows": [0], "seconds": [0.0], "error": [str(e)]}
        return {k: [getattr(d, k) for d in done] for k in ("index", "rows", "seconds")} | {
            "error": [""] * len(done)
        }


_made: dict[bytes, Work] = {}


def made(make: Make) -> Work:
    """What `make` makes, once a process: a warm worker keeps the last one, models loaded."""
    import ray.cloudpickle

    key: bytes = ray.cloudpickle.dumps(make)
    if key not in _made:
        _made.clear()
        _made[key] = make()
    return _made[key]


def feed_dataset(
    feed: Feed, start: int, row_bytes: int, world: int = 1, ranks: Sequence[int] | None = None
) -> ray.data.Dataset:
    """The shares of `ranks` (None: all `world` workers) of the feed's batches from step `start` on,
    as a streaming dataset.

    A row is one worker's share of one batch; a block holds rows of one worker. Blocks come in
    groups that cover the same steps, one a worker and all equally long: `streaming_split` with
    preserved order gives the next block to the split with the fewest rows, so it deals them out in
    turn, and split r gets worker r's rows, all of them and in order. `batches` checks that.

    row_bytes: of one image or latent, to size the blocks.
    """
    ranks, steps = tuple(range(world) if ranks is None else ranks), feed.count() - start
    assert steps > 0, f"no steps are left after {start}"
    length = max(1, min(steps, BLOCK_BYTES * world // max(1, feed.batch_size * row_bytes)))
    blocks = -(-steps // length) * len(ranks)
    dataset = ray.data.range(blocks, override_num_blocks=blocks)
    dataset = dataset.map_batches(_FeedTask(feed, start, length, ranks, world), batch_size=None)
    dataset.context.execution_options = ordered()
    dataset.context.custom_execution_callback_classes = [Pace]
    return dataset


class Pace(ExecutionCallback):
    """Makes Ray Data's scheduling loop take at least 50 ms a step.

    While a finished block waits for a training step to make room, the loop's wait returns at once
    and it spins: 70% of a core, which on two cores made training half as fast (benchmarks/LOG.md,
    2026-11-21).
    """

    SECONDS = 0.05

    def __init__(self) -> None:
        self.last = 0.0

    def on_execution_step(self, executor: Any) -> None:
        spare = self.last + self.SECONDS - time.monotonic()
        if spare > 0:
            time.sleep(spare)
        self.last = time.monotonic()


@dataclass(frozen=True)
class _FeedTask:
    """Runs on the task's worker: the number of a block to its rows. A short share is padded; `rows`
    says how much of it is real.
    """

    feed: Feed
    start: int
    length: int
    ranks: tuple[int, ...]
    world: int

    def __call__(self, blocks: dict[str, np.ndarray]) -> dict[str, Any]:
        asked: list[tuple[int, int]] = []
        for block in blocks["id"]:
            group, who = divmod(int(block), len(self.ranks))
            first = self.start + group * self.length
            asked += [
                (step, self.ranks[who])
                for step in range(first, min(first + self.length, self.feed.count()))
            ]
        shares = [self.feed.batch(step, rank, self.world) for step, rank in asked]
        size = max(
            len(range(self.feed.batch_size)[share_of(self.feed.batch_size, r, self.world)])
            for r in range(self.world)
        )
        columns = {
            k: np.stack([_pad(b[k], size) for b in shares])
            for k, v in shares[0].items()
            if isinstance(v, np.ndarray)
        }
        return columns | {
            "ids": np.array([" ".join(b["id"]) for b in shares]),
            "rows": np.array([len(b["id"]) for b in shares]),
            "size": np.array([b["size"] for b in shares]),
            "step": np.array([step for step, _ in asked]),
            "rank": np.array([rank for _, rank in asked]),
        }


def _pad(a: np.ndarray, size: int) -> np.ndarray:
    return (
        a
        if len(a) == size
        else np.concatenate([a, np.zeros((size - len(a), *a.shape[1:]), a.dtype)])
    )


def batches(shard: Any, rank: int = 0) -> Callable[[], Iterator[Batch]]:
    """The inverse on the training worker: rows of a dataset shard to its shares of the batches;
    each call streams them once.

    A batch has its `step`. A shard that holds another worker's rows, or not every step, stops the
    run.
    """

    def stream() -> Iterator[Batch]:
        expected = None
        for row in shard.iter_batches(batch_size=1, prefetch_batches=4):
            row = {k: v[0] for k, v in row.items()}
            step, whose, n = (int(row.pop(k)) for k in ("step", "rank", "rows"))
            expected = step if expected is None else expected
            assert (step, whose) == (expected, rank), (
                f"step {step} of worker {whose} instead of {expected} of {rank}"
            )
            expected += 1
            ids, size = str(row.pop("ids")), int(row.pop("size"))
            if n:
                yield {"id": ids.split(" "), "size": size, "step": step} | {
                    k: v[:n] for k, v in row.items()
                }

    return stream


class Streams(DataConfig):
    """The datasets of a launch, made anew for each start of its workers: from the step last
    committed, for as many as there are.

    Ray Train asks `configure` for one dataset at a time, in each start's own process, when the
    first worker asks for its shard; what it was given as datasets are placeholders. Training feeds
    are split among several workers (streaming_split). A select feed is short and read again and
    again: each worker has a stream of its own share.
    """

    def __init__(
        self, train: dict[str, tuple[Feed, StoragePath]], select: dict[str, Feed], row_bytes: int
    ) -> None:
        """train: feeds, and the folders of their trainings. row_bytes: of one image."""
        super().__init__(datasets_to_split=list(train), execution_options=ordered())
        self.train, self.select, self.row_bytes = train, select, row_bytes

    def placeholders(self) -> dict[str, ray.data.Dataset | Callable[[], ray.data.Dataset]]:
        nothing = ray.data.range(1)
        return dict.fromkeys([*self.train, *self.select], nothing)

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: Any,
        worker_node_ids: Any,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        shards: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name in datasets:
            if name in self.train:
                feed, out = self.train[name]
                dataset = feed_dataset(feed, committed_step(out), self.row_bytes, world_size)
                # A split is read through an actor, which takes a second to start.
                splits = (
                    [dataset.iterator()]
                    if world_size == 1
                    else dataset.streaming_split(world_size, equal=True)
                )
            else:
                feed = self.select[name]
                splits = [
                    feed_dataset(feed, 0, self.row_bytes, world_size, [r]).iterator()
                    for r in range(world_size)
                ]
            for shard, split in zip(shards, splits, strict=True):
                shard[name] = split
        return shards
