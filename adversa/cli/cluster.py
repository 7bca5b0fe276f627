"""The commands' `--cluster FILE`: a run on a cluster instead of here; and the views `watch` and
`runs`, here or there.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from adversa.cli.console import say
from adversa.distributed import cluster_file
from adversa.distributed.cluster_file import Asks, ClusterFile
from adversa.types import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from adversa.cli.options import RunOptions
    from adversa.cli.view import LiveView
    from adversa.config import Config
    from adversa.distributed.jobs import Client, Job
    from adversa.run.folder import RunDir
    from adversa.storage.path import StoragePath

LOG_LINES = 10
PROGRESS = re.compile(r"\d\d:\d\d:\d\d ")  # begins a line that says how far a run is


def place(path: Path | None, run_dir: StoragePath | None, asks: Asks) -> str:
    """Where a run lies on the cluster. UserError for a place that would be another on every
    machine.
    """
    named = str(run_dir) if run_dir is not None else path.stem if path is not None else "demo"
    if cluster_file.is_absolute(named):
        return named
    if asks.run_storage is None:
        given = f"--run-dir {named} is relative" if run_dir is not None else "no --run-dir"
        raise UserError(
            f"{given}, and the cluster file names no run_storage; give --run-dir an "
            "absolute path that every node sees, or set "
            "metadata.adversa.run_storage"
        )
    return f"{asks.run_storage.rstrip('/')}/{named}"


class ClusterRequest(NamedTuple):
    """A run on a cluster, checked here: where it lies there, what goes along."""

    cluster: ClusterFile
    run: str
    settings: list[str]
    text: str


def ready(
    file: Path,
    path: Path | None,
    run_dir: StoragePath | None,
    settings: list[str],
    options: dict[str, Any],
) -> ClusterRequest:
    """What the command line requests of a cluster, checked. UserError for any fault that can be
    seen from here.
    """
    from adversa.config import load, packaged

    cluster = cluster_file.read(file)
    run, made = (
        place(path, run_dir, cluster.asks),
        [*cluster_file.overrides(cluster.asks), *settings],
    )
    config = load(path, made, rounds=options.get("rounds"), seed=options.get("seed"))
    if config.data.path is not None and not cluster_file.is_absolute(config.data.path):
        raise UserError(
            f"data.path {config.data.path}: a job on a cluster starts in a folder of its "
            "own; give a path that every node sees"
        )
    return ClusterRequest(cluster, run, made, (path or packaged("demo.yaml")).read_text())


def loop(
    file: Path,
    path: Path | None,
    options: RunOptions,
    reopen_test: bool,
    up: bool,
    down: bool,
    detach: bool,
    screen: Console,
) -> None:
    """Hand a run to a cluster and follow it; raises typer.Exit with the job's exit code.

    detach: do not follow it.
    """
    from adversa.distributed import jobs, launcher

    given: dict[str, Any] = {"rounds": options.rounds, "seed": options.seed}
    cluster, run, made, text = ready(file, path, options.run_dir, options.overrides, given)
    given |= {"reopen_test": reopen_test, "verbose": options.verbose}
    entrypoint = jobs.command("loop", run, made, words(given))
    job = None
    try:
        if up:
            launcher.up(cluster)
        with launcher.session(cluster) as client:
            if up:
                launcher.wait_for_nodes(client, cluster, partial(say, screen))
            with tempfile.TemporaryDirectory(prefix="adversa-") as folder:
                job, new = jobs.submit(client, run, entrypoint, text, Path(folder))
            say(
                screen,
                f"{'submitted' if new else 'already at work: following'} {job.id}, run {run}",
            )
            if detach:
                say(screen, f"Come back: {_command('watch', job.run, file)}")
                return
            ended = _follow(client, job, file, screen)
    except UserError:
        if (
            up and down and job is None
        ):  # nothing works there; machines that cost money are not left behind
            launcher.down(cluster)
        raise
    if down:
        launcher.down(cluster)
    raise typer.Exit(ended.code)


def words(options: dict[str, Any]) -> list[str]:
    """Options by name as words of a command; None or False leaves one out."""
    found = []
    for name, value in options.items():
        if value is not None and value is not False:
            found += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return found


def watch(run_dir: StoragePath | None, file: Path, screen: Console) -> None:
    """Follow the latest job on a run; raises typer.Exit with its exit code."""
    with _on(file, run_dir) as (client, found):
        ended = _follow(client, found[-1], file, screen)
    raise typer.Exit(ended.code)


def status(run_dir: StoragePath | None, file: Path, screen: Console) -> None:
    """What the cluster says of a run's latest job, and the end of its log."""
    from adversa.distributed import jobs

    with _on(file, run_dir) as (client, found):
        latest = found[-1]
        say(
            screen,
            f"{latest.run}  {_state(latest)}  {_age(latest)}  job {latest.id}, attempt "
            f"{len(found)}",
        )
        if latest.is_over and latest.exit_code is None and latest.status == "FAILED":
            say(screen, latest.message[:500])
        for line in jobs.last_lines(client, latest.id, LOG_LINES):
            say(screen, f"  {line}")
        if latest.is_over and latest.status != "SUCCEEDED":  # its coordinator may work on
            _run_beside(client, latest.run, "status", [], screen)


def stop(run_dir: StoragePath | None, file: Path, screen: Console) -> None:
    """Stop the job on a run, as Ctrl-C would stop a run here."""
    from adversa.distributed import jobs

    with _on(file, run_dir) as (client, found):
        latest = found[-1]
        if latest.is_over:  # its coordinator may work on
            raise typer.Exit(_run_beside(client, latest.run, "stop", [], screen))
        ended = jobs.stop(client, latest)
        if not ended.is_over:
            raise UserError(
                f"{latest.run} has not stopped yet; look again: "
                f"{_command('status', latest.run, file)}"
            )
        say(
            screen,
            f"{latest.run} is {_state(ended)}; everything finished is kept. Resume with "
            "the command that started it",
        )


def there(
    command: str, run_dir: StoragePath | None, file: Path, settings: list[str], screen: Console
) -> None:
    """Say on the cluster what is wanted of a run; raises typer.Exit with that command's exit
    code.
    """
    with _on(file, run_dir) as (client, found):
        raise typer.Exit(_run_beside(client, found[-1].run, command, settings, screen))


def _run_beside(
    client: Client, run: str, command: str, settings: list[str], screen: Console
) -> int:
    """The exit code of a command that runs on the cluster beside the run's own job, its lines shown
    here.
    """
    from adversa.distributed import jobs

    given = [word for setting in settings for word in ("--set", setting)]
    line = shlex.join(["python", "-m", "adversa.cli", command, run, *given])
    return jobs.follow(client, jobs.beside(client, run, command, line), partial(say, screen)).code


def listed(file: Path, screen: Console) -> None:
    """A table of the runs that have had a job on the cluster, the latest job of each."""
    from adversa.distributed import jobs, launcher

    with launcher.session(cluster_file.read(file)) as client:
        latest = {job.run.rstrip("/"): job for job in jobs.jobs(client)}
        rows = []
        for job in latest.values():
            said = [] if job.is_over else jobs.last_lines(client, job.id, 1)
            rows.append((job.run, _state(job), said[0] if said else "", _age(job)))
    _table(screen, rows, f"no run has had a job on the cluster of {file}")


@contextlib.contextmanager
def _on(file: Path, run_dir: StoragePath | None) -> Iterator[tuple[Client, list[Job]]]:
    """(client, jobs on the run, at least one). UserError names the runs there are."""
    from adversa.distributed import jobs, launcher

    cluster = cluster_file.read(file)
    run = place(None, run_dir, cluster.asks)
    with launcher.session(cluster) as client:
        found = jobs.of_run(client, run)
        if not found:
            known = sorted({job.run for job in jobs.jobs(client)})
            names = ", ".join(known[:5]) + (" and others" if len(known) > 5 else "")
            raise UserError(
                f"the cluster has had no job on {run}; "
                + (f"it has had jobs on {names}" if known else "nor on any run")
            )
        yield client, found


def _follow(client: Client, job: Job, file: Path, screen: Console) -> Job:
    """Until the job is over. Ctrl-C and SIGTERM end the following, not the job."""
    from adversa.distributed import jobs

    try:
        with _View(job.run, screen) as view:
            ended = jobs.follow(client, job, view.show)
    except KeyboardInterrupt as detached:
        say(screen, f"detached; {job.run} goes on. Come back: {_command('watch', job.run, file)}")
        say(screen, f"Stop it: {_command('stop', job.run, file)}")
        raise typer.Exit(143 if detached.args == ("SIGTERM",) else 130) from None
    if ended.status == "STOPPED":
        say(screen, f"{job.run} was stopped; everything finished is kept")
    elif ended.status == "FAILED" and ended.exit_code is None:  # it never began, or its node died
        say(screen, f"the job failed: {ended.message[:500]}")
    return ended


class _View:
    """What a job says; or, as soon as its run can be read from here (an object store) and on a
    terminal, the live view of the run, and of what the job says its end alone: closing lines, or
    why it failed.
    """

    def __init__(self, run: str, screen: Console) -> None:
        self.run, self.screen = run, screen
        self.lines: list[str] = []
        self.watch: LiveView | None = None

    def __enter__(self) -> _View:
        return self

    def show(self, line: str) -> None:
        if self.watch is None and self.screen.is_terminal:
            self._open()
        if self.watch is None:
            say(self.screen, line)
        elif not PROGRESS.match(line):
            self.lines.append(line)

    def _open(self) -> None:
        from adversa.cli import view
        from adversa.config import load
        from adversa.run.folder import RunDir
        from adversa.storage.path import BucketPath, storage_path

        run = RunDir(storage_path(self.run))
        with contextlib.suppress(UserError):  # not to be read from here, or not yet
            if isinstance(run.root, BucketPath) and run.config.is_file():
                self.watch = view.LiveView(self.screen, load(run.config), run)
                self.watch.__enter__()

    def __exit__(self, *_: object) -> None:
        if self.watch is not None:
            self.watch.__exit__()
            for line in self.lines:
                say(self.screen, line)


def _command(name: str, run: str, file: Path) -> str:
    return shlex.join(["adversa", name, run, "--cluster", str(file)])


def _state(job: Job) -> str:
    words = {
        "PENDING": "starting",
        "RUNNING": "running",
        "STOPPED": "stopped",
        "SUCCEEDED": "finished",
        "FAILED": "failed",
    }
    return words.get(job.status, job.status) + (
        f" (exit code {job.exit_code})" if job.exit_code else ""
    )


def _age(job: Job) -> str:
    from adversa.cli.view import clock

    if job.began is None:
        return "-"
    return (
        f"for {clock(time.time() - job.began)}"
        if job.ended is None
        else f"{clock(time.time() - job.ended)} ago"
    )


# ---- runs on this machine ------------------------------------------------------------------------


def watch_here(config: Config, run: RunDir, screen: Console) -> None:
    """The live view of a run that another process works on, until it no longer does; raises
    typer.Exit: 0 when it is finished.
    """
    from adversa.cli import closing, view
    from adversa.run.status import state_of

    state = state_of(run)[0]
    if state == "running":
        with view.LiveView(screen, config, run):
            while (state := state_of(run)[0]) == "running":
                time.sleep(0.5)
    else:
        screen.print(view.view(config, run))
    if state == "finished":
        closing.closing(screen, run)
    raise typer.Exit(0 if state == "finished" else 1)


def listed_here(folder: Path, screen: Console) -> None:
    """A table of the runs in a folder: state, stage, when something was last heard of them."""
    from adversa.cli import view
    from adversa.run.folder import RunDir
    from adversa.run.status import state_of

    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give the one that run folders lie in")
    rows = []
    for root in sorted(f for f in folder.iterdir() if (f / "config.yaml").is_file()):
        state, said = state_of(RunDir(root))
        heard = said.get("updated")
        age = "-" if heard is None else f"{view.clock(max(0.0, time.time() - heard))} ago"
        rows.append((str(root), state, str(said.get("stage", "")), age))
    _table(screen, rows, f"no run in {folder}")


def _table(screen: Console, rows: list[tuple[str, str, str, str]], none: str) -> None:
    from rich.table import Table
    from rich.text import Text

    if not rows:
        say(screen, none)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "stage", "last change"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    screen.print(table)
