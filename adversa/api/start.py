"""How work on a run is started: in this process, in a child, or through a coordinator on a cluster.
torch and ray are imported inside.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adversa.types import UserError

if TYPE_CHECKING:
    from adversa.config import Config
    from adversa.engine.interface import Engine
    from adversa.engine.resources import Node
    from adversa.pipeline.coordinator import CoordinatorTask
    from adversa.pipeline.stage import PlannedStage
    from adversa.run.control import HeldRun
    from adversa.run.folder import RunDir
    from adversa.storage.path import StoragePath
    from adversa.types import Json

Watch = Callable[["Config", "RunDir"], contextlib.AbstractContextManager[Any]]
Say = Callable[[str], None]
LOOK_SECONDS = 0.5


class RunFailed(RuntimeError):
    """Work on a cluster failed, and not for what a user can fix; `trace` is its traceback there."""

    def __init__(self, message: str, trace: str) -> None:
        super().__init__(message)
        self.trace = trace


def check_name(engine: str) -> None:
    """UserError where there is no such engine."""
    if engine not in ("ray", "local"):
        raise UserError(f"--engine {engine}: use ray or local")


def check_engine(name: str, config: Config) -> None:
    """UserError where there is no such engine, or it cannot train as the configuration says."""
    check_name(name)
    if name == "local" and config.cluster.training_workers > 1:
        raise UserError(
            f"cluster.training_workers {config.cluster.training_workers}: --engine local trains in "
            "this process alone; set 1, or use --engine ray"
        )


def engine_of(name: str, config: Config, run: RunDir, verbose: bool = False) -> Engine:
    """An engine by its name, which `check_name` has passed; the caller closes it."""
    if name == "local":
        from adversa.engine.local import LocalEngine

        return LocalEngine(config.cluster.sampler_threads, config.cluster.training_threads)
    from adversa.distributed.engine import RayEngine

    return RayEngine(config.cluster, run.root, config.data.resolution**2 * 3, verbose)


def work_on(
    command: str,
    config: Config,
    root: StoragePath,
    engine: str,
    say: Say,
    watch: Watch,
    *,
    verbose: bool = False,
    reopen: bool = False,
    since: float | None = None,
) -> tuple[RunDir, str]:
    """Bring a run up to the end of a command, here or through a coordinator on the cluster.

    Args:
        command: "loop", or a stage.
        config: Of the run.
        root: Its folder.
        engine: "local" or "ray".
        say: Is told what is waited for.
        watch: What follows the run while it is worked on.
        verbose: Show what Ray says.
        reopen: `test` may be opened again.
        since: time.monotonic() at the start of the command.

    Returns:
        The run, and the title of the last stage that was worked on ("": nothing was left to do).

    Raises:
        UserError: Anything that the user can fix.
        KeyboardInterrupt: It was stopped.
        RunFailed: The coordinator failed.
    """
    from adversa import distributed
    from adversa.config import dump
    from adversa.estimate import memory
    from adversa.pipeline import loop, stages
    from adversa.pipeline.coordinator import CoordinatorTask
    from adversa.storage import files, once

    clustered = engine == "ray" and distributed.address() is not None
    until = None if command == "loop" else command
    with once.command():
        seen = files.read_json(root / "status.json")
        run, planned = loop.open_planned(config, root, reopen)
        if until == "quality":
            planned = stages.plan(config, run, until)
        if left := bool(loop.todo(planned, until)):
            memory.check(config, run, [] if clustered else _machine())
        if not clustered or not (reopen or left):
            make = partial(engine_of, engine, config, run, verbose)
            ended = _here(command, config, run, planned, make, say, watch, reopen, since, seen)
            return run, ended
    # Others write to the run from here on.
    given = dump(config), str(run.root), command, str(Path.cwd()), reopen, verbose
    return run, _on_cluster(CoordinatorTask(uuid.uuid4().hex, *given), config, run, say, watch)


def _here(
    command: str,
    config: Config,
    run: RunDir,
    planned: list[PlannedStage],
    make: Callable[[], Engine],
    say: Say,
    watch: Watch,
    reopen: bool,
    since: float | None,
    seen: Json | None,
) -> str:
    """Hold the run and work on it in this process. As `work_on`; seen: as of `control.held`."""
    from adversa.pipeline import loop
    from adversa.report import page
    from adversa.run.hold import hold

    until = None if command == "loop" else command

    def work(handle: HeldRun) -> str:
        if until is None:
            loop.review(config, run, reopen)  # what it sets aside is to be done again
        if not loop.todo(planned, until):
            return ""
        with watch(config, run), contextlib.closing(make()) as on:
            worked = loop.run(config, run, on, page.write, until, since, reopen, handle, planned)
        return worked.title if worked is not None else ""

    def ended() -> str:
        return "finished" if run.summary.exists() else "stopped"

    return hold(command, run, work, ended, say, seen)


def _machine() -> list[Node]:
    """This one, for its GPUs' memory; none where it has no GPU."""
    from adversa.engine.resources import Node, gpus_here

    if not (found := gpus_here()):
        return []
    least = min(m for _, m in found)
    return [Node("this machine", 0, len(found), gpu_type=found[0][0], gpu_memory=least)]


def _on_cluster(task: CoordinatorTask, config: Config, run: RunDir, say: Say, watch: Watch) -> str:
    """Let a coordinator on the cluster work on the run, and follow it, or the one that does
    already. As `work_on`.
    """
    from adversa.distributed import coordinator
    from adversa.distributed.start import start, stop
    from adversa.pipeline.coordinator import follow
    from adversa.report import page
    from adversa.run import control
    from adversa.run.hold import interruptible

    begun = False
    with interruptible():
        try:
            start(config.cluster, task.verbose)
            new = coordinator.begin(task, page.write, say)
            begun = True
            if not task.verbose:  # which shows what Ray says, as long as this process belongs to it
                stop()
            if not new:
                say(f"{run.root} is worked on already; following it")
            with watch(config, run):
                status = follow(run)
        except KeyboardInterrupt:
            if not begun:
                coordinator.cancel(task)
                raise
            control.request(run, control.STOP)
            say("stopping")
            status = follow(run)
            if status["state"] == "stopped":
                raise
    return _outcome(status)


def _outcome(status: dict[str, Any]) -> str:
    """How a coordinator's work ended, as it would have ended here."""
    if status["state"] == "failed" and status.get("user"):
        raise UserError(status["error"])
    if status["state"] == "failed":
        raise RunFailed(status["error"], str(status.get("trace") or status["error"]))
    if status["state"] == "stopped" and "worked" not in status:
        raise KeyboardInterrupt
    return str(status.get("worked", ""))


def in_child(config: Config, root: StoragePath, engine: str) -> None:
    """Start the command in a process of its own, and return once it holds the run (on a cluster:
    once its coordinator does) or has ended.
    """
    from adversa import distributed
    from adversa.config import dump
    from adversa.run import run_lock
    from adversa.run.folder import RunDir
    from adversa.storage import files

    clustered, run = engine == "ray" and distributed.address() is not None, RunDir(root)
    before = run_lock.holder(run) if clustered else None  # it may have died and left its lock
    args = [sys.executable, "-P", "-m", "adversa.cli", "loop", "/dev/stdin"]
    args += ["--run-dir", str(root), "--engine", engine]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path)}
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            args,
            env=found,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,  # Ctrl-C here leaves it alone
        )
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(dump(config).encode())
        threading.Thread(target=child.wait, daemon=True).start()
        while (files.read_json(root / "status.json") or {}).get("pid") != child.pid:
            if child.poll() is not None:
                break
            if clustered and run_lock.holder(run) not in (None, before):
                break
            time.sleep(0.1)
        if child.poll():
            said.seek(0)
            text = said.read().decode(errors="replace").strip()
            if child.returncode == 2:
                raise UserError(text.removeprefix("error: "))
            raise RuntimeError(f"the process that was to work on {root} ended:\n{text}")


@contextlib.contextmanager
def printed(config: Config, run: RunDir) -> Iterator[None]:
    """Prints the name of each stage as it begins."""
    over = threading.Event()
    thread = threading.Thread(target=tell_stages, args=(run, over.wait), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def tell_stages(run: RunDir, is_over: Callable[[float], bool]) -> None:
    """Print each stage as it begins, until it is over."""
    from adversa.storage import files

    seen, last = "", False
    while not last:
        last = is_over(LOOK_SECONDS)
        with contextlib.suppress(OSError):  # a store that cannot be reached is asked again
            status = files.read_json(run.status) or {}
            said = status.get("stage"), status.get("state")
            now = " ".join(s for s in said if s and s != "running")
            if now != seen:
                print(f"{time.strftime('%H:%M:%S')} {now}", flush=True)
            seen = now
