"""The commands that use a finished run's classifiers on pictures from elsewhere. `cli.py` declares
them.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adversa.api import Run
from adversa.cli.console import progress, say
from adversa.config import Config, load
from adversa.engine.interface import Engine
from adversa.engine.tasks import Done, Make, Part, Report
from adversa.run import file_lock, status
from adversa.run.folder import RunDir, check_links
from adversa.storage import files, once
from adversa.storage.path import StoragePath, storage_path
from adversa.types import ARMS, BEFORE, UserError

if TYPE_CHECKING:
    from adversa.external.cohort import ExternalCohort

MakeEngine = Callable[[Config, RunDir], Engine]
SHOWN = ("balanced_accuracy", "accuracy", "auroc_macro", "sensitivity/", "auroc/", "sensitivity@")
NAMES = {
    "decoded": "reading the pictures",
    ".looks": "reading the run's own pictures",
    "scores": "scoring",
    "predicted": "scoring",
}


def run_of(
    words: Sequence[str] | None,
    on: Path | None,
    run_dir: StoragePath | None,
    with_on: dict[str, Any],
    without: dict[str, Any],
) -> StoragePath | None:
    """The run that `adversa evaluate` is to score on another set; None: the command is about a
    configuration, as without --on.

    with_on, without: options that go with --on only, and those that do not go with it.
    """
    words = words or []
    if on is None:
        if given := [name for name, value in with_on.items() if value is not None]:
            raise UserError(f"{given[0]} goes with --on CSV_OR_FOLDER: what to score the run on")
        if len(words) == 1 and (storage_path(words[0]) / "config.yaml").is_file():
            raise UserError(
                f"{words[0]} is a run: go on with it by --run-dir {words[0]}, or say with "
                "--on SET what to score it on"
            )
        return None
    if given := [name for name, value in without.items() if value is not None]:
        raise UserError(f"{given[0]} does not go with --on: a finished run is scored as it is")
    roots = [*map(storage_path, words), *([run_dir] if run_dir else [])]
    if len(roots) != 1:
        raise UserError(
            "--on scores one finished run; write adversa evaluate RUN --on CSV_OR_FOLDER"
        )
    return roots[0]


def _opened(root: StoragePath, overrides: Sequence[str] = ()) -> tuple[RunDir, Config]:
    """The run of a folder. UserError where it is none."""
    run = Run(root).folder
    return run, load(run.config, list(overrides))


@once.command()
def evaluate_on(
    root: StoragePath,
    on: Path,
    labels_map: Path | None,
    crop: str | None,
    name: str | None,
    overrides: list[str],
    make_engine: MakeEngine,
    screen: Console,
) -> None:
    """`adversa evaluate RUN --on SET`: every arm's classifiers on an external cohort."""
    from adversa.external import cohort, evaluate, labels, predict, report
    from adversa.report import page
    from adversa.run.folder import classes_of

    predict.check_options(crop)
    cohort.check_overrides(overrides)
    run, config = _opened(root, overrides)
    evaluate.models(config, run)
    translation = labels.read(labels_map, classes_of(run.data))
    data = cohort.section(config, on, overrides, crop)
    outside = cohort.listing(data, translation)
    external = cohort.ExternalCohort(run, config, data, translation, _named(name, on), outside)
    check_links(run.root, "external")
    with files.writing(external.folder, "RUN"):
        external.folder.mkdir(parents=True, exist_ok=True)
    work = RunDir(external.folder)
    with file_lock.lock(work), files.writing(external.folder, "RUN"):
        status.set_status(work, "running", "external")  # who holds the lock
        try:
            _score(external, make_engine, screen)
        except BaseException:
            evaluate.forget(external)
            raise
        found = report.reported(external)
        if found is None:
            screen.print("computing figures and intervals", highlight=False)
            found = report.write(external)
            if run.summary.exists() and not file_lock.is_locked(run):
                page.write(run.root)  # the run's own report names the set
        status.set_status(work, "finished", "external")
    show_external(screen, found)
    say(screen, f"report: {external.folder / 'report.md'}")


def _score(external: ExternalCohort, make_engine: MakeEngine, screen: Console) -> None:
    from adversa.external import evaluate

    if not evaluate.is_scored(external):
        with (
            progress(screen) as show,
            closing(make_engine(external.config, external.run)) as engine,
        ):
            evaluate.score(external, _Reporting(engine, show), partial(say, screen))


def _named(name: str | None, on: Path) -> str:
    if name is None:
        return re.sub(r"[^\w.-]+", "-", on.absolute().stem)[:100].strip(".-") or "set"
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise UserError(
            f"--name {name}: give letters, digits, `-`, `_` and `.`, at most 100, the "
            "first a letter or digit"
        )
    return name


def show_external(screen: Console, found: dict[str, Any]) -> None:
    """A table of the arms, the comparisons' words, and the notes."""
    from adversa.external import report
    from adversa.external.clusters import counted

    arms = [arm for arm in ARMS if arm in found["arms"]]
    if found["before"] != found["arms"]["real"]:
        arms = [BEFORE, *arms]
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for arm in arms:
        table.add_column(
            Text("real (before)" if arm == BEFORE else arm), min_width=len("(0.00-0.00)")
        )
    for metric, title in report.rows(found):
        if metric.startswith(SHOWN):
            table.add_row(Text(title), *(report.value(found, arm, metric) for arm in arms))
    unit, n = found["clusters"]["by"], found["clusters"]["n"]
    text = f"{found['run']} on {found['set']}: {counted(found['images']['scored'], 'image')}"
    text += f", {counted(n, unit)}" if unit != "image" else ""
    screen.print(Text(text, "italic"))
    screen.print(table)
    for line in [found["verdict_sentence"], *(f"note: {note}" for note in found["notes"])]:
        say(screen, line)


def predict(
    root: StoragePath,
    names: Sequence[str],
    arm: str | None,
    out: Path,
    crop: str | None,
    on_error: str,
    force: bool,
    make_engine: MakeEngine,
    screen: Console,
    aside: Console,
) -> None:
    """`adversa predict RUN IMAGES...`: probabilities to a CSV. aside: where what is not the result
    is said (stderr).
    """
    from adversa.external import predict

    predict.check_options(crop, on_error)
    run, config = _opened(root)
    chosen = predict.arm_of(arm, config, run)
    with files.writing(out, "--out"):
        if out.is_dir():
            raise UserError(f"--out {out} is a folder; give the name of a CSV file")
        if out.exists() and not force:
            raise UserError(
                f"--out {out} is there already; give another name, or --force to overwrite it"
            )
    models, classes = predict.models_of(chosen, config, run)
    paths = predict.listed(names)
    _may_overwrite(out, paths, run)
    data = config.data.model_copy(update={"crop": crop or config.data.crop})
    out = out.absolute()
    with files.writing(out.parent, "--out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the result, which can be written: the run may be on a disk that cannot. All nodes
        # of a cluster must see it.
        with (
            tempfile.TemporaryDirectory(prefix=".predict-", dir=out.parent) as temporary,
            progress(aside) as show,
            closing(make_engine(config, run)) as engine,
        ):
            parts = Path(temporary) / "predicted"
            found = predict.predict(
                _Reporting(engine, show), models, data, paths, parts, on_error, lambda _: None
            )
        files.replace_bytes(out, predict.table(found, classes).encode())
    seeds = f"{len(models)} classifier{'s' if len(models) > 1 else ''}"
    why = "" if arm else ", the arm the run is about"
    say(aside, f"arm {chosen}{why}: {seeds}, the mean of their probabilities")
    say(screen, f"{len(found.paths)} images: {out}")
    if found.problems:
        lines = [
            f"left out: {len(found.problems)} files that cannot be read",
            *(f"  {path}: {why}" for path, why in found.problems),
        ]
        for line in lines:
            say(aside, line)


def _may_overwrite(out: Path, paths: Sequence[str], run: RunDir) -> None:
    """UserError where --force would destroy more than an earlier answer: one of the images, a file
    of the run, or what is no file at all.
    """
    if out.exists() and not out.is_file():
        raise UserError(f"--out {out} is no file; give the name of a CSV file")
    if any(out.exists() and Path(p).exists() and out.samefile(p) for p in paths):
        raise UserError(f"--out {out} is one of the images; give another name")
    if isinstance(run.root, Path) and out.absolute().resolve().is_relative_to(run.root.resolve()):
        raise UserError(f"--out {out} lies in the run's folder; give a place outside of it")


# ---- progress ------------------------------------------------------------------------------------


class _Reporting:
    """An engine that tells a `show` how far its work is."""

    def __init__(self, engine: Engine, show: Callable[[str, float, float], None]) -> None:
        self.engine, self.show = engine, show
        self.name, self.handle = engine.name, engine.handle

    def map_batches(
        self,
        make: Make,
        parts: Sequence[Part],
        out: StoragePath,
        report: Report,
        model: bool = False,
    ) -> list[Done]:
        def both(state: dict[str, Any]) -> None:
            report(state)
            self.show(NAMES.get(out.name, out.name), state["done"], state["total"])

        return self.engine.map_batches(make, parts, out, both, model)

    def tasks(self, model: bool = False) -> int:
        return self.engine.tasks(model)
