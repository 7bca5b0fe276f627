"""What is printed at the end: of a finished run its arms and its verdict, of `evaluate denoiser`
how good the samples are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adversa.cli.console import say
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.storage.path import StoragePath
from adversa.types import ARMS, BEFORE

MEASURES = ("precision", "recall", "density", "coverage")
TESTED = {  # metric on test -> the heading of its column
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "specificity": "specificity, mean",
    "auroc_macro": "macro AUROC",
}
WIDE = 80  # characters of a terminal for all columns
Column = tuple[str, list[str]]  # a heading, and the cell of each arm


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
    mined.append(("synthetic images", [str(summary["used"].get(arm, 0)) for arm in arms]))
    if any(summary["added"][arm] != n for arm, n in summary["used"].items()):
        repeats = [str(summary["added"].get(arm, 0) - summary["used"].get(arm, 0)) for arm in arms]
        mined.append(("images repeated", repeats))
    for title, columns in (
        (opened, tested),
        ("mine, optimistic, and images added to the real ones", mined),
    ):
        console.print(Text(title, "italic"))
        for table in tables(names, columns, console.width):
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


def _short(path: StoragePath) -> StoragePath:
    return (
        path.relative_to(Path.cwd())
        if isinstance(path, Path) and path.is_relative_to(Path.cwd())
        else path
    )


def tables(names: list[str], columns: list[Column], width: int) -> list[Table]:
    """A row an arm, a column a metric: in one table, or on a narrow terminal in tables of two
    columns. rich breaks headings and values at their spaces.
    """
    step, found = len(columns) if width >= WIDE else 2, []
    for i in range(0, len(columns), step):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        for heading, cells in columns[i : i + step]:
            longest = max(len(word) for text in (heading, *cells) for word in text.split())
            table.add_column(Text(heading), min_width=longest)
        for row in zip(names, *(cells for _, cells in columns[i : i + step]), strict=True):
            table.add_row(*map(Text, row))
        found.append(table)
    return found


def _score(summary: dict[str, Any], arm: str, role: str, metric: str) -> str:
    """A metric of an arm with its 95% interval, where there is one; specificity is the mean over
    classes.
    """
    values = summary["before"][role] if arm == BEFORE else summary["arms"][arm][role]
    if metric == "specificity":
        classes = [v for k, v in values.items() if k.startswith("specificity/")]
        return f"{sum(classes) / len(classes):.3f}" if classes else "-"
    if metric not in values:
        return "-"
    interval = (summary["intervals_before"] if arm == BEFORE else summary["intervals"][arm])[
        role
    ].get(metric)
    return f"{values[metric]:.3f}" + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else "")
