"""The pool of sampler actors: Ray under the scheduling of engine/worker_pool.py.

No image passes through the driver: an actor reads its parts' requests, generates, and commits the
files.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

import ray
from ray import ObjectRef
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import RayError, RayTaskError

from adversa.distributed.actor import Actor
from adversa.distributed.errors import user_error
from adversa.engine.task_queue import Task
from adversa.engine.tasks import Make
from adversa.engine.worker_pool import Lost
from adversa.storage.path import StoragePath

T = TypeVar("T")


@dataclass(frozen=True)
class Actors:
    """The Backend of Ray actors. options: of each (num_cpus, num_gpus); threads: of torch; pinned:
    to cores of their own.
    """

    make: Make
    out: StoragePath
    options: dict[str, Any]
    threads: int | None
    pinned: bool = False

    @cached_property
    def kind(self) -> ActorClass[Actor]:
        # Ray neither starts an actor again nor repeats its calls: what a dead one had not done is
        # for the pool to decide.
        return ray.remote(max_restarts=0, max_task_retries=0, **self.options)(Actor)

    def start(self) -> ActorHandle[Actor]:
        return cast("ActorHandle[Actor]", self.kind.remote())

    def place(self, worker: ActorHandle[Actor]) -> ObjectRef[Any]:
        return worker.place.remote()

    def load(self, worker: ActorHandle[Actor], place: int) -> ObjectRef[Any]:
        return worker.load.remote(self.make, self.out, self.threads, place if self.pinned else None)

    def do(self, worker: ActorHandle[Actor], tasks: Sequence[Task]) -> ObjectRef[Any]:
        return worker.do.remote(tasks)

    def wait(self, calls: Sequence[ObjectRef[T]], seconds: float) -> Sequence[ObjectRef[T]]:
        if not calls:
            time.sleep(seconds)
            return []
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=seconds)
        if ready:  # and what else is there: ray.wait returns no more than it was asked for
            ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        return ready

    def answer(self, call: ObjectRef[T]) -> T:
        try:
            return ray.get(call)
        except RayTaskError as e:
            if (mendable := user_error(e)) is not None:
                raise mendable from None
            lost = Lost(" ".join(f"{type(e.cause).__name__}: {e.cause}".split())[:300])
            lost.add_note(str(e))
            raise lost from None
        except RayError as e:
            raise Lost(f"its worker died ({_last_line(e)})") from None

    def stop(self, worker: ActorHandle[Actor]) -> None:
        ray.kill(worker)


def _last_line(error: RayError) -> str:
    """Ray says first what everyone knows, and the cause at the end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
