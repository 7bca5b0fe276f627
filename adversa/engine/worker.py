"""What a worker of `map_parts` is: work made once, tasks carried out one after the other. The same
on every engine; Ray-free.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adversa.engine.task_queue import Task
from adversa.engine.tasks import Make, Work, do_part
from adversa.storage.path import StoragePath
from adversa.types import UserError


@dataclass(frozen=True)
class Failure:
    """position: in the lease, of a task whose work raised; reason: one line."""

    position: int
    reason: str
    trace: str


@dataclass(frozen=True)
class Returned:
    """What came of a lease, in sum; what is not among the failures is done. seconds: of work."""

    seconds: float
    evaluations: int
    failures: tuple[Failure, ...] = ()


class Sampler:
    """Before a lease come two calls: `place` answers as soon as there is room for the worker,
    `load` when its models are loaded.
    """

    def __init__(self) -> None:
        self.work: Work | None = None
        self.out: StoragePath = Path()

    def place(self) -> str:
        """The name of the machine."""
        return os.uname().nodename

    def load(self, make: Make, out: StoragePath, threads: int | None, place: int | None) -> None:
        """threads: of torch (None: leave it alone). place: the worker's number on its machine, to
        take cores of its own by.
        """
        if place is not None:  # before torch starts threads: they inherit it
            pin(place, threads or 1)
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self.out, self.work = out, make()

    def do(self, tasks: Sequence[Task]) -> Returned:
        """UserError of the work ends the call; other exceptions end their task only, if the device
        can still be used.
        """
        assert self.work is not None, "load comes first"
        seconds, evaluations, failures = 0.0, 0, []
        for i, task in enumerate(tasks):
            started = time.perf_counter()
            try:
                evaluations += self._do(self.work, task)
            except UserError:
                raise
            except Exception as e:
                if not _device_is_sound():
                    raise  # of no use any more: it is replaced
                failures.append(Failure(i, one_line(e), traceback.format_exc()))
            seconds += time.perf_counter() - started
        return Returned(seconds, evaluations, tuple(failures))

    def _do(self, work: Work, task: Task) -> int:
        if not task.trial:
            return do_part(work, task.part, self.out).evaluations
        with tempfile.TemporaryDirectory() as folder:
            return do_part(work, task.part, Path(folder)).evaluations


class Inline:
    """The Backend (worker_pool.py) of one worker in this process: every call is carried out when it
    is made.
    """

    def __init__(self, make: Make, out: StoragePath, threads: int) -> None:
        self.make, self.out, self.threads = make, out, threads
        self.numbers = itertools.count()
        self.answers: dict[int, object] = {}

    def _now(self, answer: object) -> int:
        call = next(self.numbers)
        self.answers[call] = answer
        return call

    def start(self) -> Sampler:
        return Sampler()

    def place(self, worker: Sampler) -> int:
        return self._now(worker.place())

    def load(self, worker: Sampler, place: int) -> int:
        worker.load(self.make, self.out, self.threads, None)
        return self._now(None)

    def do(self, worker: Sampler, tasks: Sequence[Task]) -> int:
        return self._now(worker.do(tasks))

    def wait(self, calls: Sequence[int], seconds: float) -> Sequence[int]:
        return calls

    def answer(self, call: int) -> object:
        return self.answers.pop(call)

    def stop(self, worker: Sampler) -> None:
        """It does nothing between calls."""


def one_line(error: BaseException, most: int = 300) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:most]


def _device_is_sound() -> bool:
    """After some errors (an illegal address, a failed assertion in a kernel) every later call of
    CUDA in a process fails.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def pin(place: int, threads: int) -> None:
    """Keep this process to `threads` cores: the `place`-th so many of those it may use, from the
    first again after the last.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores(sorted(os.sched_getaffinity(0)), place, threads))


def cores(usable: Sequence[int], place: int, threads: int) -> set[int]:
    return {usable[(place * threads + i) % len(usable)] for i in range(threads)}
