"""`sweep.search`: trials (trainable.py) drawn from a space by Ray Tune's own samplers, with any of
its searchers and schedulers by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import TrialScheduler, create_scheduler
from ray.tune.search import create_searcher

from adversa.config import Config
from adversa.distributed.engine import RayEngine
from adversa.distributed.errors import user_error
from adversa.distributed.search import BUG, FAULT, Concurrency, outcome, run_config
from adversa.distributed.trainable import (
    SCORE,
    STEP,
    STOPPED,
    Settings,
    folder_of,
    held,
    identity,
    plain,
    resolve,
    trainable,
    trial_dir,
)
from adversa.distributed.training import watched
from adversa.engine.interface import Tell
from adversa.run import step_folder
from adversa.run.control import NULL_HANDLE, Pause, RunHandle
from adversa.run.folder import RunDir
from adversa.run.step_folder import Progress
from adversa.storage import files
from adversa.storage.path import StoragePath, names
from adversa.sweep import grid
from adversa.sweep import run as sweep_run
from adversa.types import UserError

# Settings that a search does not vary, and what to give in their place.
FIXED = {
    "real": "sweep.real",
    "arm": "sweep.arms",
    "sees": "sweep.denoiser_sees",
    "generate.strategy": "strategies, say {choice: [{img2img: 1}, {inpaint: 1}]}",
    "generate.per_case": "ratio",
    "generate.adaptive": "generate.sigma_start",
    "classifier.patience": "a scheduler such as asha",
}
SAMPLERS = (
    *("choice", "uniform", "quniform", "loguniform", "qloguniform"),
    *("randint", "qrandint", "lograndint", "qlograndint"),
)


# ---- what is searched ----------------------------------------------------------------------------


def search_space(config: Config) -> Settings:
    """`sweep.search.space` as Tune's samplers, beside what every trial has. UserError for what no
    trial can have: the configuration of one is made for every choice, for the ends of a range and
    for a value drawn from it.
    """
    assert config.sweep.search is not None
    found = held(config)
    for key, value in config.sweep.search.space.items():
        where = f"sweep.search.space.{key}"
        if key in FIXED:
            raise UserError(f"{where}: a search does not vary it; give {FIXED[key]}")
        kind, given = next(iter(value.items()), ("", None))
        if len(value) != 1 or kind not in SAMPLERS or not isinstance(given, list) or not given:
            raise UserError(
                f"{where} {value}: give one of {', '.join(SAMPLERS)} and a list, say "
                "{loguniform: [0.0001, 0.01]}"
            )
        given = [_number(x) for x in given]
        for one in given if kind == "choice" else given[:2]:
            resolve(config, held(config) | {key: one}, where)
        try:
            found[key] = tune.choice(given) if kind == "choice" else getattr(tune, kind)(*given)
            drawn = found[key].sample(random_state=0)
        except (TypeError, ValueError, AssertionError, ArithmeticError) as e:
            raise UserError(f"{where} {value}: {' '.join(str(e).split())}") from None
        resolve(config, held(config) | {key: drawn}, where)
    return found


def _number(value: Any) -> Any:
    """1e-4 is text to YAML."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def scheduler(config: Config) -> TrialScheduler:
    """By name, with its arguments; time is a training's steps. UserError for a name or an argument
    there is not.
    """
    search, c = config.sweep.search, config.classifier
    assert search is not None
    # Of trials that reach the end none is stopped just before it.
    usual = {
        "time_attr": STEP,
        "max_t": c.steps,
        "grace_period": -(-c.steps // c.evaluations),
        "stop_last_trials": False,
    }
    make = partial(
        create_scheduler, {"asha": "async_hyperband"}.get(search.scheduler, search.scheduler)
    )
    made: TrialScheduler = _made(
        f"scheduler {search.scheduler}", make, usual, search.scheduler_args
    )
    return made


def searcher(config: Config) -> Any:
    """As `scheduler`. Random search is seeded: begun again it draws the same trials in the same
    order.
    """
    search = config.sweep.search
    assert search is not None
    usual = (
        {"random_state": config.seed} if search.searcher in ("random", "variant_generator") else {}
    )
    make = partial(create_searcher, search.searcher)
    return _made(f"searcher {search.searcher}", make, usual, search.searcher_args)


def _made(what: str, make: Callable[..., Any], usual: Settings, given: Settings) -> Any:
    kind, name = what.split()
    if told := [key for key in ("metric", "mode") if key in given]:  # Tune takes them from one side
        raise UserError(
            f"sweep.search.{kind}_args: {told[0]}: a search compares by sweep.metric; leave it out"
        )
    try:
        made = make(**usual | given)
    except (ValueError, TypeError, AssertionError, ImportError, TuneError) as e:
        raise UserError(f"sweep.search.{what}: {' '.join(str(e).split())[:300]}") from None
    known = inspect.signature(type(made).__init__).parameters
    if strange := [key for key in given if key not in known]:  # Tune drops them without a word
        raise UserError(
            f"sweep.search.{kind}_args: {name} knows no {', '.join(strange)}; it takes "
            f"{', '.join(list(known)[1:])}"
        )
    return made


def check(config: Config) -> None:
    """UserError where a search makes no sense: it compares no arms, for a scheduler that stops
    trials early would not be fair to them.
    """
    s = config.sweep
    assert s.search is not None
    search_space(config), scheduler(config), searcher(config)
    for name in ("real", "arms", "denoiser_sees", "strategies"):
        if len(getattr(s, name) or ()) > 1:
            raise UserError(
                f"sweep.{name} {getattr(s, name)}: sweep.search is for one of them; "
                "compare several by the grid (search: null)"
            )
    if s.search.scheduler != "fifo" and s.metric != "balanced_accuracy":
        raise UserError(
            f"sweep.search.scheduler {s.search.scheduler} beside sweep.metric {s.metric}: "
            "before a training ends only balanced_accuracy is known; take that metric, or the "
            "scheduler fifo"
        )
    if config.cluster.training_workers > 1:
        raise UserError(
            f"cluster.training_workers {config.cluster.training_workers}: a trial of "
            "sweep.search trains on one device; set 1"
        )


# ---- the search ----------------------------------------------------------------------------------


class _Watch(tune.Callback, tune.Stopper):
    """Notes what a scheduler stopped, so that it is not begun again, and how far the search is;
    ends it where somebody wants a pause: trials go on from their checkpoints.
    """

    def __init__(self, folder: StoragePath, total: int) -> None:
        self.folder, self.total = folder, total
        self.pause: Pause | None = None
        self.running: dict[str, str] = {}
        self.done = self.stopped = self.failed = 0

    def __call__(self, trial_id: str, result: Settings) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.pause is not None

    def on_trial_start(
        self, iteration: int, trials: list[Any], trial: tune.experiment.Trial, **info: Any
    ) -> None:
        self.running[trial.trial_id] = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in plain(trial.evaluated_params or {}).items()
        )

    def on_trial_complete(
        self, iteration: int, trials: list[Any], trial: tune.experiment.Trial, **info: Any
    ) -> None:
        self.running.pop(trial.trial_id, None)
        last = trial.last_result or {}
        out = trial_dir(self.folder, trial.config)
        if last.get(FAULT):
            self.failed += 1
        elif step_folder.is_finished(out / "result"):
            self.done += 1
        elif not self.pause:
            self.stopped += 1
            if SCORE in last and not (out / STOPPED).exists():
                kept = {SCORE: last[SCORE], STEP: last[STEP], "asks": plain(trial.config)}
                files.write_json(out / STOPPED, kept)

    def poll(self, report: Tell, handle: RunHandle) -> None:
        """Tell how far it is, and hear what people ask for."""
        report(
            {
                "done": self.done + self.stopped,
                "total": self.total,
                "unit": "trial",
                "running": list(self.running.values()),
                "failed": self.failed,
                "stopped": self.stopped,
            }
        )
        if self.pause is None:
            try:
                handle.poll()
            except Pause as pause:
                self.pause = pause


def run(
    config: Config,
    run: RunDir,
    engine: RayEngine,
    since: float | None = None,
    handle: RunHandle = NULL_HANDLE,
) -> list[Settings]:
    """`sweep.search`: prepares what trials need, searches, and writes search.json: `rows`. Begun
    again it makes no trial twice.
    """

    def search(config: Config, run: RunDir, engine: RayEngine, report: Progress) -> None:
        with engine.tuning() as (concurrency, storage):
            explore(config, run, concurrency, storage, report, engine.handle)

    def write(config: Config, run: RunDir) -> StoragePath:
        found = {"role": "select", "trials": rows(folder_of(config, run), config.sweep.metric)}
        files.write_json(run.root / grid.SEARCHED, identity(config) | found)
        return run.root / grid.SEARCHED

    page = sweep_run.run(config, run, engine, write, since, handle, search)
    return list((files.read_json(page) or {})["trials"])


def is_finished(config: Config, run: RunDir) -> bool:
    """Whether this very search is done."""
    found = files.read_json(run.root / grid.SEARCHED) or {}
    return all(found.get(k) == v for k, v in identity(config).items())


def explore(
    config: Config,
    run: RunDir,
    concurrency: Concurrency,
    storage: StoragePath,
    report: Tell,
    handle: RunHandle,
) -> None:
    """Do every trial of a search that is not done. UserError where trials failed; Pause."""
    search = config.sweep.search
    assert search is not None
    watch = _Watch(folder_of(config, run), search.samples)
    work = trainable(config, run, concurrency.threads)

    def trial(settings: Settings) -> Settings:
        return {SCORE: -1.0, STEP: 0} | outcome(partial(work, settings))

    tuner = tune.Tuner(
        tune.with_resources(trial, concurrency.asks),
        param_space=search_space(config),
        tune_config=tune.TuneConfig(
            metric=SCORE,
            mode="max",
            search_alg=searcher(config),
            scheduler=scheduler(config),
            num_samples=search.samples,
            max_concurrent_trials=concurrency.most,
            reuse_actors=search.scheduler == "fifo",
        ),
        run_config=run_config(storage, concurrency, [watch], stop=watch),
    )
    results = watched(tuner.fit, partial(watch.poll, report, handle))
    for error in results.errors:
        raise user_error(error) or error
    if watch.pause is not None:
        raise watch.pause
    last = [results[i].metrics or {} for i in range(len(results))]
    if bugs := [x[BUG] for x in last if x.get(BUG)]:
        raise RuntimeError(f"a trial failed:\n{bugs[0]}")
    if faults := [x[FAULT] for x in last if x.get(FAULT)]:
        raise UserError(
            f"{len(faults)} of {search.samples} trials failed; the first: {faults[0]}; "
            "what the others made is kept"
        )


def rows(folder: StoragePath, metric: str) -> list[Settings]:
    """Every trial of a search so far, the best first, those the scheduler stopped after those that
    finished: asks (its configuration), state, score and what else is known.
    """
    found: list[Settings] = []
    for out in (folder / name for name in sorted(names(folder))):
        if (made := files.read_json(out / "result" / step_folder.MANIFEST)) is not None:
            row = {"asks": made["trial"]["asks"], "state": "finished"}
            kept = ("metrics", "steps", "device_seconds", "added", "real")
            found.append(row | {SCORE: made["metrics"][metric]} | {k: made[k] for k in kept})
        elif (early := files.read_json(out / STOPPED)) is not None:
            row = {"asks": early["asks"], "state": "stopped"}
            found.append(row | {SCORE: early[SCORE], "steps": early[STEP]})
    return sorted(found, key=lambda r: (r["state"] != "finished", -r[SCORE]))
