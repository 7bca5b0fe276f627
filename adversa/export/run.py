"""What a run made, for others: the images that passed the filter as a data set, each arm's
classifiers as models, with cards.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from adversa.config import Config
from adversa.curate.filter import NOT_FINITE, NOT_GENERATED
from adversa.export import dataset_card, images, run_card
from adversa.export import models as export_models
from adversa.export.formats import FORMATS, SHARD, folder_names, writer
from adversa.pipeline.folders import last_round
from adversa.pipeline.stages import stages
from adversa.run import step_folder
from adversa.run.folder import RunDir, classes_of
from adversa.storage import files, tables
from adversa.storage.path import StoragePath
from adversa.types import GENERATED, UserError

IMAGES, MODELS, ALL = WHATS = ("images", "models", "all")
REASON = ("keep", "reason")
# A verdict's numbers beside the image; the request has the others.
NUMBERS = [f for f in tables.VERDICTS if f.name not in (*REASON, *tables.REQUESTS.names, "source")]
_NO_PICTURE = (NOT_GENERATED, NOT_FINITE)  # black, whatever was asked

Show = Callable[[str, int, int], None]  # what is being written, how much of it is done, of how much


@dataclass(frozen=True)
class Selection:
    """What is exported.

    Attributes:
        what: images, models, or all.
        form: Of the images (dataset_card).
        arm: None: all.
        round: None: all.
        rejected: The images that the filter refused, too.
        shard: Bytes of a tar shard, at most.
    """

    what: str = ALL
    form: str = dataset_card.FOLDER
    arm: str | None = None
    round: int | None = None
    rejected: bool = False
    shard: int = SHARD


@dataclass(frozen=True)
class ExportPlan:
    """A selection of a run, checked. arms: of the images; models: (arm, classifier folders) of
    each; empty where not wanted.
    """

    run: RunDir
    config: Config
    selection: Selection
    classes: list[str]
    rounds: list[int]
    arms: Sequence[str]
    models: list[tuple[str, list[StoragePath]]]

    @property
    def requested(self) -> dict[str, Any]:
        """What makes two exports the same."""
        s = self.selection
        found: dict[str, Any] = {"export": 1, "run": run_card.run_id(self.run), "what": s.what}
        if self.rounds:
            found |= {
                "format": s.form,
                "arms": list(self.arms),
                "rounds": self.rounds,
                "rejected": s.rejected,
                "classes": self.classes,
            }
            found["verdicts"] = [
                step_folder.fingerprint(self.run.round(n, "verdicts")) for n in self.rounds
            ]
            found |= {"shard": s.shard} if s.form == dataset_card.WEBDATASET else {}
        if self.models:
            found["models"] = {
                arm: [step_folder.fingerprint(f) for f in folders] for arm, folders in self.models
            }
            found["openings"] = (files.read_json(self.run.summary) or {}).get(
                "test_openings", 1
            )  # the cards say how many
        return found


@dataclass(frozen=True)
class Published:
    """What an export holds.

    Attributes:
        images: Images in it; None where none were wanted.
        by_class: Of them.
        models: Their names.
        written: Files put there by this call.
    """

    images: int | None
    by_class: dict[str, int]
    models: list[str]
    written: int


def plan(config: Config, run: RunDir, selection: Selection) -> ExportPlan:
    """What a selection is of. UserError for what cannot be exported, or not yet; nothing is
    written.
    """
    s = selection
    for option, value, known in (
        ("--what", s.what, WHATS),
        ("--format", s.form, FORMATS),
        ("--arm", s.arm, config.mix.arms),
    ):
        if value is not None and value not in known:
            raise UserError(
                f"{option} {value}: there is no such {option[2:]}; give one of {', '.join(known)}"
            )
    arms = (
        [a for a in config.mix.arms if a in GENERATED and s.arm in (None, a)]
        if s.what != MODELS
        else []
    )
    for option, given in (("--round", s.round is not None), ("--rejected", s.rejected)):
        if given and not arms:
            raise UserError(
                f"{option} is of images, and this exports none: --what {s.what}, arms "
                f"{s.arm or config.mix.arms}"
            )
    if s.what == IMAGES and not arms:
        raise UserError(
            f"--what images: the arm {s.arm or ', '.join(config.mix.arms)} generates none; "
            f"give {' or '.join(GENERATED)}"
        )
    models = [] if s.what == IMAGES else export_models.folders(config, run, s.arm)
    if models and not run.summary.exists():
        raise UserError(
            f"{run.root} is not finished, so its models have no figures yet ({_next(config, run)})"
        )
    if untrained := [f for _, folders in models for f in folders if not step_folder.is_finished(f)]:
        raise UserError(
            f"{run.root} has no classifier in {run.name_of(untrained[0])} ({_next(config, run)})"
        )
    rounds = _rounds(config, run, s.round) if arms else []
    return ExportPlan(run, config, s, classes_of(run.data), rounds, arms, models)


def _rounds(config: Config, run: RunDir, number: int | None) -> list[int]:
    """The rounds whose verdicts are all given."""
    every = range(1, last_round(config) + 1)
    done = [n for n in every if step_folder.is_finished(run.round(n, "verdicts"))]
    if number is not None and number not in every:
        raise UserError(f"--round {number}: the run has the rounds 1 to {len(every)}")
    if not done or number not in (None, *done):
        which = "no round" if not done else f"round {number}"
        raise UserError(
            f"{run.root}: {which} has verdicts {'yet' if not done else 'not yet'} "
            f"({_next(config, run)})"
        )
    return done if number is None else [number]


def _next(config: Config, run: RunDir) -> str:
    title = next((s.title for s in stages(config, run) if not s.is_finished), "the report")
    return (
        f"{title} is next; go on with: "
        f"{shlex.join(['adversa', 'loop', str(run.config), '--run-dir', str(run.root)])}"
    )


def publish(
    chosen: ExportPlan, out: Path, show: Show = lambda what, done, total: None
) -> Published:
    """Write the plan into `out`: images in it, or in out/images beside models; models in out/NAME,
    or in out/models/NAME.

    Files that are there and whole are left alone, cards that are there stay: the same call again
    finishes what was cut off. UserError where `out` holds something else or can't be written.
    """
    both = bool(chosen.arms and chosen.models)
    names: list[str] = []
    tally, written = None, 0
    with images.held(out, chosen.requested) as marked:
        if chosen.arms:
            tally, n = _images(chosen, out / IMAGES if both else out, show)
            written += n
        if chosen.models:
            place = out / MODELS if both else out
            names, n = export_models.publish(chosen.config, chosen.run, chosen.models, place, show)
            written += n
    counts = {c: tally.classes[c] for c in chosen.classes} if tally else {}
    return Published(tally.images if tally else None, counts, names, marked + written)


def _images(chosen: ExportPlan, out: Path, show: Show) -> tuple[dataset_card.Tally, int]:
    out.mkdir(exist_ok=True)
    s, run = chosen.selection, chosen.run
    schema, tally = row_schema(s.rejected), dataset_card.Tally()
    verdicts: list[dict[str, Any]] = []
    paths = [(n, p) for n in chosen.rounds for p in tables.parts(run.round(n, "synthetic"))]
    with writer(out, s.form, chosen.classes, schema, s.shard) as write:
        given: dict[str, dict[str, Any]] = {}
        for i, (n, path) in enumerate(paths):
            show("images", i, len(paths))
            if i == 0 or paths[i - 1][0] != n:
                given = {
                    v["request_id"]: v
                    for v in _verdicts(run.round(n, "verdicts"))
                    if v["arm"] in chosen.arms
                }
                verdicts += given.values()
            found = rows(path, run.round(n, "requests") / path.name, given, chosen, schema)
            tally.add(found)
            write(tables.part_name(i), found)
        show("images", len(paths), len(paths))
    folders = folder_names(chosen.classes)

    def text() -> str:
        origin, date = run_card.origin(
            chosen.config, run, chosen.rounds, chosen.arms, verdicts, chosen.classes, s.rejected
        )
        return dataset_card.text(origin, tally, chosen.classes, folders, date, s.form, schema)

    return tally, write.written + images.put_card(out, text)


def _verdicts(folder: StoragePath) -> Iterator[dict[str, Any]]:
    """The verdicts as they are on disk, what is not a number as None."""
    for row in tables.read(folder, schema=tables.VERDICTS).to_pylist():
        yield {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }


def row_schema(rejected: bool) -> pa.Schema:
    """The columns of an image: its request, its verdict's numbers and, where refused images are
    among them, the verdict.
    """
    return pa.schema(
        [*images.ROWS, *NUMBERS, *(tables.VERDICTS.field(n) for n in REASON if rejected)]
    )


def rows(
    path: StoragePath,
    requests: StoragePath,
    given: dict[str, dict[str, Any]],
    chosen: ExportPlan,
    schema: pa.Schema,
) -> pa.Table:
    """The images of a part that the plan wants, in the order of their ids. UserError where one of
    its arms has no verdict.
    """
    found = images.rows(path, requests, chosen.classes, dataset_card.Tally())
    ids, arms = found["request_id"].to_pylist(), found["arm"].to_pylist()
    without = [i for i, arm in zip(ids, arms, strict=True) if arm in chosen.arms and i not in given]
    if without:
        raise UserError(
            f"{path} has {without[0]}, and no verdict is given on it; curate the run again"
        )
    place = {i: k for k, i in enumerate(ids)}
    wanted = sorted(i for i in ids if i in given and _wanted(given[i], chosen.selection.rejected))
    table = found.take(pa.array([place[i] for i in wanted], pa.int64()))
    for field in list(schema)[len(images.ROWS) :]:
        table = table.append_column(
            field, pa.array([given[i].get(field.name) for i in wanted], field.type)
        )
    return pa.table(table.columns, schema=schema)


def _wanted(verdict: dict[str, Any], rejected: bool) -> bool:
    return verdict["keep"] or (rejected and verdict["reason"] not in _NO_PICTURE)
