"""What passes between a step and whoever does its work: parts, the work on one, what came of it.

Work is named by its output: part i of a step is the file `part-0000i.parquet` in the step's folder,
written by whoever does the work. A part that is there is not done again, so an engine may be killed
at any time and asked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adversa.storage import files, tables
from adversa.storage.path import StoragePath, names
from adversa.types import Json

Report = Callable[[Json], None]


@dataclass(frozen=True, slots=True)
class Part:
    """A unit of work: its index names its output; `rows` is what it counts for in progress; payload
    is small (ids, paths).

    skip: rows of the part (0 ... rows - 1) that are not to be worked on, and why; what is written
    has them all the same, marked as failed. Only `map_parts` gives such parts, when a row fails.
    """

    index: int
    rows: int
    payload: dict[str, Any] = field(default_factory=dict)
    skip: dict[int, str] = field(default_factory=dict)

    @property
    def wanted(self) -> tuple[int, ...]:
        """The rows that are not skipped."""
        return tuple(r for r in range(self.rows) if r not in self.skip)

    def only(self, rows: Collection[int]) -> Part:
        return replace(self, skip={r: "" for r in range(self.rows) if r not in rows})

    def without(self, bad: Mapping[int, str]) -> Part:
        return replace(self, skip=dict(sorted((self.skip | dict(bad)).items())))


@dataclass(frozen=True)
class TaskStats:
    """What work on a part may return in place of its number of rows: evaluations of the denoiser,
    for progress.
    """

    rows: int
    evaluations: int = 0


@dataclass(frozen=True)
class Done:
    """What came of a part: rows written, seconds one worker spent on it (model loading apart),
    evaluations of the denoiser.
    """

    index: int
    rows: int
    seconds: float
    evaluations: int = 0


@dataclass(frozen=True)
class Failed:
    """A row that was given up: its name and what happened each time it was worked on."""

    name: str
    reason: str


@dataclass
class Share:
    """What the workers of one slot of `map_parts` did; failed: rows that their parts were written
    without. Of tasks that a death cut off: the parts and rows, not the seconds and evaluations.
    """

    parts: int = 0
    rows: int = 0
    seconds: float = 0.0
    evaluations: int = 0
    failed: tuple[Failed, ...] = ()


# Does one part: (part, file to write) -> rows written. Made on the worker by a picklable `make()`,
# which loads models from folders. It leaves out the rows in `part.skip`, and writes nowhere but to
# the file: `map_parts` may call it for a file it throws away.
Work = Callable[[Part, StoragePath], "int | TaskStats"]
Make = Callable[[], Work]
# What a row of a part is called in messages.
Name = Callable[[Part, int], str]


def row_name(part: Part, row: int) -> str:
    return f"row {row} of part {part.index}"


def missing(parts: Sequence[Part], out: StoragePath) -> list[Part]:
    """Parts that are not committed yet. One listing of the folder: a look at each file takes
    seconds for 100,000 of them.
    """
    there = names(out)
    return [p for p in parts if tables.part_name(p.index) not in there]


def do_part(work: Work, part: Part, out: StoragePath) -> Done:
    """Run one part and commit it. The same code on every engine."""
    started = time.perf_counter()
    with files.writing(
        out, "folder", kept=True
    ):  # a worker is not told by which option it was given
        found = work(part, out / tables.part_name(part.index))
    stats = found if isinstance(found, TaskStats) else TaskStats(found)
    return Done(part.index, stats.rows, time.perf_counter() - started, stats.evaluations)
