"""What a stage of a run is: a row of the table (stages.py), and its turn in a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from adversa.config import Config
from adversa.engine.interface import Engine
from adversa.pipeline.arms import Added
from adversa.run.folder import RunDir
from adversa.run.step_folder import is_finished
from adversa.storage.path import StoragePath

Page = Callable[[StoragePath], StoragePath]  # writes the page of a run: its folder -> the file
EVERYTHING = ("",)  # every key of the configuration


@dataclass(frozen=True)
class Output:
    """A step's folder, finished once it has its manifest, or a file, finished once it is there.

    reads: the keys of the configuration ("mix", "denoiser.flips") that it is made of, beside those
    of the outputs that it reads.
    """

    path: StoragePath
    reads: tuple[str, ...] = EVERYTHING
    kind: Literal["step", "file"] = "step"

    @property
    def is_finished(self) -> bool:
        return is_finished(self.path) if self.kind == "step" else self.path.exists()


@dataclass(frozen=True)
class PlannedStage:
    """A stage in its turn. round: 0 before the first round and after the last.

    progress: the folder whose progress.json tells of all outputs, where there are too many to look
    into each.
    """

    name: str
    round: int
    outputs: tuple[Output, ...]
    progress: StoragePath | None = None

    @property
    def is_finished(self) -> bool:
        return all(o.is_finished for o in self.outputs)

    @property
    def title(self) -> str:
        return f"round {self.round}: {self.name}" if self.round else self.name

    @property
    def folders(self) -> tuple[StoragePath, ...]:
        """Those of its steps."""
        return tuple(o.path for o in self.outputs if o.kind == "step")


@dataclass(frozen=True)
class StageContext:
    """What a stage works with. config: with the settings of the round. run_id: what its request ids
    are made of. added: in the round, of a ratio that its sweep chooses the caps alone. page: writes
    the report. reopen: `test` may be opened again.
    """

    config: Config
    dir: RunDir
    engine: Engine
    round: int
    run_id: str
    added: Added
    page: Page
    reopen: bool = False


@dataclass(frozen=True)
class Stage:
    """A row of the table.

    outputs: of a round, in the order they are made. rounds: those it is done in, of a
    configuration; 0 stands for a stage outside of rounds, which come after those of `phase` 0 and
    before those of `phase` 2. quality: it belongs to the evaluation of the denoiser, "only" or
    "too".
    """

    name: str
    run: Callable[[StageContext], None]
    outputs: Callable[[Config, RunDir, int], tuple[Output, ...]]
    rounds: Callable[[Config], range]
    phase: Literal[0, 1, 2] = 1
    quality: Literal["", "too", "only"] = ""
