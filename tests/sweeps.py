"""A sweep's folder as `adversa sweep` leaves it, made by hand: a function says what each trial gets
right, nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from adversa import config
from adversa.config import Config
from adversa.curate.filter import Verdict
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import files, tables
from adversa.sweep import grid, regimes
from adversa.sweep import run as sweep_run
from adversa.sweep.grid import Point
from adversa.types import GenerationRequest, HardCase

CLASSES = ["nevus", "melanoma"]
EACH = 200  # images of select of each class, a lesion each
MINED = 2  # hard cases of each class
ALL_OF_TRAIN = 80  # images of each class

Right = Callable[[str, Point, float], float]


def manifest(folder: Path, **facts: Any) -> None:
    files.write_json(
        folder / step_folder.MANIFEST,
        {"fingerprint": folder.name, "files": {}, "device_seconds": 0.0, "rows": 0} | facts,
    )


def build(
    root: Path,
    right: Right,
    have: dict[str, int] | None = None,
    classes: list[str] = CLASSES,
    mined: Iterable[int] = (MINED, MINED),
    skip: Callable[[Point], bool] = lambda p: False,
    **asked: Any,
) -> tuple[Config, RunDir]:
    """right(cell, point, reached) -> the share of select's images that are read right, in each
    class: the first so many.

    have: of a cell, images of each class that its poorest pool kept (default: enough). skip: trials
    that are missing.
    """
    tree = {"data": {"source": "phantom", "resolution": 32}, "generate": {"strategy": "img2img"}}
    settings = config.check(tree | {"sweep": {"bootstrap": 200, "seeds": 2} | asked}, "test")
    root.mkdir(parents=True)
    run = RunDir(root)
    (root / "config.yaml").write_text(config.dump(settings))
    files.write_json(root / "clock.json", {"wall_seconds": 75.0})
    images = {
        r: dict.fromkeys(classes, n)
        for r, n in {"train": ALL_OF_TRAIN, "mine": 9, "select": EACH, "test": 9}.items()
    }
    files.write_json(run.data / "classes.json", {"classes": classes})
    files.write_json(
        run.data / "split.json", {"images": images, "groups": {}, "split_hash": "9c1d55ab20"}
    )
    manifest(run.data, device_seconds=36.0)
    for cell in grid.cells(settings.sweep):
        _cell(settings, run, cell, classes, list(mined), (have or {}).get(cell.name))
    for p in grid.points(settings):
        if not skip(p):
            _trial(settings, run, p, right, (have or {}).get(p.cell.name), list(mined))
    return settings, run


def _cell(
    settings: Config,
    run: RunDir,
    cell: grid.DataRegime,
    classes: list[str],
    mined: list[int],
    have: int | None,
) -> None:
    d, n = grid.cell_dir(run, cell), cell.count or ALL_OF_TRAIN
    (d.data).mkdir(parents=True)
    files.write_json(d.data / "classes.json", {"classes": classes})
    manifest(d.data, real=[n] * 2, lesions=[n] * 2, device_seconds=36.0)
    hard = d.round(regimes.ROUND, "hard")
    cases = [
        HardCase(f"mine{c}{i}", c, 1 - c, 1.0, -0.5, "misclassified", i)
        for c in (0, 1)
        for i in range(mined[c])
    ]
    tables.write_part(hard / tables.part_name(0), tables.to_table(cases, tables.HARD_CASES))
    manifest(hard)
    for v in grid.variants(settings, cell):
        if v.generates:
            _pool(grid.pool_dir(run, cell, v), v, n, have if have is not None else 100 * n)


def _pool(out: Path, variant: grid.Variant, asked: int, kept: int) -> None:
    """One refusal of each class; of what was kept a row each, up to 20 of a class: only their
    number is read.
    """
    rows = []
    for c in (0, 1):
        for i in range(min(kept, 20) + 1):
            reason = "kept" if i else "near copy"
            rows.append(
                Verdict(f"{variant.name}{c}{i}", variant.arm, c, "img2img", None, i > 0, reason)
            )
    request = GenerationRequest("r", 1, variant.arm, "img2img", 0, None, 2.0, 2.0, 0)
    tables.write_part(
        out / "requests" / tables.part_name(0), tables.to_table([request], tables.REQUESTS)
    )
    manifest(out / "requests", rows=2 * min(kept, 20) + 4)
    tables.write_part(
        regimes.verdicts_of(out) / tables.part_name(0), tables.to_table(rows, tables.VERDICTS)
    )
    manifest(regimes.verdicts_of(out), device_seconds=7200.0)


def _trial(
    settings: Config, run: RunDir, p: Point, right: Right, have: int | None, mined: list[int]
) -> None:
    own = [p.cell.count or ALL_OF_TRAIN] * 2
    added = [
        min(n, have if have is not None else n) * bool(m)
        for n, m in zip(grid.wanted(own, p.ratio), mined, strict=True)
    ]
    share = right(p.cell.name, p, sum(added) / sum(own))
    good = round(share * EACH)
    rows = [
        {
            "id": f"s{c}-{i:04d}",
            "arm": p.variant.arm,
            "seed": p.seed,
            "label": c,
            "group": f"g{c}-{i}",
            "embedding": [],
            "logits": [1.0, 0.0] if (i < good) == (c == 0) else [0.0, 1.0],
        }
        for c in (0, 1)
        for i in range(EACH)
    ]
    out = grid.trial_dir(run, p)
    tables.write_part(
        out / "select" / tables.part_name(0), pa.Table.from_pylist(rows, schema=tables.PREDICTIONS)
    )
    manifest(out / "select", device_seconds=0.0)
    manifest(
        out / "classifier", device_seconds=3.6
    )  # as with sweep.keep_models: the result repeats its seconds
    metrics = {
        "balanced_accuracy": good / EACH,
        "accuracy": good / EACH,
        "worst_class": good / EACH,
        "brier": 0.2,
    }
    manifest(
        grid.result_dir(run, p),
        trial=sweep_run.describe(p),
        metrics=metrics,
        real=sum(own),
        mined=sum(mined),
        added=sum(added),
        synthetic=sum(added) if p.variant.generates else 0,
        added_by_class=added,
        steps=10,
        images=320,
        device_seconds=3.6,
        wall_seconds=4.0,
    )
