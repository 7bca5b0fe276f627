"""A run's classifiers as models: a folder an arm, with a model card, and in it a folder a seed, as
`classify.model` loads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adversa.config import Config
from adversa.export import images, model_card, run_card
from adversa.export.formats import hidden, put, settle
from adversa.pipeline.folders import home, last_round
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.storage.path import StoragePath
from adversa.storage.weights import CONFIG, MODEL

Show = Callable[[str, int, int], None]
PLACES = ("weights",)  # of a classifier's section: may name a file


def folders(config: Config, run: RunDir, arm: str | None) -> list[tuple[str, list[StoragePath]]]:
    """(arm, its classifiers as they stand after the last round, seed by seed), of one arm or
    all.
    """
    last = last_round(config)
    seeds = range(config.evaluate.seeds)
    return [
        (a, [run.arm(home(config, a, last), a, s) / "classifier" for s in seeds])
        for a in config.mix.arms
        if arm in (None, a)
    ]


def model_name(run: RunDir, arm: str) -> str:
    """adversa-RUN-ARM, in letters that the Hub takes in a name."""
    name = re.sub(r"[^A-Za-z0-9_]+", "-", run_card.name(run)).strip("-")[:64]
    return f"adversa-{name or 'run'}-{arm}"


def publish(
    config: Config,
    run: RunDir,
    models: Sequence[tuple[str, list[StoragePath]]],
    out: Path,
    show: Show,
) -> tuple[list[str], int]:
    """(names of the models in `out`, how many files were written). What is there with the same
    bytes stays, and so does a card.
    """
    summary = files.read_json(run.summary)
    assert summary is not None, f"{run.summary} is gone"
    total, done, written, names = sum(len(f) for _, f in models), 0, 0, []
    for arm, classifiers in models:
        names.append(model_name(run, arm))
        place, metas = out / names[-1], []
        for seed, folder in enumerate(classifiers):
            show("models", done, total)
            metas.append(_meta(folder))
            written += _copy(folder, metas[-1], place / f"seed-{seed}")
            metas[-1]["sha256"] = _sha256(place / f"seed-{seed}" / MODEL)
            done += 1

        def text(arm: str = arm, metas: list[dict[str, Any]] = metas, name: str = names[-1]) -> str:
            return model_card.text(name, arm, metas, summary, config, run)

        written += images.put_card(place, text)
    show("models", total, total)
    return names, written


def _meta(folder: StoragePath) -> dict[str, Any]:
    """A classifier's config.json, without the place of the weights it started from (loading it does
    not read them).
    """
    found = files.read_json(folder / CONFIG)
    assert found is not None, f"{folder} holds no model"
    return found | {"config": run_card.settings(found["config"], PLACES)}


def _copy(folder: StoragePath, meta: dict[str, Any], out: Path) -> int:
    """The model's two files; how many were not there yet."""
    out.mkdir(parents=True, exist_ok=True)
    temporary = hidden(out / MODEL)
    try:
        temporary.write_bytes((folder / MODEL).read_bytes())
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        written = int(settle(temporary, out / MODEL))
    finally:
        temporary.unlink(missing_ok=True)
    return written + put(out / CONFIG, json.dumps(meta, indent=2, sort_keys=True).encode())


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
