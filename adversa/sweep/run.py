"""`adversa sweep`: a grid of trials over real images, ratio, arm and seed. Running it again on the
same folder is how it resumes.

Every trial trains the same classifier for the same number of steps and is scored on `select`;
`test` is never opened (but by the near-copy filter). Within a cell, arms are matched class by
class, in every ratio; trials share generated images by request id.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adversa.config import Config, dump
from adversa.engine.interface import Engine, Tell, Trial
from adversa.engine.step import Facts, inputs, run_step
from adversa.pipeline import arms, evaluate, latents, precision, prepare, train
from adversa.pipeline.train import pairs
from adversa.run import create as run_create
from adversa.run import records, run_lock, status, step_folder, tracking
from adversa.run.control import NULL_HANDLE, RunHandle, with_pauses
from adversa.run.folder import RunDir, classes_of, remove_partial_files, run_id
from adversa.run.status import Clock
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files, predictions, tables
from adversa.storage.path import StoragePath, rmtree
from adversa.storage.predictions import Predictions
from adversa.sweep import grid, regimes
from adversa.sweep.grid import DataRegime, Point, Variant
from adversa.types import digest, seed_of

# What may change in a sweep's folder. Not the arms: all of a cell take as many images as the
# poorest of them has.
FREE = ("real", "seeds", "ratios", "max_trials", "bootstrap", "metric", "keep_models", "search")
READS = {"data": ("data",)}  # all that comes after reads the whole configuration
COMMAND = "sweep"
METRICS = "metrics.jsonl"  # of a training, by classify.fit
Pairs = list[tuple[str, int]]


def recipe_of(config: Config) -> dict[str, object]:
    """What makes a sweep this sweep. A grid may grow in the same folder (FREE), up to the largest
    ratio, for which images were generated.
    """
    outside = {"cluster", "tracking", "quality", "mix", "evaluate", "rounds"}
    tree = config.model_dump(mode="json", exclude=outside)
    kept = {k: v for k, v in tree["sweep"].items() if k not in FREE}
    return tree | {"sweep": kept | {"largest_ratio": max(config.sweep.ratios)}}


def open_run(config: Config, root: StoragePath) -> RunDir:
    """Create or check the sweep's folder. UserError where it holds something else, or the grid
    makes no sense.
    """
    grid.check(config)
    records.check_run(RunDir(root.absolute()))
    return run_create.open_run(
        root.absolute(), recipe_of(config), dump(config), READS, run_lock.is_worked_on
    )


def is_finished(config: Config, run: RunDir) -> bool:
    return all(step_folder.is_finished(grid.result_dir(run, p)) for p in grid.points(config))


def run(
    config: Config,
    run: RunDir,
    engine: Engine,
    write: Callable[[Config, RunDir], StoragePath],
    since: float | None = None,
    handle: RunHandle = NULL_HANDLE,
    search: Callable[[Config, RunDir, Any, Progress], None] | None = None,
) -> StoragePath:
    """Do what is left of a sweep; returns what `write` does (the report's place). The caller holds
    the run's lock. handle: of the run, where this process holds it. search: in place of the grid.
    """
    engine.handle = handle
    remove_partial_files(run)
    settle(config, run)
    own = precision.settle(config, run, engine)
    with tracking.Follow(config.tracking, run.root), Clock(run, since) as clock:
        reported = {"command": COMMAND}
        paused = partial(status.set_status, run, "paused", COMMAND, **reported)
        with_pauses(handle, partial(_work, own, run, engine, search or _grid), paused)
        status.set_status(run, "running", "report", **reported)
        clock.tick()
        return write(config, run)


def _work(
    config: Config,
    run: RunDir,
    engine: Engine,
    search: Callable[[Config, RunDir, Any, Progress], None],
) -> None:
    status.set_status(run, "running", "prepare", command=COMMAND)
    prepare.prepare(engine, config.data, run.data)
    split = files.read_json(run.data / "split.json") or {}
    grid.check_counts(config, split["images"]["train"], exact=True)
    (run.root / "trials").mkdir(parents=True, exist_ok=True)
    status.set_status(run, "running", COMMAND, command=COMMAND)
    search(config, run, engine, Progress(run.root / "trials"))
    (run.root / "trials" / step_folder.PROGRESS).unlink(missing_ok=True)


def _grid(config: Config, run: RunDir, engine: Engine, report: Progress) -> None:
    engine.search(trials(config, run, engine.handle), report)


def settle(config: Config, run: RunDir) -> None:
    """Before any work, by the holder of the run's lock: config.yaml says which grid is worked on
    now; UserError for weights and autoencoders that are not there.
    """
    if run.config.read_text() != dump(config):
        files.replace_bytes(run.config, dump(config).encode())
    train.check_weights(config)
    if _has_codec(config):
        latents.check_codec(config.codec, config.data.resolution)


def _has_codec(config: Config) -> bool:
    return grid.generates(config.sweep) and config.codec.kind != "pixels"


def trials(config: Config, run: RunDir, handle: RunHandle = NULL_HANDLE) -> list[Trial]:
    """All work after `prepare`, the longest first. Makes each cell's images and first mix."""
    s = config.sweep
    trained, generated, points = [], [], []
    generates = grid.generates(s)
    for cell in grid.sources(s):
        d = grid.cell_dir(run, cell)
        regimes.subset(run.data, cell, s.subset_seed, d.data, handle)
        regimes.first_mix(d, handle)
        if _has_codec(config) and not config.codec.is_fitted:
            latents.fetch(d.data, config.codec, config.data.resolution, d.codec, handle)
        if generates and ("subset" in s.denoiser_sees or cell.count is None):
            trained.append(
                Trial(f"{cell.name}/denoiser", d.denoiser, partial(regimes.denoise, config, d))
            )
        if cell in grid.cells(s):
            trained.append(
                Trial(
                    f"{cell.name}/hard cases",
                    regimes.hard_cases_of(config, d),
                    partial(regimes.find_hard_cases, config, d),
                )
            )
    for cell in grid.cells(s):
        generated += _pools(config, run, cell)
    for p in grid.points(config):
        needs = [
            regimes.hard_cases_of(config, grid.cell_dir(run, p.cell)),
            *(regimes.verdicts_of(x) for x in pools(config, run, p.cell)),
        ]
        points.append(
            Trial(p.name, grid.result_dir(run, p), partial(trial, config, run, p), tuple(needs))
        )
    train.check_models(
        config, classes_of(run.data), generates, grid.cell_dir(run, grid.sources(s)[0]).codec
    )
    return [*trained, *generated, *points]


def pools(config: Config, run: RunDir, cell: DataRegime) -> list[StoragePath]:
    """The folders of all generating arms of a regime: each of its trials takes as many images as
    the poorest of them has.
    """
    return [grid.pool_dir(run, cell, v) for v in grid.variants(config, cell) if v.generates]


def whose(config: Config, cell: DataRegime, variant: Variant) -> str:
    """What request ids are made of, beside the hard case and a number: the sweep, the cell, the arm
    (one strategy falls back on another).
    """
    asks = recipe_of(config) | {"sweep": {"subset_seed": config.sweep.subset_seed}}
    return digest(run_id(asks), cell.name, variant.sees, variant.strategy, size=8)


def _pools(config: Config, run: RunDir, cell: DataRegime) -> list[Trial]:
    d, found = grid.cell_dir(run, cell), []
    for v in grid.variants(config, cell):
        if not v.generates:
            continue
        denoiser = grid.cell_dir(run, DataRegime(None) if v.sees == grid.ALL else cell).denoiser
        out = grid.pool_dir(run, cell, v)
        work = partial(
            regimes.generate_pool,
            config,
            d,
            denoiser,
            v,
            whose(config, cell, v),
            max(config.sweep.ratios),
            out,
        )
        found.append(
            Trial(
                f"{cell.name}/{v.name}/images", regimes.verdicts_of(out), work, (d.limits, denoiser)
            )
        )
    return found


# ---- a trial -------------------------------------------------------------------------------------


def trial(
    config: Config, run: RunDir, point: Point, engine: Engine, tell: Tell | None = None
) -> dict[str, float]:
    """Train and score one point of the grid; returns its metrics on `select`."""
    own = grid.pool_dir(run, point.cell, point.variant)
    source = TrialImages(
        grid.cell_dir(run, point.cell),
        pools(config, run, point.cell),
        {own: 1.0} if point.variant.generates else {},
    )
    return fit_and_score(config, source, describe(point), grid.trial_dir(run, point), engine)


def describe(point: Point) -> dict[str, Any]:
    cell = {"cell": point.cell.name, "count": point.cell.count}
    return cell | asdict(point.variant) | {"ratio": point.ratio, "seed": point.seed}


@dataclass(frozen=True)
class TrialImages:
    """Where a trial's images are. cell: of the sweep; pools: of all generating arms of it, the
    counts' limits; taken: those that this arm's images come from, and the share of each.
    """

    cell: RunDir
    pools: Sequence[StoragePath]
    taken: dict[StoragePath, float]

    @property
    def hard(self) -> StoragePath:
        return self.cell.round(regimes.ROUND, "hard")


def fit_and_score(
    config: Config,
    source: TrialImages,
    reported: dict[str, Any],
    out: StoragePath,
    engine: Engine,
) -> dict[str, float]:
    """The step folders mix, classifier, select and, last, result below `out`. reported: of the
    trial, for its manifest: its arm, ratio, seed and more.
    """
    d, result = source.cell, out / "result"
    arm, seed = str(reported["arm"]), int(reported["seed"])
    if step_folder.is_finished(result):
        return dict(step_folder.manifest(result)["metrics"])
    began = time.monotonic()
    mix(source, arm, float(reported["ratio"]), out / "mix", engine.handle)
    added = [d.data / "mine", *(p / "synthetic" for p in source.taken)]
    job = train.classifier_job(
        d.data,
        out / "mix",
        added,
        config.classifier,
        seed_of("classifier", config.seed, seed),
        config.data.resolution,
        out / "classifier",
    )
    engine.fit([job])
    evaluate.score(
        engine, [(arm, seed, out / "classifier")], d.data / "select", d.data, False, out / "select"
    )
    made, mixed = step_folder.manifest(out / "classifier"), step_folder.manifest(out / "mix")
    names = inputs(select=out / "select", mix=out / "mix", classifier=out / "classifier")

    def body(progress: Progress) -> Facts:
        from adversa.evaluate.metrics import metrics

        p = predictions.predictions(
            tables.read(out / "select", schema=tables.PREDICTIONS), arm, seed
        )
        facts = {k: mixed[k] for k in ("real", "mined", "synthetic", "added", "added_by_class")}
        return {
            "rows": len(p.labels),
            "metrics": metrics(p.logits, p.labels, classes_of(d.data)),
            "trial": reported,
            **facts,
            "steps": made["metrics"]["steps"],
            "images": made["rows"],
            "device_seconds": made["device_seconds"],
            "wall_seconds": time.monotonic() - began,
            "evaluations": evaluations(out / "classifier"),
        }

    run_step(result, Recipe("trial", 1, reported, names), body, engine.handle)
    if not config.sweep.keep_models:
        rmtree(out / "classifier", missing_ok=True)
    return dict(step_folder.manifest(result)["metrics"])


def evaluations(classifier: StoragePath) -> list[tuple[int, float]]:
    """(step, balanced accuracy on select) at each evaluation of a training."""
    lines = [json.loads(line) for line in (classifier / METRICS).read_text().splitlines()]
    return [(x["step"], x["select_balanced_accuracy"]) for x in lines]


def mix(source: TrialImages, arm: str, ratio: float, out: StoragePath, handle: RunHandle) -> None:
    """The rows of tables.MIX of a trial: its regime's images of train and hard cases, and ratio
    times as many on top in each class, but no more than every generating arm of the regime has.
    """
    d = source.cell
    shares = {f"{p.parent.name}/{p.name}": w for p, w in source.taken.items()}
    names = inputs(data=d.data, hard=source.hard)
    names |= {
        f"{p.parent.name}/{p.name}": step_folder.fingerprint(regimes.verdicts_of(p))
        for p in source.pools
    }

    def body(progress: Progress) -> Facts:
        real = pairs(tables.read(d.data / "train", ["id", "label"], tables.EXAMPLES), "id")
        mined = sorted(set(pairs(tables.read(source.hard, schema=tables.HARD_CASES), "example")))
        kept = {p: accepted(p) for p in source.pools}
        classes = len(classes_of(d.data))
        own = _count(real, classes)
        most = (
            np.min([_count(k, classes) for k in kept.values()], axis=0)
            if kept
            else np.full(classes, np.iinfo(np.int64).max)
        )
        most = np.where(
            _count(mined, classes) > 0, most, 0
        )  # a class without a hard case has nothing to repeat or to generate from
        counts = [0] * classes
        if arm != "real":
            counts = np.minimum(grid.wanted(own.tolist(), ratio), most).tolist()
        table = arms.mix(
            arm,
            real,
            mined,
            chosen({p: kept[p] for p in source.taken}, source.taken, counts),
            counts,
        )
        tables.write_part(out / tables.part_name(0), table)
        drawn = len(table) - len(real) - len(mined)
        return {
            "rows": len(table),
            "real": len(real),
            "mined": len(mined),
            "synthetic": drawn,
            "added": sum(counts),
            "added_by_class": counts,
        }

    recipe = Recipe("trial mix", 1, {"arm": arm, "ratio": ratio, "shares": shares}, names)
    run_step(out, recipe, body, handle)


def accepted(pool: StoragePath) -> Pairs:
    """(request id, label) of what the filter kept."""
    rows = tables.read(regimes.verdicts_of(pool), ["request_id", "label", "keep"], tables.VERDICTS)
    return pairs(rows.filter(pc.field("keep")), "request_id")


def chosen(
    kept: dict[StoragePath, Pairs], shares: dict[StoragePath, float], counts: Sequence[int]
) -> Pairs:
    """counts[c] images of each class from several pools by their shares (what one lacks, the others
    give), the first by id of each: a smaller ratio's are among a larger one's.
    """
    found: Pairs = []
    order = sorted(kept, key=str)
    for c, count in enumerate(counts if order else []):
        of_class = [sorted(r for r in kept[p] if r[1] == c) for p in order]
        for rows, n in zip(
            of_class,
            arms.shares([shares[p] for p in order], count, [len(r) for r in of_class]),
            strict=True,
        ):
            found += rows[:n]
    return found


def _count(rows: Pairs, classes: int) -> np.ndarray:
    return np.bincount(np.array([label for _, label in rows], dtype=np.int64), minlength=classes)


# ---- what came of it -----------------------------------------------------------------------------


ROWS = pa.schema(
    {
        "cell": pa.string(),
        "count": pa.int64(),
        "arm": pa.string(),
        "strategy": pa.string(),
        "sees": pa.string(),
        "ratio": pa.float64(),
        "seed": pa.int64(),
        "real": pa.int64(),
        "mined": pa.int64(),
        "synthetic": pa.int64(),
        "added": pa.int64(),
        "added_by_class": pa.list_(pa.int64()),
        "steps": pa.int64(),
        "images": pa.int64(),
        "metrics": pa.map_(pa.string(), pa.float64()),
        "device_seconds": pa.float64(),
        "wall_seconds": pa.float64(),
    }
)


def table(config: Config, run: RunDir) -> pa.Table:
    """ROWS, one for each finished trial, in the order of the grid. ratio: as asked; added / real is
    what was reached.
    """
    found = []
    for point in grid.points(config):
        made = files.read_json(grid.result_dir(run, point) / step_folder.MANIFEST)
        if made is not None:
            row = made["trial"] | {
                k: made[k] for k in ROWS.names if k in made and k not in made["trial"]
            }
            found.append(row | {"metrics": list(made["metrics"].items())})
    return pa.Table.from_pylist(found, schema=ROWS)


def logits_of(config: Config, run: RunDir, points: Sequence[Point]) -> Predictions:
    """The logits of trials on `select`, [S, N, K], with rows in order of ids."""
    found = [
        predictions.predictions(
            tables.read(grid.trial_dir(run, p) / "select", schema=tables.PREDICTIONS),
            p.variant.arm,
            p.seed,
        )
        for p in points
    ]
    assert len({tuple(f.ids) for f in found}) == 1, "trials were scored on different images"
    return found[0]._replace(logits=np.stack([f.logits for f in found]))
