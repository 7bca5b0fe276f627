"""Scoring a role with trained classifiers, and the scorecards of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import pyarrow as pa

from adversa import config as cfg
from adversa.engine.interface import BatchEngine
from adversa.engine.step import Facts, inputs, mapped, run_step
from adversa.engine.tasks import Part, Work
from adversa.run import step_folder
from adversa.run.folder import RunDir, classes_of
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files, tables
from adversa.storage.arrays import RoleArray
from adversa.storage.path import StoragePath, storage_path
from adversa.storage.predictions import predictions
from adversa.types import BEFORE, Scorecard, seed_of

# ---- scoring -------------------------------------------------------------------------------------


def score(
    engine: BatchEngine,
    models: Sequence[tuple[str, int, StoragePath]],
    examples: StoragePath,
    data: StoragePath,
    embed: bool,
    out: StoragePath,
) -> None:
    """Logits (and embeddings) of every image of a role under each model (arm, seed, folder):
    tables.PREDICTIONS.
    """
    names = inputs(data=data) | {
        f"{arm}-{seed}": step_folder.fingerprint(folder) for arm, seed, folder in models
    }
    recipe = Recipe("score", 1, {"role": examples.name, "embed": embed}, names)

    def body(progress: Progress) -> Facts:
        return _score(engine, models, examples, embed, out, progress)

    run_step(out, recipe, body, engine.handle)


def _score(
    engine: BatchEngine,
    models: Sequence[tuple[str, int, StoragePath]],
    examples: StoragePath,
    embed: bool,
    out: StoragePath,
    progress: Progress,
) -> Facts:
    paths = tables.parts(examples)
    rows = [tables.count(p) * len(models) for p in paths]
    parts = [Part(i, n, {"path": str(p)}) for i, (p, n) in enumerate(zip(paths, rows, strict=True))]
    make = partial(make_score, examples, tuple(models), embed)
    return mapped(engine, make, parts, out, progress, model=True)


def make_score(
    examples: StoragePath, models: Sequence[tuple[str, int, StoragePath]], embed: bool
) -> Work:
    from adversa.classify.score import make_scorer

    pictures = RoleArray(examples)
    scorers = [(arm, seed, make_scorer(folder, embed=embed)) for arm, seed, folder in models]

    def work(part: Part, path: StoragePath) -> int:
        source = storage_path(part.payload["path"])
        rows, images = (
            tables.read_part(source, ["id", "label", "group"]),
            pictures.part(source.name),
        )
        scored = []
        for arm, seed, scorer in scorers:
            logits, embedding = scorer(images)
            scored.append(
                pa.table(
                    {
                        "id": rows["id"],
                        "arm": [arm] * len(images),
                        "seed": [seed] * len(images),
                        "label": rows["label"],
                        "group": rows["group"],
                        "logits": list(logits),
                        "embedding": list(embedding),
                    },
                    schema=tables.PREDICTIONS,
                )
            )
        tables.write_part(path, pa.concat_tables(scored))
        return sum(len(t) for t in scored)

    return work


# ---- evaluation ----------------------------------------------------------------------------------


def evaluate(
    engine: BatchEngine,
    run: RunDir,
    models: Sequence[tuple[str, int, int, StoragePath]],
    role: str,
    config: cfg.Evaluate,
    out: StoragePath,
    opening: Callable[[], None] | None = None,
) -> None:
    """Predictions of each model (arm, seed, round, folder) on a role, and its scorecard, in one
    folder.

    opening: called before a classifier sees the first image (for `test`, which is opened once, and
    that is written down; only the near-copy filter has read it before, and that can but remove a
    synthetic image).
    """
    names = inputs(data=run.data) | {
        f"{arm}-{seed}": step_folder.fingerprint(folder) for arm, seed, _, folder in models
    }
    recipe = Recipe("evaluate", 1, {"role": role, "bootstrap": config.bootstrap}, names)
    classes = classes_of(run.data)

    def body(progress: Progress) -> Facts:
        if opening is not None:
            opening()
        facts = _score(
            engine, [(a, s, f) for a, s, _, f in models], run.data / role, False, out, progress
        )
        rows = tables.read(out, schema=tables.PREDICTIONS)
        for arm, seed, number, _ in models:
            card = scorecard(rows, arm, seed, number, role, classes, config)
            files.write_json(run.scorecard(out, arm, seed), asdict(card))
        return facts

    run_step(out, recipe, body, engine.handle)


def scorecard(
    rows: pa.Table,
    arm: str,
    seed: int,
    number: int,
    role: str,
    classes: list[str],
    config: cfg.Evaluate,
) -> Scorecard:
    from adversa.evaluate.bootstrap import intervals
    from adversa.evaluate.metrics import metrics

    p = predictions(rows, arm, seed)
    ranges = intervals(
        p.logits, p.labels, p.groups, classes, config.bootstrap, seed_of("bootstrap", role)
    )
    name = "real" if arm == BEFORE else arm
    return Scorecard(
        name, seed, number, role, len(p.labels), metrics(p.logits, p.labels, classes), ranges
    )
