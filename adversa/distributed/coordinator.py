"""The coordinator of a run on a cluster: a named, detached actor around pipeline/coordinator.py,
and how a command deals with it.

It outlives the command that started it. When its process dies Ray starts it again with the same
task, and it goes on from the run folder. Everything that is asked of it (pause, stop, settings) and
everything it answers lies in that folder too.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from adversa.config import Config
from adversa.distributed import metrics, nodes
from adversa.engine.interface import Engine
from adversa.pipeline.coordinator import Coordinator, CoordinatorTask
from adversa.pipeline.stage import Page
from adversa.run.folder import RunDir
from adversa.types import UserError, digest

NAMESPACE = "adversa"
RESTARTS = (
    100  # of a coordinator whose process dies; not counted are those whose node is taken away
)
TRIES = 40  # to reach a coordinator; half a second between two
LINGER_SECONDS = 20.0  # after the end, for whoever asks how it went
LOOK_SECONDS = 0.5
STATE_SECONDS = 10
ASK_SECONDS = 5.0


class CoordinatorActor(Coordinator):
    """Coordinator in a process of its own, on whose cluster it works."""

    def __init__(self, task: CoordinatorTask, page: Page) -> None:
        if Path(task.home).is_dir():
            os.chdir(task.home)  # relative paths in a configuration mean the user's folder
        back = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        super().__init__(task, _engine(task), page, lambda: _end(task.root), back)
        self.start()
        metrics.follow(self.config, self.run)
        threading.Thread(target=self._leave, daemon=True).start()

    def settled(self, seconds: float) -> dict[str, Any]:
        """`state`, as soon as the run is taken or refused; after so many seconds in any case."""
        until = time.monotonic() + seconds
        while not (self.taken.is_set() or self.over.is_set()) and time.monotonic() < until:
            time.sleep(0.05)
        return self.state()

    def _leave(self) -> None:
        self.over.wait()
        time.sleep(LINGER_SECONDS)
        _end(self.task.root)


def _engine(task: CoordinatorTask) -> Callable[[Config, RunDir], Engine]:
    def make(config: Config, run: RunDir) -> Engine:
        from adversa.distributed.engine import RayEngine

        return RayEngine(
            config.cluster, run.root, config.data.resolution**2 * 3, task.verbose, inside=True
        )

    return make


def name_of(root: str) -> str:
    return f"coordinator-{digest(root, size=8)}"


def _end(root: str) -> None:
    """End this process, and do not start it again. With it end the actors and tasks that it
    owns.
    """
    ray.kill(ray.get_actor(name_of(root), NAMESPACE), no_restart=True)


# ---- the command's side --------------------------------------------------------------------------


def begin(task: CoordinatorTask, page: Page, say: Callable[[str], None]) -> bool:
    """Start a coordinator with this task, or find the one that works on the run: whether it is a
    new one.

    UserError where somebody else works on the run, or a coordinator with another command. say: is
    told what is waited for.
    """
    head = nodes.head()
    # What frees a dead training's CPUs and GPUs asks a dashboard, and where a machine has several
    # Rays it would ask the wrong one.
    told = {"env_vars": {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}}
    # Not repeated: a question to a dead actor is asked anew. Threads: one for each question, the
    # work has its own.
    kind = ray.remote(CoordinatorActor).options(
        num_cpus=0,
        max_restarts=RESTARTS,
        max_task_retries=0,
        max_concurrency=16,
        name=name_of(task.root),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        scheduling_strategy=NodeAffinitySchedulingStrategy(head, soft=True) if head else None,
        runtime_env=told,
    )
    for left in reversed(range(TRIES)):
        actor = kind.remote(task, page)
        try:
            found = _settled(actor, say)
        except RayActorError as e:
            if not left or "creation task" in str(e):
                raise
            time.sleep(LOOK_SECONDS)  # it was about to leave, or is being started again
            continue
        mine: bool = found["id"] == task.id
        if mine and found["refused"]:
            _kill(actor)
            raise UserError(found["refused"])
        if not mine and found["over"]:
            _kill(actor)
            continue
        if mine and not _has_dashboard():
            say(
                "this cluster has no dashboard: what a killed training held stays taken "
                "until this command has ended"
            )
        if found["command"] != task.command:
            raise UserError(
                f"{task.root}: a coordinator is at work on it (adversa "
                f"{found['command']}); wait for it, or stop it: adversa stop"
            )
        return mine
    raise UserError(
        f"{task.root}: a coordinator that has ended does not leave; stop it with: adversa stop"
    )


def _settled(actor: Any, say: Callable[[str], None]) -> dict[str, Any]:
    said = ""
    while True:
        found: dict[str, Any] = ray.get(actor.settled.remote(3.0))
        if found["taken"] or found["over"]:
            return found
        if found["note"] not in ("", "starting", said):
            said = found["note"]
            say(said)


def _has_dashboard() -> bool:
    """Ray Train asks it whether a training's controller has died, and frees the CPUs and GPUs that
    the training held.
    """
    try:
        list_nodes(limit=1, timeout=STATE_SECONDS)
        return True
    except RayStateApiException:
        return False


def _kill(actor: Any) -> None:
    ray.kill(actor, no_restart=True)
    time.sleep(LOOK_SECONDS)


def cancel(task: CoordinatorTask) -> None:
    """End the coordinator that this task may have started, whatever it is at."""
    if not ray.is_initialized():  # it was not reached; asking for an actor would begin to
        return
    try:
        actor: Any = ray.get_actor(name_of(task.root), NAMESPACE)
        state: dict[str, Any] = ray.get(actor.state.remote(), timeout=ASK_SECONDS)
        if state["id"] == task.id:
            _kill(actor)
    except (ValueError, RayActorError, GetTimeoutError):
        return  # there is none, or it is on its way out
