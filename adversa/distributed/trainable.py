"""One trial of a search by Ray Tune: a trainable, a space to extend.

    param_space = space(config) | {"classifier.lr": tune.loguniform(1e-4, 1e-2)}
    tuner = tune.Tuner(trainable(config, run), param_space=param_space)

No arms are compared here, so a scheduler may stop a trial early. What a trial generates by settings
of its own has a pool of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock
from pydantic import AfterValidator, Field, ValidationError
from ray import tune

from adversa import config as cfg
from adversa.config import Config
from adversa.engine.local import LocalEngine
from adversa.pipeline import precision
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.storage.path import StoragePath
from adversa.sweep import grid, regimes
from adversa.sweep import run as sweep_run
from adversa.sweep.grid import DataRegime, Variant
from adversa.types import GENERATED, STRATEGIES, UserError, digest

SECTIONS = ("classifier", "generate")  # whose settings a trial may have of its own
SCORE, STEP, STOPPED = "score", "step", "stopped.json"
Settings = dict[str, Any]  # a trial's configuration, as Tune hands it out


def _mix(mix: dict[str, float] | None) -> dict[str, float] | None:
    if mix is not None:
        hint = f"give, say, {{img2img: 0.7, inpaint: 0.3}}; strategies are {', '.join(STRATEGIES)}"
        if strange := [name for name in mix if name not in STRATEGIES]:
            raise ValueError(f"{strange[0]} is no strategy; {hint}")
        if not sum(mix.values()) > 0:
            raise ValueError(f"{mix} is no mix of shares above 0; {hint}")
    return mix


class SearchPoint(cfg.Section):
    """What a trial's configuration names beside dotted settings of SECTIONS."""

    real: cfg.Count = "all"
    ratio: cfg.Ratio = 1.0
    arm: Literal["real", "replay", "unguided", "guided"] = "guided"
    sees: Literal["subset", "all"] = "subset"
    seed: int = Field(0, ge=0)
    strategies: Annotated[dict[str, cfg.Ratio] | None, AfterValidator(_mix)] = None


def space(config: Config) -> Settings:
    """What `sweep` names, for Tune: real, ratio, seed and strategies by grid search, for one arm
    (guided, where it is in `sweep.arms`) and one denoiser. Add or replace what you like: dotted
    settings of `classifier` and `generate`, and `strategies`, a mix of the guided arm's such as
    {"img2img": 0.7, "inpaint": 0.3}.

    No comparison of arms: each trial takes as many images as its own pools have, where the grid
    matches the arms of a cell.
    """
    s = config.sweep
    arm = "guided" if "guided" in s.arms else s.arms[0]
    searched: dict[str, list[Any]] = {
        "real": list(s.real),
        "ratio": list(s.ratios),
        "seed": list(range(s.seeds)),
    }
    if arm == "guided":
        searched["strategies"] = [
            {name: 1.0} for name in s.strategies or [config.generate.strategy]
        ]
    grids = {key: tune.grid_search(values) for key, values in searched.items()}
    return grids | {"arm": arm, "sees": s.denoiser_sees[0]}


def plain(settings: Settings) -> Settings:
    """Sorted, without numpy's numbers."""
    return {k: v.item() if hasattr(v, "item") else v for k, v in sorted(settings.items())}


def resolve(
    config: Config, settings: Settings, where: str = "the trial"
) -> tuple[Config, SearchPoint]:
    """The configuration with a trial's dotted settings, and its point. UserError for what is wrong,
    beginning with `where`.
    """
    tree, point = config.model_dump(mode="json"), {}
    for key, value in plain(settings).items():
        section, _, name = key.partition(".")
        if key in SearchPoint.model_fields:
            point[key] = value
        elif section in SECTIONS and name in tree[section]:
            tree[section][name] = value
        else:
            raise UserError(
                f"{where}: {key}: no such setting; a trial takes "
                f"{', '.join(SearchPoint.model_fields)}, classifier.NAME or generate.NAME"
            )
    try:
        found = SearchPoint.model_validate(point)
    except ValidationError as e:
        raise UserError(f"{where}: " + "; ".join(map(cfg.explain, e.errors()))) from None
    if found.ratio > (most := max(config.sweep.ratios)):
        raise UserError(
            f"{where}: ratio {found.ratio:g} does not lie in 0 ... {most:g}, the largest of "
            "sweep.ratios, which images are generated for"
        )
    return cfg.check(tree, where), found


def trainable(config: Config, run: RunDir, threads: int = 1) -> Callable[[Settings], Settings]:
    """A function for `tune.Tuner`. It makes what its cell lacks, trains one classifier, reports
    {"score", "step"} on `select` at every evaluation, and all metrics with the last. run: of a
    sweep whose `data` is prepared; its precision holds. UserError for what cannot be.
    """
    config = precision.settled(config, run)
    home, folder = Path.cwd(), folder_of(config, run)

    def trial(settings: Settings) -> Settings:
        if home.is_dir():
            os.chdir(home)
        return carry_out(config, run, settings, threads, tune.report, folder)

    return trial


def folder_of(config: Config, run: RunDir) -> StoragePath:
    """Where the trials of a search lie: another search has another folder; `own` is of a space that
    came from elsewhere.
    """
    if config.sweep.search is None:
        return run.root / "search" / "own"
    return run.root / "search" / digest(json.dumps(identity(config), sort_keys=True), size=6)


def identity(config: Config) -> dict[str, Any]:
    """What makes a search this search."""
    assert config.sweep.search is not None
    return {
        "metric": config.sweep.metric,
        "search": config.sweep.search.model_dump(mode="json"),
        "held": held(config),
    }


def held(config: Config) -> Settings:
    """What every trial of a search has, unless its space says otherwise."""
    s = config.sweep
    point: Settings = {
        "real": s.real[0],
        "arm": s.arms[0],
        "sees": s.denoiser_sees[0],
        "seed": 0,
        "ratio": max(s.ratios),
    }
    if s.arms[0] == "guided":
        point["strategies"] = {(s.strategies or [config.generate.strategy])[0]: 1.0}
    return point


def trial_dir(folder: StoragePath, settings: Settings) -> StoragePath:
    return folder / digest(json.dumps(plain(settings), sort_keys=True), size=8)


def carry_out(
    config: Config,
    run: RunDir,
    settings: Settings,
    threads: int,
    report: Callable[[Settings], None],
    folder: StoragePath,
) -> Settings:
    """One trial, by its configuration alone: the same configuration is the same folder, which is
    not made twice; what it said at its evaluations it says again.
    """
    own, point = resolve(config, settings)
    out = trial_dir(folder, settings)
    if (early := files.read_json(out / STOPPED)) is not None:
        return {SCORE: early[SCORE], STEP: early[STEP], STOPPED: True}
    if (made := files.read_json(out / "result" / step_folder.MANIFEST)) is not None:
        for step, score in made["evaluations"][:-1]:
            report({SCORE: score, STEP: step})
        return _result(config, made)

    def tell(state: dict[str, Any]) -> None:
        if "select_balanced_accuracy" in state and state["done"] < state["total"]:
            report({SCORE: state["select_balanced_accuracy"], STEP: state["done"]})

    engine = LocalEngine(threads, threads, tell)
    cell = DataRegime(None if point.real == grid.ALL else int(point.real))
    arm = point.arm if point.ratio else "real"
    d = _cell(config, run, cell, engine)
    with alone(d.root):
        if not step_folder.is_finished(regimes.hard_cases_of(config, d)):
            regimes.find_hard_cases(config, d, engine.silent())
    pools = _pools(own, config, run, cell, point, engine) if arm in GENERATED else {}
    reported = {
        "cell": cell.name,
        "count": cell.count,
        "arm": arm,
        "ratio": point.ratio,
        "seed": point.seed,
        "asks": plain(settings),
    }
    source = sweep_run.TrialImages(d, list(pools), pools)
    sweep_run.fit_and_score(own, source, reported, out, engine)
    return _result(config, step_folder.manifest(out / "result"))


def _result(config: Config, made: dict[str, Any]) -> Settings:
    metrics: dict[str, float] = made["metrics"]
    return metrics | {SCORE: metrics[config.sweep.metric], STEP: made["steps"]}


def _cell(config: Config, run: RunDir, cell: DataRegime, engine: LocalEngine) -> RunDir:
    """The folder of a cell with its images, made by the first trial."""
    d = grid.cell_dir(run, cell)
    with alone(d.root):
        regimes.subset(run.data, cell, config.sweep.subset_seed, d.data, engine.handle)
        regimes.first_mix(d, engine.handle)
    return d


def _pools(
    own: Config,
    base: Config,
    run: RunDir,
    cell: DataRegime,
    point: SearchPoint,
    engine: LocalEngine,
) -> dict[StoragePath, float]:
    """The pools that a trial takes its images from, and the share of each: those of the grid where
    `generate` is the run's own.
    """
    d = grid.cell_dir(run, cell)
    at = _cell(base, run, DataRegime(None), engine) if point.sees == grid.ALL else d
    with alone(at.root / "denoiser"):
        if not step_folder.is_finished(at.denoiser):
            regimes.denoise(base, at, engine.silent())
    strategies, suffix = {"": 1.0}, ""
    if point.arm == "guided":
        strategies = point.strategies or {own.generate.strategy: 1.0}
    if own.generate != base.generate:
        suffix = "-" + digest(own.generate.model_dump_json(), size=4)
    shares = {}
    for strategy, share in strategies.items():
        if share == 0:
            continue
        variant = Variant(point.arm, strategy, point.sees if cell.count is not None else "subset")
        out = grid.pool_dir(run, cell, variant)
        out = out.with_name(out.name + suffix)
        whose, most = sweep_run.whose(own, cell, variant), max(base.sweep.ratios)
        with alone(out):
            if not step_folder.is_finished(regimes.verdicts_of(out)):
                regimes.generate_pool(
                    own, d, at.denoiser, variant, whose, most, out, engine.silent()
                )
        shares[out] = share
    return shares


@contextlib.contextmanager
def alone(folder: StoragePath) -> Iterator[None]:
    """One trial at a time makes a folder. On an object store, which knows no locks, two may make
    the same bytes at once.
    """
    if not isinstance(folder, Path):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".made", fallback_to_soft=False):
        yield
