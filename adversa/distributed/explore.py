"""A sweep as an ordinary search of Ray Tune: a trainable, a space to extend, any searcher and
scheduler by name.

    tuner = tune.Tuner(trainable(config, run), param_space=space(config) | {"classifier.lr": tune.loguniform(1e-4, 1e-2)})

No arms are compared here, so a scheduler may stop a trial early. What a trial generates by settings
of its own has a pool of its own.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import traceback
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler, create_scheduler
from ray.tune.search import create_searcher
from ray.tune.search.basic_variant import BasicVariantGenerator

from adversa import config as cfg
from adversa.config import Config
from adversa.distributed.errors import user_error
from adversa.distributed.search import BUG, FAULT, Concurrency, watched
from adversa.distributed.training import _stored
from adversa.engine.local import LocalEngine
from adversa.engine.trials import fault
from adversa.pipeline import prepare
from adversa.run import status, step_folder, tracking
from adversa.run.control import NULL_HANDLE, Pause, RunHandle, with_pauses
from adversa.run.folder import RunDir, remove_partial_files
from adversa.run.status import Clock
from adversa.run.step_folder import Progress
from adversa.storage import files
from adversa.storage.path import StoragePath
from adversa.sweep import grid, regimes
from adversa.sweep import run as sweep_run
from adversa.sweep.grid import DataRegime, Variant
from adversa.types import GENERATED, STRATEGIES, UserError, digest

if TYPE_CHECKING:
    from adversa.distributed.engine import RayEngine

# Of a trial's configuration, beside dotted settings of these sections.
POINT = ("real", "ratio", "arm", "strategies", "sees", "seed")
SECTIONS = ("classifier", "generate")
SEARCHABLE = ("ratio", "strategies", "seed")  # of POINT, what a search may vary
# Settings a trial does not follow, and what to give in their place.
FIXED = {
    "generate.strategy": "strategies, say {choice: [{img2img: 1}, {inpaint: 1}]}",
    "generate.per_case": "ratio",
    "generate.adaptive": "generate.sigma_start",
    "classifier.patience": "a scheduler such as asha",
}
SCORE, STEP, STOPPED = "score", "step", "stopped.json"
SPACES = (
    "choice",
    "uniform",
    "quniform",
    "loguniform",
    "qloguniform",
    "randint",
    "qrandint",
    "lograndint",
    "qlograndint",
)


# ---- what is searched ----------------------------------------------------------------------------


def space(config: Config) -> dict[str, Any]:
    """What `sweep` names, for Tune: real, ratio, seed and strategies by grid search, for one arm
    (guided, where it is in `sweep.arms`) and one denoiser. Add or replace what you like: dotted
    settings of `classifier` and `generate`, and `strategies`, a mix of the guided arm's such as
    {"img2img": 0.7, "inpaint": 0.3}.

    No comparison of arms: each trial takes as many images as its own pools have, where the grid
    matches the arms of a cell.
    """
    s = config.sweep
    arm = "guided" if "guided" in s.arms else s.arms[0]
    found: dict[str, Any] = {
        "real": list(s.real),
        "ratio": list(s.ratios),
        "seed": list(range(s.seeds)),
    }
    if arm == "guided":
        found["strategies"] = [{name: 1.0} for name in s.strategies or [config.generate.strategy]]
    return {k: tune.grid_search(v) for k, v in found.items()} | {
        "arm": arm,
        "sees": s.denoiser_sees[0],
    }


def asked(config: Config) -> dict[str, Any]:
    """The space of `sweep.search`. UserError for a name or a value that no trial can have."""
    search = config.sweep.search
    assert search is not None
    return _held(config) | {key: _domain(config, key, value) for key, value in search.space.items()}


def _held(config: Config) -> dict[str, Any]:
    """What every trial of a search has, unless its space says otherwise."""
    s = config.sweep
    found = {
        "real": s.real[0],
        "arm": s.arms[0],
        "sees": s.denoiser_sees[0],
        "seed": 0,
        "ratio": max(s.ratios),
    }
    mix = (
        {"strategies": {(s.strategies or [config.generate.strategy])[0]: 1.0}}
        if s.arms[0] == "guided"
        else {}
    )
    return found | mix


def _domain(config: Config, key: str, value: dict[str, Any]) -> Any:
    where = f"sweep.search.space.{key}"
    section, _, name = key.partition(".")
    known = {n: getattr(cfg, n.capitalize()).model_fields for n in SECTIONS}
    if key not in SEARCHABLE and name not in known.get(section, ()):
        raise UserError(
            f"{where}: no such setting; give {', '.join(SEARCHABLE)}, classifier.NAME or "
            "generate.NAME"
        )
    if key in FIXED:
        raise UserError(f"{where}: a trial does not follow it; give {FIXED[key]}")
    if len(value) != 1 or next(iter(value)) not in SPACES:
        raise UserError(
            f"{where} {value}: give one of {', '.join(SPACES)}, say {{loguniform: [0.0001, 0.01]}}"
        )
    kind, given = next(iter(value.items()))
    if not isinstance(given, list) or not given:
        raise UserError(f"{where} {value}: {kind} takes a list")
    given = [_number(x) for x in given]
    try:
        made = tune.choice(given) if kind == "choice" else getattr(tune, kind)(*given)
    except (TypeError, ValueError, AssertionError) as e:
        raise UserError(f"{where} {value}: {' '.join(str(e).split())}") from None
    for one in given if kind == "choice" else given[:2]:  # of a range its ends
        _check(config, where, key, one)
    return made


def _number(value: Any) -> Any:
    """1e-4 is text to YAML."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _check(config: Config, where: str, key: str, value: Any) -> None:
    most = max(config.sweep.ratios)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key == "ratio" and not (is_number and 0 <= value <= most):
        raise UserError(
            f"{where}: {value} does not lie in 0 ... {most:g}, the largest of "
            "sweep.ratios, which images are generated for"
        )
    if key == "seed" and not (isinstance(value, int) and value >= 0):
        raise UserError(
            f"{where}: {value} is no seed; give whole numbers from 0, by choice or randint"
        )
    if key == "strategies":
        check_mix(value, where)
    elif key not in SEARCHABLE:
        settled(config, {key: value}, where)


def check_mix(mix: Any, where: str = "strategies") -> None:
    """UserError where it is no mix of strategies."""
    fits = (
        isinstance(mix, dict)
        and mix
        and all(isinstance(w, int | float) and 0 <= w < math.inf for w in mix.values())
    )
    if (
        not fits
        or not sum(mix.values()) > 0
        or (strange := [k for k in mix if k not in STRATEGIES])
    ):
        what = (
            f"{strange[0]} is no strategy"
            if fits and sum(mix.values()) > 0
            else "that is no mix of shares above 0"
        )
        raise UserError(
            f"{where} {mix}: {what}; give, say, {{img2img: 0.7, inpaint: 0.3}}; strategies "
            f"are {', '.join(STRATEGIES)}"
        )


def scheduler(config: Config, mode: str = "max") -> TrialScheduler:
    """By name, with its arguments; time is a training's steps. UserError for a name or an argument
    there is not.
    """
    search, c = config.sweep.search, config.classifier
    assert search is not None
    name = {"asha": "async_hyperband"}.get(search.scheduler, search.scheduler)
    if name == "fifo":
        return FIFOScheduler()
    # What one of them does not know is dropped. Of trials that reach the end none is stopped just
    # before it.
    usual = {
        "time_attr": STEP,
        "max_t": c.steps,
        "grace_period": -(-c.steps // c.evaluations),
        "stop_last_trials": False,
    }
    more = {k: v for k, v in usual.items() if k not in search.scheduler_args} | {
        "metric": SCORE,
        "mode": mode,
    }
    return _made(
        "scheduler", search.scheduler, partial(create_scheduler, name), search.scheduler_args, more
    )


def searcher(config: Config, mode: str = "max") -> Any:
    """As `scheduler`. Random search is seeded: begun again it draws the same trials in the same
    order.
    """
    search = config.sweep.search
    assert search is not None
    if search.searcher in ("random", "variant_generator"):
        return _made(
            "searcher",
            search.searcher,
            BasicVariantGenerator,
            search.searcher_args,
            {"random_state": config.seed},
        )
    make = partial(create_searcher, search.searcher)
    return _made(
        "searcher", search.searcher, make, search.searcher_args, {"metric": SCORE, "mode": mode}
    )


def _made(
    what: str, name: str, make: Callable[..., Any], given: dict[str, Any], more: dict[str, Any]
) -> Any:
    try:
        made = make(**more | given)
    except (ValueError, TypeError, AssertionError, ImportError) as e:
        raise UserError(f"sweep.search.{what} {name}: {' '.join(str(e).split())[:300]}") from None
    known = inspect.signature(type(made).__init__).parameters
    if strange := [key for key in given if key not in known]:  # Tune drops them without a word
        raise UserError(
            f"sweep.search.{what}_args: {name} knows no {', '.join(strange)}; it takes "
            f"{', '.join(list(known)[1:])}"
        )
    return made


def _stops_early(search: cfg.Search) -> bool:
    return search.scheduler != "fifo"


def check(config: Config) -> None:
    """UserError where a search makes no sense: it compares no arms, for a scheduler that stops
    trials early would not be fair to them.
    """
    s = config.sweep
    assert s.search is not None
    asked(config), scheduler(config), searcher(config)
    for name in ("real", "arms", "denoiser_sees", "strategies"):
        if len(getattr(s, name) or ()) > 1:
            raise UserError(
                f"sweep.{name} {getattr(s, name)}: sweep.search is for one of them; "
                "compare several by the grid (search: null)"
            )
    if _stops_early(s.search) and s.metric != "balanced_accuracy":
        raise UserError(
            f"sweep.search.scheduler {s.search.scheduler} beside sweep.metric {s.metric}: "
            "before a training ends only "
            "balanced_accuracy is known; take that metric, or the scheduler fifo"
        )
    if config.cluster.training_workers > 1:
        raise UserError(
            f"cluster.training_workers {config.cluster.training_workers}: a trial of "
            "sweep.search trains on one device; set 1"
        )


# ---- a trial -------------------------------------------------------------------------------------


def trainable(
    config: Config, run: RunDir, threads: int = 1
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function for `tune.Tuner`. It makes what its cell lacks, trains one classifier, reports
    {"score", "step"} on `select` at every evaluation, and all metrics with the last. run: of a
    sweep whose `data` is prepared. UserError for what cannot be.
    """
    home, folder = Path.cwd(), folder_of(config, run)

    def trial(asks: dict[str, Any]) -> dict[str, Any]:
        if home.is_dir():
            os.chdir(home)
        return explored(config, run, asks, threads, tune.report, folder)

    return trial


def folder_of(config: Config, run: RunDir) -> StoragePath:
    """Where the trials of a search lie: another search has another folder; `own` is of a space that
    came from elsewhere.
    """
    own = config.sweep.search is None
    return (
        run.root
        / "search"
        / ("own" if own else digest(json.dumps(_asked(config), sort_keys=True), size=6))
    )


def trial_dir(folder: StoragePath, asks: dict[str, Any]) -> StoragePath:
    return folder / digest(json.dumps(_plain(asks), sort_keys=True), size=8)


def explored(
    config: Config,
    run: RunDir,
    asks: dict[str, Any],
    threads: int,
    report: Callable[[dict[str, Any]], None],
    folder: StoragePath,
) -> dict[str, Any]:
    """One trial, by its configuration alone: the same configuration is the same folder, which is
    not made twice; what it said at its evaluations it says again.
    """
    point = {
        "real": "all",
        "ratio": 1.0,
        "arm": "guided",
        "sees": "subset",
        "seed": 0,
        "strategies": None,
    } | asks
    own, base = settled(config, asks), config
    cell, d = _cell(run, point["real"])
    out = trial_dir(folder, asks)
    if (early := files.read_json(out / STOPPED)) is not None:
        return {SCORE: early[SCORE], STEP: early[STEP], STOPPED: True}
    if (made := files.read_json(out / "result" / step_folder.MANIFEST)) is not None:
        for step, score in made["evaluations"][:-1]:
            report({SCORE: score, STEP: step})
        return _result(config, made)
    engine = LocalEngine(threads, threads, lambda state: _tell(state, report))
    ratio, arm = float(point["ratio"]), str(point["arm"]) if float(point["ratio"]) else "real"
    _check(config, "trial", "ratio", ratio)
    _ready(base, run, cell, d, engine)
    pools = _pools(own, base, run, cell, point, engine) if arm in GENERATED else {}
    source = sweep_run.TrialImages(d, list(pools), pools)
    told = {
        "cell": cell.name,
        "count": cell.count,
        "arm": arm,
        "ratio": ratio,
        "seed": int(point["seed"]),
        "asks": _plain(asks),
    }
    sweep_run.fit_and_score(own, source, arm, ratio, int(point["seed"]), out, engine, told)
    return _result(config, step_folder.manifest(out / "result"))


def _result(config: Config, made: dict[str, Any]) -> dict[str, Any]:
    return made["metrics"] | {SCORE: made["metrics"][config.sweep.metric], STEP: made["steps"]}


def _tell(state: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    if (
        "select_balanced_accuracy" in state and state["done"] < state["total"]
    ):  # the last is told with all metrics
        report({SCORE: state["select_balanced_accuracy"], STEP: state["done"]})


def _plain(asks: dict[str, Any]) -> dict[str, Any]:
    return {k: v.item() if hasattr(v, "item") else v for k, v in sorted(asks.items())}


def settled(config: Config, asks: dict[str, Any], where: str = "the trial") -> Config:
    """The configuration with a trial's dotted settings. UserError for one that is wrong."""
    tree = config.model_dump(mode="json")
    for key, value in _plain(asks).items():
        if key in POINT:
            continue
        section, _, name = key.partition(".")
        if section not in SECTIONS or name not in tree[section]:
            raise UserError(
                f"{key}: a trial takes {', '.join(POINT)}, classifier.NAME or generate.NAME"
            )
        tree[section][name] = value
    return cfg.check(tree, where)


def _cell(run: RunDir, real: Any) -> tuple[DataRegime, RunDir]:
    cell = DataRegime(None if real == grid.ALL else int(real))
    return cell, grid.cell_dir(run, cell)


def _ready(config: Config, run: RunDir, cell: DataRegime, d: RunDir, engine: LocalEngine) -> None:
    """What every trial of a cell needs, made by the first."""
    with alone(d.root):
        regimes.subset(run.data, cell, config.sweep.subset_seed, d.data, engine.handle)
        regimes.first_mix(d, engine.handle)
        if not step_folder.is_finished(regimes.hard_cases_of(config, d)):
            regimes.find_hard_cases(config, d, engine.silent())


def _pools(
    own: Config,
    base: Config,
    run: RunDir,
    cell: DataRegime,
    point: dict[str, Any],
    engine: LocalEngine,
) -> dict[Path, float]:
    """The pools that a trial takes its images from, and the share of each: those of the grid where
    `generate` is the run's own.
    """
    arm, sees = str(point["arm"]), str(point["sees"])
    mix = point["strategies"] or {own.generate.strategy: 1.0}
    if arm == "guided":
        check_mix(mix)
    source = DataRegime(None) if sees == grid.ALL else cell
    d, at = grid.cell_dir(run, cell), grid.cell_dir(run, source)
    if source != cell:
        with alone(at.root):
            regimes.subset(run.data, source, base.sweep.subset_seed, at.data, engine.handle)
            regimes.first_mix(at, engine.handle)
    with alone(at.root / "denoiser"):
        if not step_folder.is_finished(at.denoiser):
            regimes.denoise(base, at, engine.silent())
    strategies = {k: float(w) for k, w in mix.items() if w > 0} if arm == "guided" else {"": 1.0}
    suffix = (
        ""
        if own.generate == base.generate
        else "-" + digest(own.generate.model_dump_json(), size=4)
    )
    found = {}
    for strategy, share in strategies.items():
        variant = Variant(arm, strategy, sees if cell.count is not None else "subset")
        out = grid.pool_dir(run, cell, variant)
        out = out.with_name(out.name + suffix)
        whose = sweep_run.whose(own, cell, variant)
        with alone(out):
            if not step_folder.is_finished(regimes.verdicts_of(out)):
                regimes.generate_pool(
                    own,
                    d,
                    at.denoiser,
                    variant,
                    whose,
                    max(base.sweep.ratios),
                    out,
                    engine.silent(),
                )
        found[out] = share
    return found


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


# ---- the search ----------------------------------------------------------------------------------


class _Halt(tune.Stopper):
    """Ends a search where somebody wants a pause: trials go on from their checkpoints."""

    def __init__(self) -> None:
        self.pause: Pause | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.pause is not None


class _Watch(tune.Callback):
    """Notes what a scheduler stopped, so that it is not begun again, and how far the search is."""

    def __init__(self, folder: StoragePath, total: int, halt: _Halt) -> None:
        self.folder, self.total, self.halt = folder, total, halt
        self.running: dict[str, str] = {}
        self.done = self.stopped = self.failed = 0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running[trial.trial_id] = ", ".join(
            f"{k} {_short(v)}" for k, v in _plain(trial.evaluated_params or {}).items()
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.pop(trial.trial_id, None)
        last = trial.last_result or {}
        out = trial_dir(self.folder, trial.config)
        if last.get(FAULT):
            self.failed += 1
        elif step_folder.is_finished(out / "result"):
            self.done += 1
        elif not self.halt.pause:
            self.stopped += 1
            if SCORE in last and not (out / STOPPED).exists():
                files.write_json(
                    out / STOPPED,
                    {SCORE: last[SCORE], STEP: last[STEP], "asks": _plain(trial.config)},
                )

    def state(self) -> dict[str, Any]:
        found = {
            "done": self.done + self.stopped,
            "total": self.total,
            "unit": "trial",
            "running": list(self.running.values()),
        }
        return found | {"failed": self.failed, "stopped": self.stopped}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _once(config: Config, run: RunDir, engine: RayEngine) -> list[dict[str, Any]]:
    told = {"command": sweep_run.COMMAND}
    status.set_status(run, "running", "prepare", **told)
    prepare.prepare(engine, config.data, run.data)
    split = files.read_json(run.data / "split.json") or {}
    grid.check_counts(config, split["images"]["train"], exact=True)
    status.set_status(run, "running", sweep_run.COMMAND, **told)
    with engine.tuning() as (concurrency, storage):
        progress = Progress(run.root / "trials")
        found = explore(config, run, concurrency, storage, progress, engine.handle)
    (run.root / "trials" / step_folder.PROGRESS).unlink(missing_ok=True)
    return found


def run(
    config: Config,
    run: RunDir,
    engine: RayEngine,
    since: float | None = None,
    handle: RunHandle = NULL_HANDLE,
) -> list[dict[str, Any]]:
    """`sweep.search`: prepares what trials need, searches, and writes search.json: `rows`. Begun
    again it makes no trial twice.
    """
    engine.handle = handle
    remove_partial_files(run)
    sweep_run.settle(config, run)
    told = {"command": sweep_run.COMMAND}
    with tracking.Follow(config.tracking, run.root), Clock(run, since):
        found = with_pauses(
            handle,
            partial(_once, config, run, engine),
            partial(status.set_status, run, "paused", sweep_run.COMMAND, **told),
        )
        files.write_json(
            run.root / grid.SEARCHED, _asked(config) | {"role": "select", "trials": found}
        )
        return found


def is_finished(config: Config, run: RunDir) -> bool:
    """Whether this very search is done."""
    found = files.read_json(run.root / grid.SEARCHED) or {}
    return all(found.get(k) == v for k, v in _asked(config).items())


def _asked(config: Config) -> dict[str, Any]:
    assert config.sweep.search is not None
    return {
        "metric": config.sweep.metric,
        "search": config.sweep.search.model_dump(mode="json"),
        "held": _held(config),
    }


def explore(
    config: Config,
    run: RunDir,
    concurrency: Concurrency,
    storage: StoragePath,
    report: Callable[[dict[str, Any]], None],
    handle: RunHandle,
) -> list[dict[str, Any]]:
    """A row for each trial (`rows`). UserError where trials failed; Pause."""
    search, folder = config.sweep.search, folder_of(config, run)
    assert search is not None
    (run.root / "trials").mkdir(parents=True, exist_ok=True)
    halt = _Halt()
    watch = _Watch(folder, search.samples, halt)
    tuner = tune.Tuner(
        tune.with_resources(
            _fixable(trainable(config, run, concurrency.threads)), concurrency.asks
        ),
        param_space=asked(config),
        tune_config=tune.TuneConfig(
            search_alg=searcher(config),
            scheduler=scheduler(config),
            num_samples=search.samples,
            max_concurrent_trials=concurrency.most,
            reuse_actors=not _stops_early(search),
        ),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex,
            verbose=0,
            callbacks=[watch],
            stop=halt,
            failure_config=tune.FailureConfig(max_failures=concurrency.attempts - 1),
            **_stored(storage),
        ),
    )
    results = watched(tuner, lambda: _poll(watch, halt, report, handle))
    for error in results.errors:
        raise user_error(error) or error
    if halt.pause is not None:
        raise halt.pause
    if bugs := [r.metrics[BUG] for r in results if r.metrics and r.metrics.get(BUG)]:
        raise RuntimeError(f"a trial failed:\n{bugs[0]}")
    faults = [r.metrics[FAULT] for r in results if r.metrics and r.metrics.get(FAULT)]
    if faults:
        raise UserError(
            f"{len(faults)} of {search.samples} trials failed; the first: {faults[0]}; "
            "what the others made is kept"
        )
    return rows(folder, config.sweep.metric)


def _poll(
    watch: _Watch, halt: _Halt, report: Callable[[dict[str, Any]], None], handle: RunHandle
) -> None:
    report(watch.state())
    if halt.pause is None:
        try:
            handle.poll()
        except Pause as pause:
            halt.pause = pause


def _fixable(
    trial: Callable[[dict[str, Any]], dict[str, Any]],
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """An exception comes home as a result, and is not tried again: only dead processes are."""

    def told(config: dict[str, Any]) -> dict[str, Any]:
        try:
            return trial(config)
        except UserError as e:
            return {FAULT: fault(e), SCORE: -1.0, STEP: 0}
        except Exception:
            return {BUG: traceback.format_exc(), SCORE: -1.0, STEP: 0}

    return told


def rows(folder: StoragePath, metric: str) -> list[dict[str, Any]]:
    """Every trial of a search so far, the best first, those the scheduler stopped after those that
    finished: asks (its configuration), state, score and what else is known.
    """
    found = []
    for out in sorted(folder.iterdir(), key=str) if folder.exists() else ():
        if (made := files.read_json(out / "result" / step_folder.MANIFEST)) is not None:
            kept = {k: made[k] for k in ("metrics", "steps", "device_seconds", "added", "real")}
            found.append(
                {"asks": made["trial"]["asks"], "state": "finished", SCORE: made["metrics"][metric]}
                | kept
            )
        elif (early := files.read_json(out / STOPPED)) is not None:
            found.append(
                {
                    "asks": early["asks"],
                    "state": "stopped",
                    SCORE: early[SCORE],
                    "steps": early[STEP],
                }
            )
    return sorted(found, key=lambda r: (r["state"] != "finished", -r[SCORE]))
