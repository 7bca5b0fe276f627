"""Ray Train around the core fit functions: one launch for several trainings, each fed by its own
stream.

A launch costs seconds (controller, worker group, imports), so trainings that wait for nothing share
one. Each finished job is marked on the worker; a launch that dies is repeated with what is left.
docs/decisions/0006 says what survives which death.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow.fs as pafs
from ray.exceptions import ActorUnschedulableError, NodeDiedError, RayActorError
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.result import Result
from ray.train.v2.torch.torch_trainer import TorchTrainer

from adversa.distributed import stream
from adversa.distributed.backend import ProcessGroup
from adversa.distributed.background import Background
from adversa.distributed.errors import NoRetry, user_error
from adversa.distributed.worker import Loop
from adversa.engine.interface import FitJob
from adversa.run.step_folder import is_finished
from adversa.storage.path import BucketPath, StoragePath, filesystem

T = TypeVar("T")
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class WorkerGroup:
    """The workers of a launch: how many (least, most), what each asks for, starts before the run
    fails, torch threads of each.

    embedded: on a Ray of this command's own, which ends with it.
    """

    workers: tuple[int, int]
    resources: dict[str, float]
    attempts: int
    threads: int | None
    embedded: bool


def fit(
    jobs: Sequence[FitJob], storage: StoragePath, image_bytes: int, group: WorkerGroup
) -> dict[str, float]:
    """Train unfinished jobs in order on a group of workers. UserError of a job comes back as
    itself, and is not tried again.

    Returns when the stages of the launch's start-up were over (worker.Loop). ControllerLost where
    Ray Train itself was killed.
    """
    streams = stream.Streams(
        {f"train-{i}": (job.feed, job.out) for i, job in enumerate(jobs)},
        {f"select-{i}": job.select for i, job in enumerate(jobs) if job.select is not None},
        image_bytes,
    )
    least, most = group.workers
    trainer = _Trainer(
        Loop(jobs, group.threads, Path.cwd()),
        torch_config=ProcessGroup(),  # type: ignore[arg-type]  # not a TorchConfig: backend.py
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu="GPU" in group.resources,
            resources_per_worker=group.resources,
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            **stored(storage),
            callbacks=[NoRetry()],
            failure_config=FailureConfig(max_failures=group.attempts - 1),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
        datasets=streams.placeholders(),
        dataset_config=streams,
    )
    trainer.embedded = group.embedded
    try:
        result = cast(Result, watched(trainer.fit))
    except (RayActorError, ActorUnschedulableError, NodeDiedError) as e:
        raise ControllerLost(" ".join(str(e).split())[:300]) from e
    assert all(is_finished(job.out) for job in jobs), "a training came home without its model"
    started: dict[str, float] | None = result.return_value
    assert started is not None, "Ray Train lost what its worker returned"
    return started


def stored(storage: StoragePath) -> dict[str, Any]:
    """Where Ray Train keeps its pointers. Of an object store Ray gets the filesystem: it would read
    the address its own way.
    """
    if isinstance(storage, BucketPath):
        handler = pafs.FSSpecHandler(filesystem(storage))
        return {"storage_path": storage.path, "storage_filesystem": pafs.PyFileSystem(handler)}
    return {"storage_path": str(storage.resolve())}


class ControllerLost(Exception):
    """The process that looks after a launch's workers has died, or the node it was to run on. What
    is committed is kept.
    """


class _Trainer(TorchTrainer):
    """TorchTrainer without the process that frees a dead controller's placement group: an embedded
    Ray ends with the command.
    """

    embedded = False

    def _create_default_callbacks(self) -> list[Any]:
        found = super()._create_default_callbacks()
        return [
            c
            for c in found
            if not (self.embedded and type(c).__name__ == "PlacementGroupCleanerCallback")
        ]


def watched(fit: Callable[[], T], poll: Callable[[], None] = lambda: None) -> T:
    """What `fit` of Ray Train or Tune returns, called in a thread of its own: in the main thread it
    would take over Ctrl-C and turn it into exit code 0. This thread polls meanwhile. A UserError at
    the root of what it raises comes back as itself.
    """
    call = Background(fit)
    call.start()
    while call.thread.is_alive():
        call.thread.join(POLL_SECONDS)
        poll()
    if (error := call.future.exception()) is not None:
        raise user_error(error) or error
    return call.result()
