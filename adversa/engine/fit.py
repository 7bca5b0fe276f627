"""One training, carried out the same way on every engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from adversa.engine.batches import Batch
from adversa.engine.interface import FitJob
from adversa.engine.tasks import (
    Report,
)
from adversa.run import environment, step_folder
from adversa.run.control import RunHandle
from adversa.run.step_folder import Progress
from adversa.storage import files
from adversa.storage.weights import drop_checkpoint, read_model
from adversa.types import Json, UserError


def do_job(
    job: FitJob,
    batches: Iterable[Batch],
    select: Callable[[], Iterable[Batch]],
    threads: int | None,
    committed: Callable[[int], None] = lambda _: None,
    listen: Report = lambda _: None,
) -> None:
    """Run one training and mark it complete: the same code on every engine, on the worker, so that
    a finished job stays so.

    Of several workers each runs it on its rows of the batches; the lead alone writes. `rows` counts
    whole batches. threads: of torch; None: all CPUs that the worker may use. Another number of
    threads or workers gives other last bits, so both are recorded (the workers in progress.json as
    well: a group may shrink). committed: called on every worker with the step after each committed
    training state. listen: told what progress.json is told.
    """
    from adversa.training import process_group  # torch

    started_at = job.resume(job.out)
    if len(set(at := process_group.all_gather_object((str(job.out), started_at)))) > 1:
        raise UserError(
            f"the workers see different files (folder, step: {at}); put --run-dir where "
            "every node sees the same"
        )
    progress, threads = Progress(job.out), threads or environment.cpus()
    optional = {} if job.select is None else {"select": select}
    with files.writing(job.out):
        waited = Waited(batches)
        count, leads = process_group.world_size(), process_group.is_main_process()
        report = partial(_tell, progress, listen, count) if leads else _tell_nobody
        metrics = job.fit(
            waited, out=job.out, report=report, threads=threads, committed=committed, **optional
        )
        rows = started_at * job.feed.batch_size + waited.images
        assert rows == metrics["steps"] * job.feed.batch_size, (
            f"{job.out} saw {rows} images in {metrics['steps']} steps"
        )
        seconds = progress.elapsed
        compute = seconds - waited.seconds
        if leads:
            _, _, fingerprint = read_model(job.out)
            step_folder.finish(
                job.out,
                job.recipe,
                fingerprint=fingerprint,
                metrics=metrics,
                rows=rows,
                threads=threads,
                workers=count,
                seconds=seconds,
                compute_seconds=compute,
                device_seconds=compute * count,
                data_wait_seconds=waited.seconds,
            )
            drop_checkpoint(job.out)
        process_group.barrier()


def _tell(progress: Report, listen: Report, workers: int, state: Json) -> None:
    progress({**state, "workers": workers})
    listen(state)


def _tell_nobody(state: Json) -> None:
    """The progress of a worker that is not the lead."""


class Waited:
    """An iterable of batches that adds up the seconds its reader waits for it, and the images of
    all workers it stands for.
    """

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


def unfinished(jobs: Sequence[FitJob], handle: RunHandle) -> list[FitJob]:
    """The jobs to do; each one's recipe is checked and written first."""
    left = []
    handle.poll()
    for job in jobs:
        if step_folder.begin(job.out, job.recipe):
            drop_checkpoint(job.out)  # killed between the manifest and this
        else:
            left.append(job)
    return left
