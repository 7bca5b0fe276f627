"""How a command works on a run: where it works, what stops it, what it says at the end. torch and
ray are imported inside.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from adversa.config import Config
    from adversa.engine.interface import Engine
    from adversa.run.control import HeldRun
    from adversa.run.folder import RunDir

STARTED = time.monotonic()


def error(message: str) -> None:
    """One line on stderr, word for word: no markup, no emoji codes, no wrapping."""
    from rich.text import Text

    from adversa.cli.console import Screen
    from adversa.common.sanitize import unsigned

    Screen(stderr=True).print(
        Text.assemble(("error:", "bold red"), " ", unsigned(" ".join(message.split()))),
        soft_wrap=True,
    )


def root_of(path: Path | None, run_dir: Path | None) -> Path:
    return run_dir or Path("runs") / (path.stem if path is not None else "demo")


def execute(
    command: str,
    path: Path | None,
    run_dir: Path | None,
    overrides: list[str],
    rounds: int | None,
    seed: int | None,
    engine_name: str,
    verbose: bool,
    reopen: bool = False,
    brief: bool = False,
    detach: bool = False,
) -> None:
    """brief: one line at the end, though the run is finished: the caller has more to say."""
    from adversa import distributed
    from adversa.cli.console import Screen
    from adversa.config import load
    from adversa.estimate import memory
    from adversa.pipeline import loop
    from adversa.pipeline.folders import has_codec
    from adversa.types import UserError

    if engine_name not in ("ray", "local"):
        raise UserError(f"--engine {engine_name}: use ray or local")
    if (
        path is None
        and command != "loop"
        and run_dir is not None
        and (run_dir / "config.yaml").is_file()
    ):
        path = (
            run_dir / "config.yaml"
        )  # a later stage of a run goes on with the run's own configuration
    config = load(path, overrides, rounds=rounds, seed=seed)
    if engine_name == "local" and config.cluster.training_workers > 1:
        many = config.cluster.training_workers
        raise UserError(
            f"cluster.training_workers {many}: --engine local trains in this process "
            "alone; set 1, or use --engine ray"
        )
    if command == "codec" and not has_codec(config):
        raise UserError(
            f"codec.kind {config.codec.kind}, mix.arms {config.mix.arms}: no codec to "
            "train; set codec.kind=tiny"
        )
    if command == "quality" and not config.mix.generates:
        raise UserError(
            f"mix.arms {config.mix.arms}: this run generates nothing and has no denoiser; add "
            "unguided or guided"
        )
    root = root_of(path, run_dir)
    screen = Screen()
    clustered = engine_name == "ray" and distributed.address() is not None
    if detach and not clustered:
        raise UserError(
            "--detach: without a cluster the run ends with the command; set RAY_ADDRESS, "
            "or leave --detach out"
        )
    run = loop.open_run(config, root, reopen)
    if loop.todo(config, run, None if command == "loop" else command):
        memory.check(config, run, [] if clustered else _machine())
    if clustered and (reopen or loop.todo(config, run, None if command == "loop" else command)):
        worked = _on_cluster(command, config, run, verbose, screen, reopen, detach)
        if detach:
            return
    else:
        worked = _here(command, config, run, engine_name, verbose, screen, reopen)
    _close(command, config, run, worked, screen, brief)


def _machine() -> list[Any]:
    """This one, for its GPUs' memory; none where it has no GPU."""
    from adversa.engine.resources import Node, gpus_here

    found = gpus_here()
    return (
        [
            Node(
                "this machine",
                0,
                len(found),
                gpu_type=found[0][0],
                gpu_memory=min(m for _, m in found),
            )
        ]
        if found
        else []
    )


def _here(
    command: str,
    config: Config,
    run: RunDir,
    engine_name: str,
    verbose: bool,
    screen: Any,
    reopen: bool,
) -> str:
    """Work on the run in this process: the title of the last stage it worked on, "" where there was
    none.
    """
    worked = hold(
        command,
        run,
        screen,
        lambda handle: _loop(command, config, run, engine_name, verbose, screen, reopen, handle),
        lambda: "finished" if run.summary.exists() else "stopped",
    )
    return worked.title if worked is not None else ""


def hold(
    command: str,
    run: RunDir,
    screen: Any,
    work: Callable[[HeldRun], Any],
    ended: Callable[[], str],
    /,
    **reported: Any,
) -> Any:
    """What `work(handle)` returns, done while this process holds the run; status.json says how it
    ended. typer.Exit where it was stopped.

    ended: the state of a run whose work came to its end; told: what else status.json is to say.
    """
    from adversa.run import control, status
    from adversa.run.run_lock import RunLockLost

    try:
        with (
            _terminable(),
            control.held(run, command, _interrupt, lambda text: _say(screen, text)) as handle,
        ):
            try:
                found = work(handle)
            except KeyboardInterrupt as stop:
                handle.ending = True
                if handle.lock.lost is not None:
                    raise handle.lock.lost from None
                status.set_status(run, "stopped", **reported)
                raise _stopped(
                    screen, KeyboardInterrupt() if control.read(run).state == control.STOP else stop
                ) from None
            except RunLockLost:
                raise
            except Exception as e:
                _note_failure(run, e, **reported)
                raise
            status.set_status(run, ended(), **reported)
    except KeyboardInterrupt as stop:  # before it was ours
        raise _stopped(screen, stop) from None
    return found


def _on_cluster(
    command: str,
    config: Config,
    run: RunDir,
    verbose: bool,
    screen: Any,
    reopen: bool,
    detach: bool,
) -> str:
    """Let a coordinator on the cluster work on the run, and follow it, or the one that does
    already. As `_here`.
    """
    from adversa.cli import view
    from adversa.config import dump
    from adversa.distributed import coordinator
    from adversa.distributed.start import start, stop
    from adversa.pipeline.coordinator import CoordinatorTask, follow
    from adversa.report import page
    from adversa.run import control

    task = CoordinatorTask(
        uuid.uuid4().hex, dump(config), str(run.root), command, str(Path.cwd()), reopen, verbose
    )
    begun, root = False, shlex.quote(str(run.root))
    with _terminable():
        try:
            start(config.cluster, verbose)
            new = coordinator.begin(task, page.write, lambda text: _say(screen, text))
            begun = True
            if not verbose:  # which shows what Ray says, as long as this process belongs to it
                stop()
            if detach:
                ways = (
                    f"the same command follows it, adversa status {root} shows it, adversa "
                    f"stop {root} ends it"
                )
                _say(screen, f"{run.root} is worked on; {ways}")
                return ""
            if not new:
                _say(screen, f"{run.root} is worked on already; following it")
            with view.LiveView(screen, config, run):
                status = follow(run)
        except KeyboardInterrupt as end:
            if not begun:
                coordinator.cancel(task)
                raise _stopped(screen, end) from None
            control.request(run, control.STOP)
            _say(screen, "stopping")
            status = follow(run)
            if status["state"] == "stopped":
                raise _stopped(screen, end) from None
    return _outcome(status, screen)


def _outcome(status: dict[str, Any], screen: Any) -> str:
    """How a coordinator's work ended, as it would have ended here."""
    from adversa.common.sanitize import printable
    from adversa.types import UserError

    if status["state"] == "failed" and status.get("user"):
        raise UserError(status["error"])
    if status["state"] == "failed":
        typer.echo(printable(str(status.get("trace") or status["error"])), err=True)
        raise typer.Exit(1)
    if status["state"] == "stopped" and "worked" not in status:
        raise _stopped(screen, KeyboardInterrupt())
    return str(status.get("worked", ""))


def _close(
    command: str, config: Config, run: RunDir, worked: str, screen: Any, brief: bool
) -> None:
    from adversa.cli import view
    from adversa.run import file_lock

    if command == "quality":
        with file_lock.lock(run):
            judged = _judged(config, run)
        view.quality(screen, run, judged)
    elif run.summary.exists() and not brief:
        view.closing(screen, run)
    else:
        _say(
            screen,
            f"{worked} is done in {run.root}"
            if worked
            else f"{command}: nothing left to do in {run.root}",
        )


def _say(screen: Any, text: str) -> None:
    screen.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _stopped(screen: Any, stop: KeyboardInterrupt) -> typer.Exit:
    _say(screen, f"stopped; everything finished is kept. Resume with: {_again()}")
    return typer.Exit(143 if stop.args == ("SIGTERM",) else 130)


def _interrupt() -> None:
    """From another thread. Not SIGINT: a command that a shell has started in the background ignores
    that.
    """
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _loop(
    command: str,
    config: Config,
    run: RunDir,
    engine_name: str,
    verbose: bool,
    screen: Any,
    reopen: bool,
    handle: HeldRun,
) -> Any:
    from adversa.cli import view
    from adversa.pipeline import loop
    from adversa.report import page

    until = None if command == "loop" else command
    if until is None:
        loop.review(config, run, reopen)  # what it sets aside is to be done again
    if not loop.todo(config, run, until):
        return None
    with view.LiveView(screen, config, run):
        engine = engine_of(engine_name, config, run, verbose)
        try:
            return loop.run(config, run, engine, page.write, until, STARTED, reopen, handle)
        finally:
            engine.close()


def _judged(config: Config, run: RunDir) -> dict[str, Any]:
    """What `evaluate denoiser` found, put where others look for it: quality.json, and the report of
    a finished run.
    """
    from adversa.pipeline import sample_quality
    from adversa.report import page

    result = sample_quality.publish(config, run)
    if run.summary.exists():
        page.write(run.root)
    return result


def engines(name: str, verbose: bool) -> Callable[[Config, RunDir], Engine]:
    from adversa.types import UserError

    if name not in ("ray", "local"):
        raise UserError(f"--engine {name}: use ray or local")
    return lambda config, run: engine_of(name, config, run, verbose)


def engine_of(name: str, config: Config, run: RunDir, verbose: bool) -> Engine:
    if name == "local":
        from adversa.engine.local import LocalEngine

        return LocalEngine(config.cluster.sampler_threads, config.cluster.training_threads)
    from adversa.distributed.engine import RayEngine

    return RayEngine(config.cluster, run.root, config.data.resolution**2 * 3, verbose)


def _note_failure(run: RunDir, error: Exception, **reported: Any) -> None:
    """Leave the reason where `status` finds it; a full disk must not hide the first error behind a
    second.
    """
    from adversa.run import status
    from adversa.types import UserError

    try:
        status.set_status(run, "failed", error=" ".join(str(error).split())[:2000], **reported)
    except (UserError, OSError) as e:
        error.add_note(f"status.json could not be written either ({e})")


@contextlib.contextmanager
def stoppable(kept: str = "what is finished is kept. Resume with") -> Iterator[None]:
    """Ctrl-C and SIGTERM end a command that is no run with one line."""
    with _terminable():
        try:
            yield
        except KeyboardInterrupt as stop:
            typer.echo(f"stopped; {kept}: {_again()}")
            raise typer.Exit(143 if stop.args == ("SIGTERM",) else 130) from None


class _terminable:
    """SIGTERM stops a run as Ctrl-C does."""

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGTERM, self._stop)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    @staticmethod
    def _stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt("SIGTERM")


def _again() -> str:
    return shlex.join(["adversa", *sys.argv[1:]])
