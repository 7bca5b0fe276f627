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
from dataclasses import dataclass, field
from pathlib import Path

from adversa.engine.task_queue import Task
from adversa.engine.tasks import Make, Work, do_part
from adversa.storage.path import StoragePath
from adversa.types import UserError


@dataclass(frozen=True)
class Failure:
    """A task whose work raised. position: in the lease; reason: one line; rows: of the part, those
    that raise by themselves, and why; committed: the part is written, without those rows.
    """

    position: int
    reason: str
    trace: str
    rows: dict[int, str] = field(default_factory=dict)
    committed: bool = False


@dataclass(frozen=True)
class Returned:
    """What came of a lease, in sum; what is not among the failures is done as a whole. seconds: of
    work.
    """

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
        """UserError of the work ends the call. Of a part that raises anything else, every row is
        tried by itself, and the part is committed without those that raise; it fails where that
        does not help.
        """
        started, evaluations, failures = time.perf_counter(), 0, []
        for i, task in enumerate(tasks):
            found, bad = self._attempt(task), {}
            if isinstance(found, Exception):
                error, rows = found, task.part.wanted
                if not task.trial and len(rows) > 1:
                    tried = {r: self._attempt(Task(task.part.only([r]), trial=True)) for r in rows}
                    bad = {r: one_line(e) for r, e in tried.items() if isinstance(e, Exception)}
                    if len(bad) < len(rows):
                        found = self._attempt(Task(task.part.without(bad)))
                committed = not isinstance(found, Exception)
                trace = "".join(traceback.format_exception(error))
                failures.append(Failure(i, one_line(error), trace, bad, committed))
            evaluations += 0 if isinstance(found, Exception) else found
        return Returned(time.perf_counter() - started, evaluations, tuple(failures))

    def _attempt(self, task: Task) -> int | Exception:
        """Evaluations of the denoiser, or what the work raised. Raises UserError, and what leaves
        the device of no use any more: the worker is replaced.
        """
        assert self.work is not None, "load comes first"
        try:
            if not task.trial:
                return do_part(self.work, task.part, self.out).evaluations
            with tempfile.TemporaryDirectory() as folder:
                return do_part(self.work, task.part, Path(folder)).evaluations
        except UserError:
            raise
        except Exception as e:
            if not _device_is_sound():
                raise
            return e


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
