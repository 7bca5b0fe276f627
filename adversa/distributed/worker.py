"""What runs on a training worker: the jobs of a launch, one after the other, each fed by its own
stream.

No torch here: the first stream starts while the job's modules are still being imported (torch,
timm: seconds).
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import ray.cloudpickle
import ray.train
from ray.train import Checkpoint

from adversa.distributed import stream
from adversa.distributed.background import Background
from adversa.engine.batches import Batch
from adversa.engine.fit import do_job
from adversa.engine.interface import FitJob
from adversa.run.environment import cpus
from adversa.run.step_folder import is_finished
from adversa.storage.path import StoragePath, storage_path
from adversa.storage.weights import committed_step
from adversa.types import UserError

# in Ray Train's checkpoints: which folder holds the training state, and of which step
POINTER = "pointer.json"
REPORT_SECONDS = (
    2.0  # between two reports: each waits until Ray Train's controller has taken the one before
)
HELD_BYTES = 128 << 20  # a select role up to this size is streamed once and kept


class Loop:
    """The training worker's function: trains every job that is not finished; called anew when
    workers died and were replaced.
    """

    def __init__(self, jobs: Sequence[FitJob], threads: int | None, home: Path) -> None:
        self.outs = [job.out for job in jobs]
        self.steps = [job.feed.count() for job in jobs]
        self.selects = [job.select is not None for job in jobs]
        # unpacked on the worker after the first stream has started
        self.packed: bytes = ray.cloudpickle.dumps(list(jobs))
        self.threads, self.home = threads, home

    def __call__(self) -> dict[str, float]:
        """Returns when (time.time) this start of the workers began, had its modules, and had its
        first batch.
        """
        marks = {"began": time.time()}
        if self.home.is_dir():
            os.chdir(
                self.home
                # Ray Train moves its workers elsewhere; relative paths in a configuration mean the
                # user's folder
            )
        self._check_state()
        todo = [i for i, out in enumerate(self.outs) if not is_finished(out)]
        if not todo:  # the workers before these died after their last manifest
            return marks
        context = ray.train.get_context()
        selects = {i: BatchCache(partial(_shard, f"select-{i}")) for i in todo if self.selects[i]}
        streams = {
            i: Prefetcher(partial(self._stream, i), selects[i].start if i in selects else _nothing)
            for i in todo
        }
        for i in todo[:1]:
            streams[i].start()
        jobs: list[FitJob] = ray.cloudpickle.loads(self.packed)
        threads = self.threads or max(1, cpus() // context.get_local_world_size())
        _choose_device()
        marks["imported"] = time.time()
        for i, after in zip(todo, [*todo[1:], None], strict=True):
            last = _nothing if after is None else streams[after].start
            batches = fed(streams[i], self.steps[i], jobs[i].resume(self.outs[i]), last)
            do_job(jobs[i], batches, selects.get(i, _none), threads, Reports(self.outs[i]))
            streams[i].close()
            marks.setdefault("first batch", streams[i].arrived)
        return marks

    def _stream(self, i: int) -> Iterator[Batch]:
        """Batches from the step last committed on: what Streams.configure made for this start of
        the workers.
        """
        done = committed_step(self.outs[i]) >= self.steps[i]  # then only the manifest is missing
        return iter(()) if done else _shard(f"train-{i}")

    def _check_state(self) -> None:
        """What Ray Train saw committed must be there: a worker on a node that sees other files
        would start from nothing.
        """
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            pointer = json.loads((Path(folder) / POINTER).read_text())
        out, step = storage_path(pointer["out"]), pointer["step"]
        if not is_finished(out) and (found := committed_step(out)) < step:
            raise UserError(
                f"{out} held the training state of step {step} and has that of step {found} now: "
                "put the run folder where every node sees the same files, and leave it "
                "alone while a run goes on"
            )


class Reports:
    """Tells Ray Train of committed steps: a checkpoint that points to the training state in the
    job's own folder.
    """

    def __init__(self, out: StoragePath) -> None:
        self.out, self.last = out, float("-inf")

    def __call__(self, step: int) -> None:
        from adversa.training import process_group

        due = time.monotonic() - self.last >= REPORT_SECONDS
        if not process_group.all_gather_object(due)[
            0
        ]:  # a report takes every worker: the main process decides
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / POINTER).write_text(json.dumps({"out": str(self.out), "step": step}))
            checkpoint = (
                Checkpoint.from_directory(folder) if process_group.is_main_process() else None
            )
            ray.train.report({"out": str(self.out), "step": step}, checkpoint=checkpoint)
        self.last = time.monotonic()


class Prefetcher:
    """A stream whose start, and first batch, happen in a thread of their own from `start()` on;
    `then` is called after it.
    """

    def __init__(self, stream: Callable[[], Iterator[Batch]], then: Callable[[], None]) -> None:
        self.stream, self.then = stream, then
        self.batches: Iterator[Batch] = iter(())
        self.arrived = float("nan")
        self.first = Background(self._begin)

    def start(self) -> None:
        self.first.start()

    def _begin(self) -> list[Batch]:
        self.batches = self.stream()
        first = list(itertools.islice(self.batches, 1))
        self.arrived = time.time()
        self.then()
        return first

    def __iter__(self) -> Iterator[Batch]:
        first = self.first.result()
        yield from first
        first.clear()  # not kept for as long as the training
        yield from self.batches

    def close(self) -> None:
        """End the stream, read to its end or not: Ray Data lets go of its blocks."""
        if self.first.thread.ident is not None:
            self.first.thread.join()
        if isinstance(self.batches, Generator):
            self.batches.close()


class BatchCache:
    """A stream that is read again and again: kept in memory after the first time where it is at
    most HELD_BYTES.

    start() reads it in a thread of its own, beside the training.
    """

    def __init__(self, stream: Callable[[], Iterator[Batch]], limit: int = HELD_BYTES) -> None:
        self.stream, self.limit = stream, limit
        self.kept = Background(self._read)

    def start(self) -> None:
        self.kept.start()

    def _read(self) -> list[Batch] | None:
        """None where it is too large."""
        kept, held = [], 0
        for batch in self.stream():
            kept.append(batch)
            held += sum(getattr(v, "nbytes", 0) for v in batch.values())
            if held > self.limit:
                return None
        return kept

    def __call__(self) -> Iterator[Batch]:
        kept = self.kept.result()
        return self.stream() if kept is None else iter(kept)


def fed(
    stream: Iterable[Batch], steps: int, start: int, last: Callable[[], None]
) -> Iterator[Batch]:
    """The stream's batches of the steps `start` ... `steps` - 1; `last` is called before the last
    is given.

    The stream may begin earlier: the file that says where it begins is written after the training
    state.
    """
    expected = start
    for batch in stream:
        if batch["step"] < start:
            continue
        assert batch["step"] == expected, (
            f"the stream gave step {batch['step']}, the training is at step {expected}"
        )
        expected += 1
        if expected == steps:
            last()
        yield batch


def _nothing() -> None:
    pass


def _none() -> Iterator[Batch]:
    return iter(())


def _shard(name: str) -> Iterator[Batch]:
    rank = ray.train.get_context().get_world_rank()
    return stream.batches(ray.train.get_dataset_shard(name), rank)()


def _choose_device() -> None:
    import torch

    if torch.cuda.is_available():
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
