"""What runs on a training worker: the jobs of a launch, one after the other, each fed by its own
stream.

No torch here: the first stream starts while the job's modules are still being imported (torch,
timm: seconds).
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import ray.cloudpickle
import ray.train
from ray.train import Checkpoint

from adversa.distributed import stream
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
        selects = {i: Held(partial(_shard, f"select-{i}")) for i in todo if self.selects[i]}
        streams = {
            i: Ahead(partial(self._stream, i), selects[i].start if i in selects else _nothing)
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


class Ahead:
    """A stream whose start, and first batch, happen in a thread of their own from `start()` on;
    `then` is called after it.
    """

    def __init__(self, stream: Callable[[], Iterator[Batch]], then: Callable[[], None]) -> None:
        self.stream, self.then = stream, then
        self.first: list[Batch] = []
        self.batches: Iterator[Batch] = iter(())
        self.arrived = float("nan")
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()

    def _run(self) -> None:
        try:
            self.batches = self.stream()
            self.first = [batch for batch in [next(self.batches, None)] if batch is not None]
            self.arrived = time.time()
            self.then()
        except BaseException as e:  # raised where the first batch is asked for
            self.failure = e

    def __iter__(self) -> Iterator[Batch]:
        self.start()
        assert self.thread is not None
        self.thread.join()
        if self.failure is not None:
            raise self.failure
        yield from self.first
        self.first = []
        yield from self.batches

    def close(self) -> None:
        """End the stream, read to its end or not: Ray Data lets go of its blocks."""
        if self.thread is not None:
            self.thread.join()
        if isinstance(self.batches, Generator):
            self.batches.close()


class Held:
    """A stream that is read again and again: kept in memory after the first time where it is at
    most HELD_BYTES.

    start() reads it in a thread of its own, beside the training.
    """

    def __init__(self, stream: Callable[[], Iterator[Batch]], limit: int = HELD_BYTES) -> None:
        self.stream, self.limit = stream, limit
        self.kept: list[Batch] = []
        self.complete = False
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()

    def _run(self) -> None:
        held = 0
        try:
            for batch in self.stream():
                self.kept.append(batch)
                held += sum(getattr(v, "nbytes", 0) for v in batch.values())
                if held > self.limit:
                    self.kept = []
                    return
            self.complete = True
        except BaseException as e:  # raised where the batches are asked for
            self.failure = e

    def __call__(self) -> Iterator[Batch]:
        self.start()
        assert self.thread is not None
        self.thread.join()
        if self.failure is not None:
            raise self.failure
        return iter(self.kept) if self.complete else self.stream()


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
