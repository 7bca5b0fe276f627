"""The one seam between the cycle and where it runs: `Engine`, and the engine that runs everything in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from adversa import control, runs
from adversa.loop.crew import work_off
from adversa.loop.feed import Batch, Feed
from adversa.loop.parts import Done, Make, Name, Part, Report, Share, do_part, missing, row_name
from adversa.loop.parts import Work as Work
from adversa.loop.sampler import Inline
from adversa.loop.search import Board, Trial, in_turn
from adversa.types import UserError
from adversa.weights import drop_checkpoint, read_model


@dataclass(frozen=True)
class FitJob:
    """One training: `fit(batches, out=, report=, threads=, committed=[, select=])` writes a model folder.

    Batches start at `resume(out)`; metrics["steps"] of what it returns were done. committed(step): a training state is on disk.
    """

    out: Path
    recipe: runs.Recipe
    fit: Callable[..., dict[str, Any]]
    resume: Callable[[Path], int]
    feed: Feed
    select: Feed | None = None


class Engine(Protocol):
    """Where work runs. Every method returns when its work is done and raises UserError for what a user can mend."""

    name: str

    def map_batches(self, make: Make, parts: Sequence[Part], out: Path, report: Report, model: bool = False) -> list[Done]:
        """Stateless work over data, each part once (Ray Data). model: it holds a model, and wants a GPU where there is one."""
        ...

    def map_parts(self, make: Make, parts: Sequence[Part], out: Path, report: Report, name: Name = row_name) -> list[Share]:
        """Long work with a loaded model on a pool of workers that may die (Ray actors). What each worker did comes back.

        A row that fails every time is given up: its part is worked on once more, with the row in `Part.skip`. name: of such a
        row. RuntimeError where too many fail (leases.py).
        """
        ...

    def fit(self, jobs: Sequence[FitJob]) -> None:
        """Train each job that is not finished, in order (Ray Train fed by Ray Data)."""
        ...

    def search(self, trials: Sequence[Trial], report: Report) -> None:
        """Do every trial that is not finished, as many at a time as there are lanes (Ray Tune). UserError where some failed."""
        ...

    def tasks(self, model: bool = False) -> int:
        """How many parts `map_batches` does at the same time."""
        ...

    def samplers(self) -> int:
        """How many parts `map_parts` does at the same time."""
        ...

    def close(self) -> None: ...


def do_job(
    job: FitJob,
    batches: Iterable[Batch],
    select: Callable[[], Iterable[Batch]],
    threads: int | None,
    committed: Callable[[int], None] = lambda _: None,
    listen: Report = lambda _: None,
) -> None:
    """Run one training and mark it complete: the same code on every engine, on the worker, so that a finished job stays so.

    Of several workers each runs it on its rows of the batches; the lead alone writes. `rows` counts whole batches.
    threads: of torch; None: all CPUs that the worker may use. Another number of threads or workers gives other last bits,
    so both are recorded (the workers in progress.json as well: a group may shrink). committed: called on every worker with the step
    after each committed training state. listen: told what progress.json is told.
    """
    from adversa import workers  # torch

    started_at = job.resume(job.out)
    if len(set(at := workers.everyones((str(job.out), started_at)))) > 1:
        raise UserError(f"the workers see different files (folder, step: {at}); put --run-dir where every node sees the same")
    progress = runs.Progress(job.out)
    threads = threads or runs.cpus()
    optional = {} if job.select is None else {"select": select}
    with runs.writing(job.out):
        waited = Waited(batches)
        count = workers.world()
        report = partial(_tell, progress, listen, count) if workers.lead() else _tell_nobody
        metrics = job.fit(waited, out=job.out, report=report, threads=threads, committed=committed, **optional)
        rows = started_at * job.feed.batch_size + waited.images
        assert rows == metrics["steps"] * job.feed.batch_size, f"{job.out} saw {rows} images in {metrics['steps']} steps"
        seconds = progress.elapsed
        compute = seconds - waited.seconds
        if workers.lead():
            _, _, fingerprint = read_model(job.out)
            runs.finish(
                job.out, job.recipe, fingerprint=fingerprint, metrics=metrics, rows=rows, threads=threads, workers=count,
                seconds=seconds, compute_seconds=compute, device_seconds=compute * count, data_wait_seconds=waited.seconds,
            )  # fmt: skip
            drop_checkpoint(job.out)
        workers.barrier()


def _tell(progress: Report, listen: Report, workers: int, state: dict[str, Any]) -> None:
    progress({**state, "workers": workers})
    listen(state)


def _tell_nobody(state: dict[str, Any]) -> None:
    """The progress of a worker that is not the lead."""


class Waited:
    """An iterable of batches that adds up the seconds its reader waits for it, and the images of all workers it stands for."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches, self.seconds, self.images = batches, 0.0, 0

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.batches)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - started
            if batch is None:
                return
            self.images += batch.get("size", len(batch["id"]))
            yield batch


def unfinished(jobs: Sequence[FitJob]) -> list[FitJob]:
    """The jobs to do; each one's recipe is checked and written first."""
    left = []
    control.reins().look()
    for job in jobs:
        if runs.begin(job.out, job.recipe):
            drop_checkpoint(job.out)  # killed between the manifest and this
        else:
            left.append(job)
    return left


class LocalEngine:
    """Everything in this process, one part after the other: for tests, for the debugger, and where Ray cannot run."""

    name = "local"

    def __init__(self, sampler_threads: int = 1, training_threads: int | None = None, listen: Report = lambda _: None) -> None:
        """listen: hears the progress of every training."""
        self.sampler_threads, self.training_threads, self.listen = sampler_threads, training_threads, listen

    def silent(self) -> LocalEngine:
        """The same, and nobody listens."""
        return LocalEngine(self.sampler_threads, self.training_threads)

    def tasks(self, model: bool = False) -> int:
        return 1

    def samplers(self) -> int:
        return 1

    def map_batches(self, make: Make, parts: Sequence[Part], out: Path, report: Report, model: bool = False) -> list[Done]:
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

    def map_parts(self, make: Make, parts: Sequence[Part], out: Path, report: Report, name: Name = row_name) -> list[Share]:
        import torch

        before = torch.get_num_threads()
        try:  # one try: in this process a part that fails fails again
            return work_off(Inline(make, out, self.sampler_threads), parts, out, report, self.samplers, 1, name)
        finally:
            torch.set_num_threads(before)

    def fit(self, jobs: Sequence[FitJob]) -> None:
        for job in unfinished(jobs):
            control.reins().look()
            batches = job.feed.batches(job.resume(job.out))
            select = job.select.batches if job.select is not None else _no_select
            do_job(job, batches, select, self.training_threads, listen=self.listen)

    def search(self, trials: Sequence[Trial], report: Report) -> None:
        board = Board(trials)
        for _ in in_turn(board, self, report):
            control.reins().look()
        board.settle()

    def close(self) -> None:
        """Nothing is held between calls."""


def _no_select() -> Iterable[Batch]:
    raise AssertionError("this job has no select role")
