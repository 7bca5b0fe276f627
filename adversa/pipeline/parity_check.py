"""Whether the arms of a round are matched: asked of what was written down when they were trained,
before they are compared.

A difference between arms means something only where each took as many steps on as many images from
the same weights, and where what was added weighs the same in each class. The code sees to that
(pipeline/arms.py, engine/batches.py); this finds a run folder in which it is not so: a fault of
ours, or a folder put together from several runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adversa.config import Config
from adversa.pipeline.folders import last_round, models_of
from adversa.run import differences, step_folder
from adversa.run.folder import RunDir, classes_of
from adversa.storage import files, tables
from adversa.storage.path import StoragePath
from adversa.types import BEFORE, UserError, digest

ROUNDING = 1e-6  # of a class's weight: sums of shares such as 1/3


@dataclass(frozen=True)
class Trained:
    """What a classifier's folder says of its training. start: a digest of its settings and what
    decides its first weights.
    """

    steps: int
    images: int
    batch_size: int
    seed: int
    start: str
    mix: str
    # of these and the workers the last bits of the weights depend, no more: another machine may
    # finish a run
    threads: int
    workers: int


@dataclass(frozen=True)
class Mixed:
    """A training set by class, [K] each: weight of the real and the mined images once, and what is
    added on top of that.
    """

    base: tuple[float, ...]
    added: tuple[float, ...]


def check(config: Config, run: RunDir, number: int) -> dict[str, Any]:
    """The facts that all arms of a round share, for summary.json. UserError where they do not.

    steps, images: of each classifier (None where `patience` ends each training by itself, which a
    run of one arm alone may); added_by_class: [K], of every arm but `real`; seeds: the seed of each
    pair's first weights.
    """
    models = models_of(config, run, number)
    found = {(arm, seed): _trained(folder) for arm, seed, _, folder in models}
    if config.classifier.patience is None:
        for name in ("steps", "images", "batch_size"):
            _same(
                run, name.replace("_", " "), {_name(k): getattr(t, name) for k, t in found.items()}
            )
    for s in range(config.evaluate.seeds):
        _same(
            run,
            "first weights and settings",
            {_name((a, k)): t.start[:8] for (a, k), t in found.items() if k == s},
        )
    for arm, seed, _, folder in models:
        mix = step_folder.fingerprint(folder.parent.parent / "mix")
        _same(
            run,
            "training set",
            {"the folder's mix": mix[:8], _name((arm, seed)): found[arm, seed].mix[:8]},
        )
    added = _added(
        config,
        run,
        {arm: folder.parent.parent / "mix" for arm, _, _, folder in models if arm != BEFORE},
    )
    one, seeds = found["real", 0], range(config.evaluate.seeds)
    alone = config.classifier.patience is not None
    return {
        "arms": list(config.mix.arms),
        "steps": None if alone else one.steps,
        "images": None if alone else one.images,
        "batch_size": one.batch_size,
        "added_by_class": added,
        "seeds": [found["real", s].seed for s in seeds],
        "threads": sorted({t.threads for t in found.values()}),
        "workers": sorted({t.workers for t in found.values()}),
    }


def facts(config: Config, run: RunDir) -> dict[str, Any]:
    """`check` of the last round."""
    return check(config, run, last_round(config))


def _trained(folder: StoragePath) -> Trained:
    made, recipe = step_folder.manifest(folder), files.read_json(folder / step_folder.RECIPE)
    assert recipe is not None, f"{folder} has no recipe"
    settings, weights = recipe["config"], recipe["inputs"].get("weights")
    start = digest(sorted(differences.flatten(settings).items()), weights)
    return Trained(
        int(made["metrics"]["steps"]),
        int(made["rows"]),
        settings["batch_size"],
        settings["seed"],
        start,
        recipe["inputs"]["mix"],
        made.get("threads", 0),
        made.get("workers", 0),
    )


def _added(config: Config, run: RunDir, mixes: Mapping[str, StoragePath]) -> list[int]:
    """What each class got on top of the real and mined images, in every arm but `real`; counted in
    the training sets themselves.
    """
    classes = classes_of(run.data)
    counted = {arm: _mixed(folder, len(classes)) for arm, folder in mixes.items()}
    for k, name in enumerate(classes):
        _same(
            run, f"real and mined images of {name}", {arm: m.base[k] for arm, m in counted.items()}
        )
        _same(
            run,
            f"added weight of {name}",
            {arm: round(m.added[k], 3) for arm, m in counted.items() if arm != "real"},
        )
    told = {arm: step_folder.manifest(folder)["added_by_class"] for arm, folder in mixes.items()}
    for arm, m in counted.items():
        if not np.allclose(m.added, told[arm], rtol=ROUNDING, atol=ROUNDING):
            shown = [round(x, 3) for x in m.added]
            raise UserError(
                f"{mixes[arm]} says that {told[arm]} were added, but holds {shown}; {_fix(arm)}"
            )
    others = [arm for arm in mixes if arm != "real"]
    return told[others[0]] if others else [0] * len(classes)


def _mixed(folder: StoragePath, classes: int) -> Mixed:
    rows = tables.read(folder, ["kind", "label", "weight"], tables.MIX)
    labels, weights = rows["label"].to_numpy(), rows["weight"].to_numpy()
    synthetic = np.array(rows["kind"].to_pylist()) == "synthetic"
    base = np.bincount(labels[~synthetic], minlength=classes)
    total = np.bincount(labels, weights, minlength=classes)
    return Mixed(tuple(base.tolist()), tuple((total - base).tolist()))


def _name(key: tuple[str, int]) -> str:
    return f"{key[0]} seed {key[1]}"


def _same(run: RunDir, what: str, values: Mapping[str, Any]) -> None:
    """UserError with the odd ones out, and what most have."""
    if len(set(values.values())) < 2:
        return
    counts = list(values.values())
    usual = max(counts, key=counts.count)
    odd = {name: value for name, value in values.items() if value != usual}
    shown = ", ".join(f"{name} {value}" for name, value in list(odd.items())[:5])
    least = next(name for name, value in values.items() if value == usual)
    raise UserError(
        f"{run.root}: the arms are not matched: {what} {shown}, but {least} {usual}; "
        f"{_fix(next(iter(odd)))}"
    )


def _fix(name: str) -> str:
    arm = name.split()[0]
    folder = "round-000/real" if arm == BEFORE else f"round-*/{arm}"
    return (
        f"is the run put together from several? delete {folder} and run the same command "
        "again; a run that nobody touched shows a "
        "fault of adversa: please report it"
    )
