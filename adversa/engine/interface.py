"""What carries work out: `Engine`, the one seam between the pipeline and where it runs, and what it
is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from adversa.engine.batches import Feed
from adversa.engine.tasks import (
    Done,
    Make,
    Name,
    Part,
    Report,
    Share,
    row_name,
)
from adversa.run.control import RunHandle
from adversa.run.step_folder import Recipe
from adversa.storage.path import StoragePath
from adversa.types import Json

if TYPE_CHECKING:
    from adversa.training.precision import Hardware


@dataclass(frozen=True)
class FitJob:
    """One training: `fit(batches, out=, report=, threads=, committed=[, select=])` writes a model
    folder.

    Batches start at `resume(out)`; metrics["steps"] of what it returns were done. committed(step):
    a training state is on disk.
    """

    out: StoragePath
    recipe: Recipe
    fit: Callable[..., Json]
    resume: Callable[[StoragePath], int]
    feed: Feed
    select: Feed | None = None


class BatchEngine(Protocol):
    """Where work on data runs. Every method returns when its work is done and raises UserError for
    what a user can fix.

    handle: of the run that is worked on, polled between pieces of work; steps poll it as well.
    """

    name: str
    handle: RunHandle

    def map_batches(
        self,
        make: Make,
        parts: Sequence[Part],
        out: StoragePath,
        report: Report,
        model: bool = False,
    ) -> list[Done]:
        """Stateless work over data, each part once (Ray Data). model: it holds a model, and wants a
        GPU where there is one.
        """
        ...

    def tasks(self, model: bool = False) -> int:
        """How many parts `map_batches` does at the same time."""
        ...


class Engine(BatchEngine, Protocol):
    """Where all work of a run is done."""

    def map_parts(
        self,
        make: Make,
        parts: Sequence[Part],
        out: StoragePath,
        report: Report,
        name: Name = row_name,
    ) -> list[Share]:
        """Long work with a loaded model on a pool of workers that may die (Ray actors). What each
        worker did comes back.

        A row that raises, or kills its worker every time, is given up: its part is worked on once
        more, with the row in `Part.skip`. name: of such a row. RuntimeError where too many fail
        (task_queue.py).
        """
        ...

    def fit(self, jobs: Sequence[FitJob]) -> None:
        """Train each job that is not finished, in order (Ray Train fed by Ray Data)."""
        ...

    def search(self, trials: Sequence[Trial], report: Report) -> None:
        """Do every trial that is not finished, as many at a time as there is room for (Ray Tune).
        UserError where some failed.
        """
        ...

    def samplers(self) -> int:
        """How many parts `map_parts` does at the same time."""
        ...

    def hardware(self) -> Hardware:
        """What model steps run on: of this machine, or of one worker of the cluster."""
        ...

    def close(self) -> None: ...


Tell = Callable[[Json], None]


@dataclass(frozen=True)
class Trial:
    """`work(engine, tell)` fills `out`, with the engine of the actor it runs on (one torch thread,
    or one GPU).

    needs: step folders that must be finished first. tell takes a training's progress while it goes
    on. name: for people.
    """

    name: str
    out: StoragePath
    work: Callable[[Engine, Tell], object]
    needs: tuple[StoragePath, ...] = ()
