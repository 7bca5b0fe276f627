"""What a person sees of a run: a live view on a terminal, plain lines elsewhere, and `adversa
status`.

All of it is read from the run folder.
"""

from __future__ import annotations

import contextlib
import threading
import time
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from adversa.cli.console import say
from adversa.config import Config
from adversa.pipeline import precision
from adversa.pipeline.folders import last_round, models_of, trained
from adversa.pipeline.stage import PlannedStage
from adversa.pipeline.stages import plan
from adversa.run import control, step_folder
from adversa.run import status as run_status
from adversa.run.folder import RunDir
from adversa.run.status import state_of
from adversa.storage import files
from adversa.storage.path import StoragePath, StoreError
from adversa.sweep import grid
from adversa.sweep import view as sweep_view

LOG_SECONDS = 15.0
SHARES_SHOWN = 8
RUNNING_SHOWN = 3
SLOW = 0.05  # a second; below it a rate is told by the minute


@dataclass(frozen=True)
class RunningStep:
    """A step folder that is being worked on. details: what else its progress says, of a pool of
    workers.
    """

    name: str
    done: float
    total: float
    unit: str
    rate: float
    elapsed: float
    details: tuple[str, ...] = ()

    @property
    def eta(self) -> float | None:
        if (
            self.unit == "trial" and self.done < self.total / 8
        ):  # the first are the longest: whole denoisers
            return None
        return (self.total - self.done) / self.rate if self.rate > 0 else None

    def line(self) -> str:
        text = f"{self.name}: {self.done:.0f} of {self.total:.0f} {self.unit}s"
        pace = (
            f"{self.rate:.1f} {self.unit}s/s"
            if self.rate >= SLOW
            else f"{60 * self.rate:.1f} {self.unit}s/min"
        )
        text += f", {pace}, {clock(self.eta)} left" if self.eta is not None else ""
        return "; ".join([text, *self.details])


def tasks(run: RunDir, stage: PlannedStage) -> list[RunningStep]:
    """The steps of a stage that have begun and are not finished."""
    found = []
    for folder in stage.folders if stage.progress is None else (stage.progress,):
        state = (
            files.read_json(folder / step_folder.PROGRESS)
            if not step_folder.is_finished(folder)
            else None
        )
        if state is not None and "done" in state:
            # of the pool: lately, not since its workers began to start
            rate = state["images_per_second" if "images_per_second" in state else "rate"]
            unit = state.get("unit", "step")
            found.append(
                RunningStep(
                    run.name_of(folder),
                    state["done"],
                    state["total"],
                    unit,
                    rate,
                    state["elapsed"],
                    details(state),
                )
            )
    return found


def details(state: dict[str, Any]) -> tuple[str, ...]:
    """Of a pool's progress: evaluations a second, each worker's share, rows that were given up,
    what it waits for.
    """
    found = []
    if state.get("evaluations_per_second"):
        found.append(f"{state['evaluations_per_second']:.0f} evaluations/s")
    if "shares" in state:
        found += shares(state["shares"], state["workers"])
    if state.get("failed"):
        found.append(
            f"{state['failed']} failed"
            + (f", the last {state['last_failed']}" if "last_failed" in state else "")
        )
    if state.get("stopped"):
        found.append(f"{state['stopped']} stopped early")
    if names := state.get("running"):
        found.append(
            "now "
            + ", ".join(names[:RUNNING_SHOWN])
            + (", ..." if len(names) > RUNNING_SHOWN else "")
        )
    return (*found, *([state["note"]] if state.get("note") else []))


def shares(rows: dict[str, int], workers: int) -> list[str]:
    """Each worker's share of what they did together; of many the least and the largest."""
    total = sum(rows.values())
    if total == 0:
        return [f"{workers} workers up"] if workers else ["workers are starting"]
    each = [100 * n / total for n in rows.values()]
    if len(each) == 1:
        return []
    if len(each) <= SHARES_SHOWN:
        return [f"{workers} workers: {' '.join(f'{share:.0f}' for share in each)}%"]
    return [f"{workers} workers: {min(each):.1f} to {max(each):.1f}% each"]


def stage_table(config: Config, run: RunDir, state: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    every = _plan(config, run)
    current = next((s for s in every if not s.is_finished), None)
    for stage in every:
        if stage is not current:
            table.add_row(
                "[green]done[/]" if stage.is_finished else "[dim]to do[/]",
                stage.title,
                _seconds(stage),
                "",
            )
            continue
        active = tasks(run, stage)
        marks = {
            "running": "[yellow]now[/]",
            "paused": "[cyan]paused[/]",
            "failed": "[red]failed[/]",
            "killed": "[red]cut off[/]",
        }
        mark = marks.get(state, "[cyan]cut off[/]" if active else "next")
        bar: RenderableType = ""
        if active:
            bar = ProgressBar(total=max(active[-1].total, 1), completed=active[-1].done, width=24)
        what = active[-1].line() if active else "starting" if state == "running" else ""
        table.add_row(
            mark, stage.title, Text(what), bar
        )  # text as it is: it may hold an error's words
    return table


def _plan(config: Config, run: RunDir) -> list[PlannedStage]:
    """The stages of the command that works on the run."""
    command = (files.read_json(run.status) or {}).get("command")
    if command == "order":
        from adversa.generation import job  # numpy and pyarrow: `status` starts without them

        return job.stages_of(run)
    return grid.plan(config, run) if command == "sweep" else plan(config, run, command)


def score_table(config: Config, run: RunDir) -> Table | None:
    """Balanced accuracy of each trained classifier so far."""
    table = Table(title="balanced accuracy so far", title_justify="left", box=None, pad_edge=False)
    for column in ("classifier", "select", "mine (optimistic)", "test"):
        table.add_column(column)
    scored = {role: _scored(config, run, role) for role in ("mine", "test")}
    for number in range(config.rounds + 1):
        for folder in trained(config, run, number):
            manifest = files.read_json(folder / step_folder.MANIFEST)
            if manifest is None:
                continue
            select = manifest["metrics"].get("select_balanced_accuracy")
            values = [select, *(scored[role].get(folder) for role in scored)]
            table.add_row(
                run.name_of(folder.parent), *("-" if v is None else f"{v:.3f}" for v in values)
            )
    return table if table.row_count else None


def _scored(config: Config, run: RunDir, role: str) -> dict[StoragePath, float]:
    """Classifier folder -> balanced accuracy on a role, where it was scored."""
    last, found = last_round(config), {}
    rounds = {n: run.round(n, "evaluate") for n in range(last + 1)}
    for number, step in ({last: run.test} if role == "test" else rounds).items():
        if not step_folder.is_finished(step):
            continue
        for arm, seed, _, folder in models_of(config, run, number):
            if (card := files.read_json(run.scorecard(step, arm, seed))) is not None:
                found[folder] = card["metrics"]["balanced_accuracy"]
    return found


def view(config: Config, run: RunDir) -> RenderableType:
    state, status = state_of(run)
    colours = {
        "running": "yellow",
        "paused": "cyan",
        "finished": "green",
        "failed": "red",
        "killed": "red",
    }
    wall = clock(run_status.wall_seconds(run))
    again, lost = control.restarts(run)
    restarted = (
        f", {again} restart{'s' if again > 1 else ''} after {clock(lost)} without work"
        if again
        else ""
    )
    head = Text.assemble(
        (str(run.root), "bold"),
        "  ",
        (state, colours.get(state, "cyan")),
        f"  {wall} so far{restarted}",
    )
    items: list[RenderableType] = [head]
    if said := precision.line(run):
        items.append(Text(said, "dim"))
    items.append(stage_table(config, run, state))
    scores = (
        sweep_view.table(config, run)
        if status.get("command") == "sweep"
        else score_table(config, run)
    )
    if scores is not None:
        items += ["", scores]
    if status.get("error") and state == "failed":
        items += ["", Text(status["error"], "red")]
    return Group(*items)


def _reachable() -> contextlib.AbstractContextManager[None]:
    """A store that cannot be reached now is asked again at the next look; the step that is running
    says so itself.
    """
    return contextlib.suppress(StoreError)


class LiveView:
    """Shows a run while it goes on, from a thread that only reads the folder."""

    def __init__(self, console: Console, config: Config, run: RunDir) -> None:
        self.console, self.config, self.run = console, config, run
        self.stage: PlannedStage | None = None
        self.stopped, self.precision = threading.Event(), ""
        # In the command's context, which reads each file once.
        show = partial(copy_context().run, self._live if console.is_terminal else self._log)
        self.thread = threading.Thread(target=show, daemon=True)

    def __enter__(self) -> LiveView:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    def _live(self) -> None:
        with Live(
            view(self.config, self.run), console=self.console, refresh_per_second=4, transient=False
        ) as live:
            took = 0.0
            while not self.stopped.wait(
                max(0.5, 3 * took)
            ):  # of an object store, a look takes a second
                began = time.monotonic()
                with _reachable():
                    live.update(view(self.config, self.run))
                took = time.monotonic() - began
            with _reachable():
                live.update(view(self.config, self.run))

    def _log(self) -> None:
        seen, spoken = "", 0.0
        while True:
            last = self.stopped.wait(0.5 if isinstance(self.run.root, Path) else 2)
            with _reachable():
                seen, spoken = self._look(seen, spoken)
            if last:
                return

    def _look(self, seen: str, spoken: float) -> tuple[str, float]:
        """Say what is new since `spoken`: (the name of what goes on, when something was said
        last).
        """
        status = files.read_json(self.run.status) or {}
        if self.stage is None or self.stage.title != status.get("stage"):
            every = _plan(self.config, self.run)
            self.stage = next((s for s in every if s.title == status.get("stage")), None)
        stage = self.stage
        if stage is None:
            return seen, spoken
        if not self.precision and (said := precision.line(self.run)):
            self.precision = said
            self._say(said)
        active = tasks(self.run, stage)
        name = active[-1].name if active else stage.title
        name += " paused" if status.get("state") == "paused" else ""
        if name != seen:
            news = f"{stage.title}: {name}" if active else name
        elif active and time.monotonic() - spoken > LOG_SECONDS:
            news = active[-1].line()
        else:
            return seen, spoken
        self._say(news)
        return name, time.monotonic()

    def _say(self, news: str) -> None:
        say(self.console, f"{time.strftime('%H:%M:%S')} {news}")


def clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes >= 60
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{rest} s"
    )


def _seconds(stage: PlannedStage) -> str:
    found = [files.read_json(f / step_folder.MANIFEST) for f in stage.folders]
    known = [m["seconds"] for m in found if m is not None]
    return clock(sum(known)) if known else ""
