"""Ray Train around the core fit functions: one launch for several trainings, each fed by its own stream.

A launch costs seconds (controller, worker group, imports), so trainings that wait for nothing share one. Each finished job
is marked on the worker; a launch that dies is repeated with what is left.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray.train
from ray.train import DataConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from adversa.distributed import stream
from adversa.distributed.errors import user_error
from adversa.loop.engine import FitJob, do_job
from adversa.runs import is_finished


def fit(jobs: Sequence[FitJob], storage: Path, image_bytes: int, threads: int | None, resources: dict[str, float]) -> None:
    """Train unfinished jobs in order on one worker, which asks for `resources`. UserError of a job comes back as itself."""
    datasets = {}
    for i, job in enumerate(jobs):
        start = job.resume(job.out)
        if start < job.feed.count():
            datasets[f"train-{i}"] = stream.training_dataset(job.feed, start, image_bytes)
        if job.select is not None:
            datasets[f"select-{i}"] = stream.training_dataset(job.select, 0, image_bytes)
    trainer = TorchTrainer(
        _Loop(list(jobs), threads, list(datasets), Path.cwd()),
        scaling_config=ScalingConfig(num_workers=1, use_gpu="GPU" in resources, resources_per_worker=resources),
        run_config=RunConfig(name=uuid.uuid4().hex, storage_path=str(storage.resolve())),
        datasets=datasets,
        dataset_config=DataConfig(execution_options=stream.ordered()),
    )
    _run(trainer)
    assert all(is_finished(job.out) for job in jobs), "a training came home without its model"


class _Loop:
    """The training worker's function."""

    def __init__(self, jobs: list[FitJob], threads: int | None, shards: list[str], home: Path) -> None:
        self.jobs, self.threads, self.shards, self.home = jobs, threads, shards, home

    def __call__(self) -> None:
        if self.home.is_dir():
            os.chdir(self.home)  # Ray Train moves its workers elsewhere; relative paths in a configuration mean the user's folder
        for i, job in enumerate(self.jobs):
            do_job(job, self._stream(f"train-{i}")(), self._stream(f"select-{i}"), self.threads)

    def _stream(self, name: str) -> Any:
        return stream.batches(ray.train.get_dataset_shard(name)) if name in self.shards else lambda: iter(())


def _run(trainer: TorchTrainer) -> None:
    """`trainer.fit()` in a thread of its own: in the main thread it would take over Ctrl-C and turn it into exit code 0."""
    failure: list[BaseException] = []

    def call() -> None:
        try:
            trainer.fit()
        except BaseException as e:  # handed to the main thread, whatever it is
            failure.append(e)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failure:
        raise user_error(failure[0]) or failure[0]
