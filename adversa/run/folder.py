"""The run folder: where each step lies."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adversa.storage import files
from adversa.storage.path import BucketPath, StoragePath, relative
from adversa.types import Json, UserError, digest


def classes_of(data: StoragePath) -> list[str]:
    found = files.read_json(data / "classes.json")
    assert found is not None, f"{data} is not prepared"
    classes: list[str] = found["classes"]
    return classes


def split_hash(data: StoragePath) -> str:
    found: str = (files.read_json(data / "split.json") or {})["split_hash"]
    return found


@dataclass(frozen=True)
class RunDir:
    """Storage paths of a run. `round-00N/<arm>` of the arm `real` is always round
    0: it never changes.
    """

    root: StoragePath

    @property
    def config(self) -> StoragePath:
        return self.root / "config.yaml"

    @property
    def recipe(self) -> StoragePath:
        return self.root / "run.json"

    @property
    def data(self) -> StoragePath:
        return self.root / "data"

    @property
    def denoiser(self) -> StoragePath:
        return self.root / "denoiser"

    @property
    def codec(self) -> StoragePath:
        return self.root / "codec"

    def latents(self, role: str) -> StoragePath:
        return self.root / "latents" / role

    @property
    def judge(self) -> StoragePath:
        return self.root / "judge"

    @property
    def features(self) -> StoragePath:
        """What two classifiers make of the real images, a folder for each role: the filter measures
        distances in them.
        """
        return self.root / "features"

    @property
    def limits(self) -> StoragePath:
        """What a generated image must keep to, as measured on real images."""
        return self.root / "limits"

    @property
    def test(self) -> StoragePath:
        return self.root / "test"

    @property
    def openings(self) -> StoragePath:
        """Every time `test` was opened: outside its folder, which may be deleted."""
        return self.root / "openings.json"

    @property
    def select(self) -> StoragePath:
        """What the classifiers of `test` say of `select`: where thresholds are set."""
        return self.root / "select"

    @property
    def summary(self) -> StoragePath:
        return self.root / "summary.json"

    @property
    def status(self) -> StoragePath:
        return self.root / "status.json"

    def round(self, number: int, step: str = "") -> StoragePath:
        return self.root / f"round-{number:03d}" / step

    def arm(self, number: int, arm: str, seed: int | None = None) -> StoragePath:
        folder = self.round(number) / arm
        return folder if seed is None else folder / f"seed-{seed}"

    def scorecard(self, step: StoragePath, arm: str, seed: int) -> StoragePath:
        """Of an arm's classifier, in the folder of the step that scored it: an evaluation of a
        round, or `test`.
        """
        return step / arm / f"seed-{seed}" / "scorecard.json"

    def inside(self, name: str) -> StoragePath:
        """A place of the run by its relative name, as a file of the run says it. UserError for one
        that would lie elsewhere.
        """
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{self.root} names a file outside of itself ({name}); not read")
        return self.root / name

    def name_of(self, folder: StoragePath) -> str:
        return relative(folder, self.root)


def run_id(recipe: Json) -> str:
    """The same for the same question on any machine: the recipe without the place of the data."""
    data = {k: v for k, v in recipe["data"].items() if k != "path"}
    return digest(json.dumps(recipe | {"data": data}, sort_keys=True), size=8)


def check_links(root: StoragePath, below: str = "") -> None:
    """UserError where a link in a run (below one of its folders) leads out of it: what is written
    there would be written elsewhere.

    Who owns the run may put all of it elsewhere and link that.
    """
    if not isinstance(root, Path):
        return
    real = root.resolve()
    waiting = [root / below] if (root / below).is_dir() else []
    if below and waiting and not waiting[0].resolve().is_relative_to(real):
        raise UserError(
            f"{waiting[0]} is a link that leads out of the run; put the folder itself there"
        )
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(real):
                    raise UserError(
                        f"{entry.path} is a link that leads out of the run; put the file "
                        "itself there, or link the whole run"
                    )
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))


def remove_partial_files(run: RunDir) -> None:
    """Remove what a killed process left half-written: hidden files that end in its process id. The
    caller holds the run's lock.

    An object store has no such files.
    """
    if isinstance(run.root, BucketPath):
        return
    for path in run.root.rglob(".*"):
        if re.fullmatch(r"\..+\.\d+", path.name) and path.is_file():
            path.unlink(missing_ok=True)
