"""The engine that runs everything in this process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from adversa.engine import batches
from adversa.engine.batches import Batch
from adversa.engine.fit import do_job, unfinished
from adversa.engine.interface import FitJob, Trial
from adversa.engine.tasks import (
    Done,
    Make,
    Name,
    Part,
    Report,
    Share,
    do_part,
    missing,
    row_name,
)
from adversa.engine.trials import TrialQueue, in_turn
from adversa.engine.worker import Inline
from adversa.engine.worker_pool import work_off
from adversa.run.control import NULL_HANDLE, RunHandle
from adversa.storage.path import StoragePath

if TYPE_CHECKING:
    from adversa.training.precision import Hardware


class LocalEngine:
    """Everything in this process, one part after the other: for tests, for the debugger, and where
    Ray cannot run.
    """

    name = "local"
    handle: RunHandle = NULL_HANDLE

    def __init__(
        self,
        sampler_threads: int = 1,
        training_threads: int | None = None,
        listen: Report = lambda _: None,
    ) -> None:
        """listen: hears the progress of every training."""
        self.sampler_threads, self.training_threads, self.listen = (
            sampler_threads,
            training_threads,
            listen,
        )

    def silent(self) -> LocalEngine:
        """The same, and nobody listens."""
        found = LocalEngine(self.sampler_threads, self.training_threads)
        found.handle = self.handle
        return found

    def tasks(self, model: bool = False) -> int:
        return 1

    def samplers(self) -> int:
        return 1

    def map_batches(
        self,
        make: Make,
        parts: Sequence[Part],
        out: StoragePath,
        report: Report,
        model: bool = False,
    ) -> list[Done]:
        todo = missing(parts, out)
        rows = sum(p.rows for p in parts)
        finished = rows - sum(p.rows for p in todo)
        report({"done": finished, "total": rows, "unit": "image"})
        done: list[Done] = []
        work = make() if todo else None
        for part in todo:
            assert work is not None
            done.append(do_part(work, part, out))
            finished += part.rows
            report({"done": finished, "total": rows, "unit": "image"})
        return done

    def map_parts(
        self,
        make: Make,
        parts: Sequence[Part],
        out: StoragePath,
        report: Report,
        name: Name = row_name,
    ) -> list[Share]:
        import torch

        before = torch.get_num_threads()
        try:  # one try: in this process a part that fails fails again
            return work_off(
                Inline(make, out, self.sampler_threads), parts, out, report, self.samplers, 1, name
            )
        finally:
            torch.set_num_threads(before)

    def fit(self, jobs: Sequence[FitJob]) -> None:
        batches.close()  # of another run in this process, whose folder had the same name
        for job in unfinished(jobs, self.handle):
            self.handle.poll()
            stream = job.feed.batches(job.resume(job.out))
            select = job.select.batches if job.select is not None else _no_select
            do_job(job, stream, select, self.training_threads, listen=self.listen)

    def search(self, trials: Sequence[Trial], report: Report) -> None:
        queue = TrialQueue(trials)
        for _ in in_turn(queue, self, report):
            self.handle.poll()
        queue.settle()

    def hardware(self) -> Hardware:
        from adversa.training.precision import hardware

        return hardware()

    def close(self) -> None:
        """Nothing is held between calls."""


def _no_select() -> Iterable[Batch]:
    raise AssertionError("this job has no select role")
