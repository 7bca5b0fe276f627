"""A sweep as an ordinary search of Ray Tune: a trainable, a space to extend, any searcher and scheduler by name.

    tuner = tune.Tuner(trainable(config, run), param_space=space(config) | {"classifier.lr": tune.loguniform(1e-4, 1e-2)})

No arms are compared here, so a scheduler may stop a trial early. What a trial paints by settings of its own has a pool of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import json
import os
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler, create_scheduler
from ray.tune.search import create_searcher
from ray.tune.search.basic_variant import BasicVariantGenerator

from adversa import config as cfg
from adversa import control, runs
from adversa.config import Config
from adversa.distributed.errors import user_error
from adversa.distributed.search import FAULT, Lanes, watched
from adversa.distributed.training import _stored
from adversa.loop import cells, grid, prepare, steps, sweep
from adversa.loop.engine import LocalEngine
from adversa.loop.grid import Cell, Variant
from adversa.loop.search import fault
from adversa.places import Place
from adversa.runs import RunDir
from adversa.types import PAINTED, STRATEGIES, UserError, digest

if TYPE_CHECKING:
    from adversa.distributed.engine import RayEngine

# Of a trial's configuration, beside dotted settings of these sections.
POINT = ("real", "ratio", "arm", "strategies", "sees", "seed")
SECTIONS = ("classifier", "generate")
SCORE, STOPPED = "score", "stopped.json"
SPACES = (
    "choice", "uniform", "quniform", "loguniform", "qloguniform", "randint", "qrandint", "lograndint", "qlograndint", "randn",
    "qrandn",
)  # fmt: skip


# ---- what is searched --------------------------------------------------------------------------------------------------


def space(config: Config) -> dict[str, Any]:
    """The points of a sweep's grid, for Tune: every value that `sweep` names, by grid search. Add or replace what you like: dotted
    settings of `classifier` and `generate`, and `strategies`, a mix of the guided arm's such as {"vary": 0.7, "inpaint": 0.3}."""
    s = config.sweep
    found: dict[str, Any] = {
        "real": list(s.real), "ratio": list(s.ratios), "arm": list(s.arms), "sees": list(s.denoiser_sees),
        "seed": list(range(s.seeds)),
        "strategies": [{name: 1.0} for name in s.strategies or [config.generate.strategy]],
    }  # fmt: skip
    return {k: tune.grid_search(v) for k, v in found.items()}


def asked(config: Config) -> dict[str, Any]:
    """The space of `sweep.search`. UserError for a name or a value that Tune does not know."""
    search, s = config.sweep.search, config.sweep
    assert search is not None
    fixed = {"real": s.real[0], "arm": s.arms[0], "sees": s.denoiser_sees[0], "seed": 0, "ratio": max(s.ratios)}
    fixed["strategies"] = {(s.strategies or [config.generate.strategy])[0]: 1.0}
    return fixed | {key: _domain(key, value) for key, value in search.space.items()}


def _domain(key: str, value: dict[str, Any]) -> Any:
    section, _, name = key.partition(".")
    known = {n: getattr(cfg, n.capitalize()).model_fields for n in SECTIONS}
    if key not in ("ratio", "strategies", "seed") and name not in known.get(section, ()):
        raise UserError(
            f"sweep.search.space.{key}: no such setting; give ratio, strategies, seed, classifier.NAME or generate.NAME"
        )
    if len(value) != 1 or next(iter(value)) not in SPACES:
        raise UserError(f"sweep.search.space.{key} {value}: give one of {', '.join(SPACES)}, say {{loguniform: [0.0001, 0.01]}}")
    kind, arguments = next(iter(value.items()))
    try:
        return tune.choice(arguments) if kind == "choice" else getattr(tune, kind)(*arguments)
    except (TypeError, ValueError, AssertionError) as e:
        raise UserError(f"sweep.search.space.{key} {value}: {' '.join(str(e).split())}") from None


def scheduler(search: cfg.Search, mode: str = "max") -> TrialScheduler:
    """By name, with its arguments. UserError for a name or an argument there is not."""
    name = {"asha": "async_hyperband"}.get(search.scheduler, search.scheduler)
    if name == "fifo":
        return FIFOScheduler()
    return _made(
        "scheduler", search.scheduler, partial(create_scheduler, name), search.scheduler_args, {"metric": SCORE, "mode": mode}
    )


def searcher(search: cfg.Search, seed: int, mode: str = "max") -> Any:
    """As `scheduler`. Random search is seeded: begun again it draws the same trials in the same order."""
    if search.searcher in ("random", "variant_generator"):
        return _made("searcher", search.searcher, BasicVariantGenerator, search.searcher_args, {"random_state": seed})
    return _made(
        "searcher",
        search.searcher,
        partial(create_searcher, search.searcher),
        search.searcher_args,
        {"metric": SCORE, "mode": mode},
    )


def _made(what: str, name: str, make: Callable[..., Any], given: dict[str, Any], more: dict[str, Any]) -> Any:
    try:
        made = make(**given, **more)
    except (ValueError, TypeError, AssertionError, ImportError) as e:
        raise UserError(f"sweep.search.{what} {name}: {' '.join(str(e).split())[:300]}") from None
    known = inspect.signature(type(made).__init__).parameters
    if strange := [key for key in given if key not in known]:  # Tune drops them without a word
        raise UserError(f"sweep.search.{what}_args: {name} knows no {', '.join(strange)}; it takes {', '.join(list(known)[1:])}")
    return made


def check(config: Config) -> None:
    """UserError where a search makes no sense: it compares no arms, for a scheduler that stops trials early would not be fair to
    them."""
    s = config.sweep
    assert s.search is not None
    for name in ("real", "arms", "denoiser_sees"):
        if len(getattr(s, name)) > 1:
            raise UserError(
                f"sweep.{name} {getattr(s, name)}: sweep.search is for one of them; compare several by the grid (search: null)"
            )
    asked(config), scheduler(s.search), searcher(s.search, config.seed)


# ---- a trial -----------------------------------------------------------------------------------------------------------


def trainable(config: Config, run: RunDir, threads: int = 1) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function for `tune.Tuner`. It makes what its cell lacks, trains one classifier, reports {"score", "step"} on `select` at
    every evaluation and all metrics at the end. run: of a sweep whose `data` is prepared. Raises UserError for what cannot be."""
    home = Path.cwd()

    def trial(asks: dict[str, Any]) -> dict[str, Any]:
        if home.is_dir():
            os.chdir(home)
        return explored(config, run, asks, threads, tune.report)

    return trial


def explored(
    config: Config, run: RunDir, asks: dict[str, Any], threads: int, report: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """One trial, by its configuration alone: the same configuration is the same folder, which is not made twice."""
    point = {"real": "all", "ratio": 1.0, "arm": "guided", "sees": "subset", "seed": 0, "strategies": None} | asks
    own, base = settled(config, asks), config
    cell, d = _cell(run, point["real"])
    out = run.root / "search" / digest(json.dumps(_plain(asks), sort_keys=True), size=8)
    if (early := runs.read_json(out / STOPPED)) is not None:
        return {SCORE: early["score"], STOPPED: True}
    engine = LocalEngine(threads, threads, lambda state: _tell(state, report))
    ratio, arm = float(point["ratio"]), str(point["arm"]) if float(point["ratio"]) else "real"
    _ready(base, run, cell, d, engine)
    pools = _pools(own, base, run, cell, point, engine) if arm in PAINTED else {}
    source = sweep.Source(d, list(pools), pools)
    told = {"cell": cell.name, "count": cell.count, "arm": arm, "ratio": ratio, "seed": int(point["seed"]), "asks": _plain(asks)}
    metrics = sweep.fit_and_score(own, source, arm, ratio, int(point["seed"]), out, engine, told)
    return metrics | {SCORE: metrics[config.sweep.metric], "ratio": ratio}


def _tell(state: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    if "select_balanced_accuracy" in state:
        report({SCORE: state["select_balanced_accuracy"], "step": state["done"]})


def _plain(asks: dict[str, Any]) -> dict[str, Any]:
    return {k: v.item() if hasattr(v, "item") else v for k, v in sorted(asks.items())}


def settled(config: Config, asks: dict[str, Any]) -> Config:
    """The configuration with a trial's dotted settings. UserError for one that is wrong."""
    tree = config.model_dump(mode="json")
    for key, value in _plain(asks).items():
        if key in POINT:
            continue
        section, _, name = key.partition(".")
        if section not in SECTIONS or name not in tree[section]:
            raise UserError(f"{key}: a trial takes {', '.join(POINT)}, classifier.NAME or generate.NAME")
        tree[section][name] = value
    return cfg.check(tree, "the trial")


def _cell(run: RunDir, real: Any) -> tuple[Cell, RunDir]:
    cell = Cell(None if real == grid.ALL else int(real))
    return cell, grid.cell_dir(run, cell)


def _ready(config: Config, run: RunDir, cell: Cell, d: RunDir, engine: LocalEngine) -> None:
    """What every trial of a cell needs, made by the first."""
    with alone(d.root):
        cells.subset(run.data, cell, config.sweep.subset_seed, d.data)
        cells.first_mix(config, d)
        if not runs.is_finished(d.limits):
            cells.attack(config, d, engine.silent())


def _pools(own: Config, base: Config, run: RunDir, cell: Cell, point: dict[str, Any], engine: LocalEngine) -> dict[Path, float]:
    """The pools that a trial takes its images from, and the share of each: those of the grid where `generate` is the run's own."""
    arm, sees = str(point["arm"]), str(point["sees"])
    mix = point["strategies"] or {own.generate.strategy: 1.0}
    if arm == "guided" and (strange := [k for k, w in mix.items() if k not in STRATEGIES or not w >= 0]):
        raise UserError(
            f"strategies {mix}: {strange[0]} is no strategy with a share of 0 or more; strategies are {', '.join(STRATEGIES)}"
        )
    source = Cell(None) if sees == grid.ALL else cell
    d, at = grid.cell_dir(run, cell), grid.cell_dir(run, source)
    if source != cell:
        with alone(at.root):
            cells.subset(run.data, source, base.sweep.subset_seed, at.data)
            cells.first_mix(base, at)
    with alone(at.root / "denoiser"):
        if not runs.is_finished(at.denoiser):
            cells.denoise(base, at, engine.silent())
    strategies = {k: float(w) for k, w in mix.items() if w > 0} if arm == "guided" else {"": 1.0}
    suffix = "" if own.generate == base.generate else "-" + digest(own.generate.model_dump_json(), size=4)
    found = {}
    for strategy, share in strategies.items():
        variant = Variant(arm, strategy, sees if cell.count is not None else "subset")
        out = grid.pool_dir(run, cell, variant)
        out = out.with_name(out.name + suffix)
        whose = sweep.whose(own, cell, variant)
        with alone(out):
            if not runs.is_finished(cells.verdicts_of(out)):
                cells.paint(own, d, at.denoiser, variant, whose, max(base.sweep.ratios), out, engine.silent())
        found[out] = share
    return found


@contextlib.contextmanager
def alone(folder: Place) -> Iterator[None]:
    """One trial at a time makes a folder. On an object store, which knows no locks, two may make the same bytes at once."""
    if not isinstance(folder, Path):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".made", "a", opener=runs.no_link) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


# ---- the search --------------------------------------------------------------------------------------------------------


class _Watch(tune.Callback):
    """Notes what a scheduler stopped, so that it is not begun again, and how far the search is."""

    def __init__(self, run: RunDir, total: int) -> None:
        self.run, self.total = run, total
        self.running: dict[str, str] = {}
        self.done = self.stopped = 0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running[trial.trial_id] = ", ".join(f"{k} {_short(v)}" for k, v in _plain(trial.evaluated_params or {}).items())

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.pop(trial.trial_id, None)
        self.done += 1
        last = trial.last_result or {}
        if last.get(STOPPED):
            self.stopped += 1
            return
        out = self.run.root / "search" / digest(json.dumps(_plain(trial.config), sort_keys=True), size=8)
        if not runs.is_finished(out / "result") and SCORE in last and not last.get(FAULT):
            self.stopped += 1
            runs.write_json(out / STOPPED, {"score": last[SCORE], "step": last.get("step"), "asks": _plain(trial.config)})

    def state(self) -> dict[str, Any]:
        names = list(self.running.values())
        return {"done": self.done, "total": self.total, "unit": "trial", "running": names, "failed": 0}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run(config: Config, run: RunDir, engine: RayEngine, since: float | None = None) -> list[dict[str, Any]]:
    """`sweep.search`: prepares what trials need, searches, and writes search.json: `rows`. Begun again it makes no trial twice."""
    runs.sweep(run)
    steps.check_weights(config)
    with runs.Clock(run, since):
        runs.set_status(run, "running", "prepare", command=sweep.COMMAND)
        prepare.prepare(engine, config.data, run.data)
        grid.check_counts(config, (runs.read_json(run.data / "split.json") or {})["images"]["train"], exact=True)
        runs.set_status(run, "running", sweep.COMMAND, command=sweep.COMMAND)
        with engine.tuning() as (lanes, storage):
            found = explore(config, run, lanes, storage, runs.Progress(run.root / "trials"))
        runs.write_json(run.root / grid.SEARCHED, _asked(config) | {"role": "select", "trials": found})
        return found


def is_finished(config: Config, run: RunDir) -> bool:
    """Whether this very search is done."""
    found = runs.read_json(run.root / grid.SEARCHED) or {}
    return all(found.get(k) == v for k, v in _asked(config).items())


def _asked(config: Config) -> dict[str, Any]:
    assert config.sweep.search is not None
    return {"metric": config.sweep.metric, "search": config.sweep.search.model_dump(mode="json")}


def explore(
    config: Config, run: RunDir, lanes: Lanes, storage: Place, report: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """A row for each trial (`rows`). UserError where trials failed."""
    search = config.sweep.search
    assert search is not None
    (run.root / "trials").mkdir(parents=True, exist_ok=True)
    watch = _Watch(run, search.samples)
    tuner = tune.Tuner(
        tune.with_resources(_mendable(trainable(config, run, lanes.threads)), lanes.asks), param_space=asked(config),
        tune_config=tune.TuneConfig(
            search_alg=searcher(search, config.seed), scheduler=scheduler(search), num_samples=search.samples,
            max_concurrent_trials=lanes.most, reuse_actors=search.scheduler == "fifo",
        ),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex, verbose=0, callbacks=[watch], failure_config=tune.FailureConfig(max_failures=lanes.attempts - 1),
            **_stored(storage),
        ),
    )  # fmt: skip
    results = watched(tuner, lambda: _look(watch, report))
    for error in results.errors:
        raise user_error(error) or error
    faults = [r.metrics[FAULT] for r in results if r.metrics and r.metrics.get(FAULT)]
    if faults:
        raise UserError(f"{len(faults)} of {search.samples} trials failed; the first: {faults[0]}; what the others made is kept")
    return sorted(rows(run), key=lambda r: -r["metrics"][config.sweep.metric] if r["state"] == "finished" else 1.0)


def _look(watch: _Watch, report: Callable[[dict[str, Any]], None]) -> None:
    """A pause ends the search; begun again it goes on."""
    report(watch.state())
    control.reins().look()


def _mendable(trial: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def told(config: dict[str, Any]) -> dict[str, Any]:
        try:
            return trial(config)
        except UserError as e:
            return {FAULT: fault(e), SCORE: -1.0}

    return told


def rows(run: RunDir) -> list[dict[str, Any]]:
    """Every trial of a search there is: asks (its configuration), state (finished, or stopped by the scheduler), results."""
    found = []
    folder = run.root / "search"
    for out in sorted(folder.iterdir(), key=str) if folder.exists() else ():
        if (made := runs.read_json(out / "result" / runs.MANIFEST)) is not None:
            found.append({"asks": made["trial"]["asks"], "state": "finished", "metrics": made["metrics"], "steps": made["steps"],
                          "device_seconds": made["device_seconds"], "added": made["added"], "real": made["real"]})  # fmt: skip
        elif (early := runs.read_json(out / STOPPED)) is not None:
            found.append({"asks": early["asks"], "state": "stopped", "score": early["score"], "steps": early["step"]})
    return found
