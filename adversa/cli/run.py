"""How a command works on a run: where it works, what stops it, what it says at the end. torch and
ray are imported inside.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from adversa.cli.console import Screen, say
from adversa.cli.options import RunOptions

if TYPE_CHECKING:
    from rich.console import Console

    from adversa.config import Config
    from adversa.engine.interface import Engine
    from adversa.run.folder import RunDir
    from adversa.storage.path import StoragePath

STARTED = time.monotonic()
KEPT = "everything finished is kept. Resume with"


def root_of(path: Path | None, run_dir: StoragePath | None) -> StoragePath:
    return run_dir or Path("runs") / (path.stem if path is not None else "demo")


def execute(
    command: str,
    path: Path | None,
    options: RunOptions,
    reopen: bool = False,
    brief: bool = False,
) -> None:
    """brief: one line at the end, though the run is finished: the caller has more to say."""
    from adversa.api import start
    from adversa.cli import view
    from adversa.common.sanitize import printable
    from adversa.config import load
    from adversa.pipeline.folders import has_codec
    from adversa.types import UserError

    start.check_name(options.engine)
    source: StoragePath | None = path
    if path is None and options.run_dir is not None and command != "loop":
        saved = options.run_dir / "config.yaml"
        source = saved if saved.is_file() else None  # a later stage goes on with the run's own
    config = load(source, options.overrides, rounds=options.rounds, seed=options.seed)
    start.check_engine(options.engine, config)
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
    screen = Screen()
    with stoppable(KEPT):
        try:
            run, worked = start.work_on(
                command,
                config,
                root_of(path, options.run_dir),
                options.engine,
                partial(say, screen),
                partial(view.LiveView, screen),
                verbose=options.verbose,
                reopen=reopen,
                since=STARTED,
            )
        except start.RunFailed as e:
            typer.echo(printable(e.trace), err=True)
            raise typer.Exit(1) from None
    _close(command, config, run, worked, screen, brief)


def _close(
    command: str, config: Config, run: RunDir, worked: str, screen: Console, brief: bool
) -> None:
    from adversa.cli import closing
    from adversa.run import file_lock, records
    from adversa.storage import once

    if command == "quality":
        with file_lock.lock(run):
            judged = _judged(config, run)
        closing.quality(screen, run, judged)
    elif run.summary.exists() and not brief:
        with once.command():
            records.check_end(run)
            closing.closing(screen, run)
    else:
        say(
            screen,
            f"{worked} is done in {run.root}"
            if worked
            else f"{command}: nothing left to do in {run.root}",
        )


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
    from adversa.api.start import check_name, engine_of

    check_name(name)
    return lambda config, run: engine_of(name, config, run, verbose)


@contextlib.contextmanager
def stoppable(kept: str = "what is finished is kept. Resume with") -> Iterator[None]:
    """Ctrl-C and SIGTERM end a command with one line."""
    from adversa.run.hold import interruptible

    with interruptible():
        try:
            yield
        except KeyboardInterrupt as stop:
            say(Screen(), f"stopped; {kept}: {_again()}")
            raise typer.Exit(143 if stop.args == ("SIGTERM",) else 130) from None


def _again() -> str:
    return shlex.join(["adversa", *sys.argv[1:]])
