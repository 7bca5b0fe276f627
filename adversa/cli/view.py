"""What a person sees of a run: a live view on a terminal, plain lines elsewhere, and `adversa
status`.

All of it is read from the run folder.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from adversa.cli.console import say
from adversa.config import Config
from adversa.pipeline.folders import last_round, models_of, trained
from adversa.pipeline.stage import PlannedStage
from adversa.pipeline.stages import plan
from adversa.run import control, step_folder
from adversa.run import status as run_status
from adversa.run.folder import RunDir
from adversa.run.status import state_of
from adversa.storage import files
from adversa.storage.path import StoreError
from adversa.sweep import grid
from adversa.sweep import view as sweep_view
from adversa.types import ARMS, BEFORE

LOG_SECONDS = 15.0
SHARES_SHOWN = 8
RUNNING_SHOWN = 3
SLOW = 0.05  # a second; below it a rate is told by the minute
MEASURES = ("precision", "recall", "density", "coverage")


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


def _scored(config: Config, run: RunDir, role: str) -> dict[Path, float]:
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
    items: list[RenderableType] = [head, stage_table(config, run, state)]
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
        self.stopped = threading.Event()
        self.thread = threading.Thread(
            target=self._live if console.is_terminal else self._log, daemon=True
        )

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
        stage = next(
            (s for s in _plan(self.config, self.run) if s.title == status.get("stage")), None
        )
        if stage is None:
            return seen, spoken
        active = tasks(self.run, stage)
        name = active[-1].name if active else stage.title
        name += " paused" if status.get("state") == "paused" else ""
        if name != seen:
            news = f"{stage.title}: {name}" if active else name
        elif active and time.monotonic() - spoken > LOG_SECONDS:
            news = active[-1].line()
        else:
            return seen, spoken
        say(self.console, f"{time.strftime('%H:%M:%S')} {news}")
        return name, time.monotonic()


TESTED = {  # metric on test -> the heading of its column
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "specificity": "specificity, mean",
    "auroc_macro": "macro AUROC",
}
GAP = 2  # spaces between columns
Column = tuple[
    str, list[tuple[str, str]]
]  # a heading, and of each arm the value and what stands in brackets behind or below it


def closing(console: Console, run: RunDir) -> None:
    """The last lines of a finished run: the arms before and after, the verdict, where the report
    lies.
    """
    summary = files.read_json(run.summary)
    if summary is None:
        return
    arms = [arm for arm in ARMS if arm in summary["arms"]]
    if summary["before"]["test"] != summary["arms"]["real"]["test"]:
        arms = [BEFORE, *arms]
    names = [
        "real (before)" if arm == arms[0] else "guided (after)" if arm == "guided" else arm
        for arm in arms
    ]
    times = summary.get("test_openings", 1)
    opened = "test, opened once" if times < 2 else f"test, opened {times} times"
    tested: list[Column] = [
        (name, [_score(summary, arm, "test", metric) for arm in arms])
        for metric, name in TESTED.items()
    ]
    mined: list[Column] = [
        ("balanced accuracy", [_score(summary, arm, "mine", "balanced_accuracy") for arm in arms])
    ]
    mined.append(("synthetic images", [(str(summary["used"].get(arm, 0)), "") for arm in arms]))
    if any(summary["added"][arm] != n for arm, n in summary["used"].items()):
        repeats = [str(summary["added"].get(arm, 0) - summary["used"].get(arm, 0)) for arm in arms]
        mined.append(("images repeated", [(n, "") for n in repeats]))
    for title, columns in (
        (opened, tested),
        ("mine, optimistic, and images added to the real ones", mined),
    ):
        console.print(Text(title, "italic"))
        for table in fitted(names, columns, console.width):
            console.print(table)
    rejected = ", ".join(f"{n} {reason}" for reason, n in summary["rejected"].items()) or "none"
    say(
        console,
        f"generated {summary['generated']}, accepted {summary['accepted']}; rejected: {rejected}",
    )
    for line in [summary["verdict_sentence"], *(f"note: {note}" for note in summary["notes"])]:
        say(console, line)
    say(console, f"report: {_short(run.root / 'report.html')}")


def quality(console: Console, run: RunDir, result: dict[str, Any]) -> None:
    """How good the denoiser's samples are, beside what real images of `train` score: all that is
    within reach.
    """
    samples, train, images = result["samples"], result["train"], result["images"]
    table = Table(box=None, pad_edge=False)
    for column in ("", "images", "KID x 1000", *MEASURES):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, of, n in (
        ("samples", samples, images["sample"]),
        ("real (train)", train, images["train"]),
    ):
        kid = f"{1000 * of['kid']:.2f} +- {1000 * of['kid_std']:.2f}"
        table.add_row(name, str(n), kid, *(_fixed(of[m]) for m in MEASURES))
    table.add_row(Text("by class", "italic"))
    for name, row in samples["classes"].items():
        table.add_row(
            Text(f"  {name}"),
            f"{row['fake']} ({row['real']} real)",
            "",
            *(_fixed(row[m]) for m in MEASURES),
        )
    console.print(table)
    roles = " and ".join(result["held_out"])
    say(
        console,
        f"against {images['real']} held-out images ({roles}), features of "
        f"{result['features']}, guidance {result['guidance']:g}; "
        f"a class needs more than {result['neighbours']} images on both sides"
        + (
            f"; validation loss {result['validation_loss']:.4f}"
            if result["validation_loss"] is not None
            else ""
        ),
    )
    if result["not_finite"]:
        say(
            console, f"{result['not_finite']} samples are not finite: they count, as black pictures"
        )
    say(console, f"samples: {_short(run.inside(result['grid']))}")


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(path: Path) -> Path:
    return (
        path.relative_to(Path.cwd())
        if isinstance(path, Path) and path.is_relative_to(Path.cwd())
        else path
    )


def fitted(names: list[str], columns: list[Column], width: int) -> list[Table]:
    """A row an arm, a column a metric: in one table, under headings of several lines, in tables of
    two columns, or at last with the brackets below the values, whichever is the first to fit.
    """
    pairs = [columns[i : i + 2] for i in range(0, len(columns), 2)]
    ways = [
        ([columns], False, False),
        ([columns], True, False),
        (pairs, False, False),
        ([columns], True, True),
        (pairs, True, True),
    ]
    shown = [
        [_lines(names, part, tall, stacked) for part in parts] for parts, tall, stacked in ways
    ]
    return [
        _arms(of)
        for of in next((w for w in shown if all(_width(of) <= width for of in w)), shown[-1])
    ]


def _lines(names: list[str], columns: list[Column], tall: bool, stacked: bool) -> list[list[str]]:
    """Each column's cells, its heading first. tall: a heading has a line a word; stacked: a bracket
    is below its value.
    """
    headings = [name.replace(" ", "\n") if tall else name for name, _ in columns]
    cells = [
        [("\n" if stacked else " ").join(filter(None, cell)) for cell in of] for _, of in columns
    ]
    return [["", *names], *([heading, *of] for heading, of in zip(headings, cells, strict=True))]


def _width(columns: list[list[str]]) -> int:
    """Characters that the table is wide."""
    return sum(
        max(cell_len(line) for cell in of for line in cell.split("\n")) for of in columns
    ) + GAP * (len(columns) - 1)


def _arms(columns: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for heading, *_ in columns:
        table.add_column(Text(heading))
    for row in zip(*(cells for _, *cells in columns), strict=True):
        table.add_row(*map(Text, row))
    return table


def _score(summary: dict[str, Any], arm: str, role: str, metric: str) -> tuple[str, str]:
    """A metric of an arm and its 95% interval, "" where there is none; specificity is the mean over
    classes.
    """
    values = summary["before"][role] if arm == BEFORE else summary["arms"][arm][role]
    if metric == "specificity":
        classes = [v for k, v in values.items() if k.startswith("specificity/")]
        return (f"{sum(classes) / len(classes):.3f}" if classes else "-", "")
    if metric not in values:
        return "-", ""
    interval = (summary["intervals_before"] if arm == BEFORE else summary["intervals"][arm])[
        role
    ].get(metric)
    return f"{values[metric]:.3f}", f"({interval[0]:.2f}-{interval[1]:.2f})" if interval else ""


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
