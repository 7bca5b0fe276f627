"""Ray Tune around a list of trials: as many at a time as there is room for, each on an actor that
is used again and again.

Tune asks `TrialSource` what to run next, and that looks at the folders: what is finished is never
suggested, what waits for another is not suggested yet. So Tune keeps no state that matters, and a
search that was killed is simply begun anew (docs/decisions/0014).
"""

from __future__ import annotations

import os
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from adversa.config import Cluster
from adversa.distributed.training import stored, watched
from adversa.engine import resources
from adversa.engine.interface import Tell, Trial
from adversa.engine.local import LocalEngine
from adversa.engine.trials import TrialQueue, fault
from adversa.run.control import Pause, RunHandle
from adversa.storage.path import StoragePath
from adversa.types import UserError

# Of a trial's result: what is fixable by the user, the traceback of a fault of ours, and that it
# came to its end.
FAULT, BUG, OVER = "fault", "bug", "over"


@dataclass(frozen=True)
class Concurrency:
    """What a trial asks for, how many run at most (None: as there is room), starts of one that
    dies, its torch threads.
    """

    asks: dict[str, float]
    most: int | None
    attempts: int
    threads: int


def concurrency(cluster: Cluster, gpus: float) -> Concurrency:
    """A trial takes a CPU with one torch thread, or a GPU (or its share) and a CPU."""
    threads = cluster.training_threads or 1
    return Concurrency(
        resources.trial_asks(cluster, gpus), cluster.trials, cluster.training_attempts, threads
    )


class TrialSource(Searcher):
    """What Tune runs next: the first trial that is ready. Its configuration is the trial's place in
    the list.
    """

    def __init__(self, queue: TrialQueue, most: int | None) -> None:
        super().__init__(metric=OVER, mode="max")
        self.queue, self.most = queue, most
        self.given: dict[str, int] = {}  # Tune's id of a trial -> its place
        self.bug = ""
        self.draining = (
            False  # nothing new is begun: somebody wants a pause, or the search is to end
        )

    def suggest(  # type: ignore[override]  # Searcher.FINISHED is text
        self, trial_id: str
    ) -> dict[str, Any] | str | None:
        if self.draining or self.queue.stuck():
            return Searcher.FINISHED
        if self.most is not None and len(self.queue.running) >= self.most:
            return None
        if (i := self.queue.next()) is None:
            return None
        self.queue.running.add(i)
        self.given[trial_id] = i
        return {"trial": i}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        i = self.given.pop(trial_id)
        self.queue.running.discard(i)
        if error:
            self.queue.failed[i] = (
                "its worker died every time it was begun; the machine may lack memory (see "
                "--verbose)"
            )
        elif result and result.get(FAULT):
            self.queue.failed[i] = str(result[FAULT])
        elif result and result.get(BUG):
            self.bug, self.draining = (
                self.bug or f"{self.queue.trials[i].name}:\n{result[BUG]}",
                True,
            )

    def save(self, checkpoint_path: str) -> None:
        """The folders hold all there is to keep."""

    def restore(self, checkpoint_path: str) -> None:
        """As `save`."""


class Begun(tune.Callback):
    """Tune has the next trial ready before there is room for it: notes which have begun."""

    def __init__(self, source: TrialSource) -> None:
        self.source = source

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if (i := self.source.given.get(trial.trial_id)) is not None:
            self.source.queue.begun.add(i)


def outcome(work: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """What a trial's work returns. An exception comes home as a result: only dead processes are
    replaced.
    """
    try:
        return work() or {}
    except UserError as e:
        return {FAULT: fault(e)}
    except Exception:
        return {BUG: traceback.format_exc()}


def run_config(
    storage: StoragePath,
    on: Concurrency,
    callbacks: list[tune.Callback],
    stop: tune.Stopper | None = None,
) -> tune.RunConfig:
    return tune.RunConfig(
        name=uuid.uuid4().hex,
        verbose=0,
        callbacks=callbacks,
        stop=stop,
        failure_config=tune.FailureConfig(max_failures=on.attempts - 1),
        **stored(storage),
    )


def search(
    trials: Sequence[Trial], on: Concurrency, storage: StoragePath, report: Tell, handle: RunHandle
) -> None:
    """Do every trial that is not finished. UserError where some failed; control's Pause once what
    was in flight is finished.
    """
    queue = TrialQueue(trials)
    if not queue.left():
        report(queue.state())
        return
    source, home = TrialSource(queue, on.most), Path.cwd()

    def trial(config: dict[str, Any]) -> dict[str, Any]:
        """Progress lies in the trial's folders; Tune needs none where no scheduler chooses."""
        if home.is_dir():
            os.chdir(home)
        engine = LocalEngine(on.threads, on.threads)
        work = partial(trials[config["trial"]].work, engine, lambda _: None)
        return {OVER: 1} | outcome(work)

    tuner = tune.Tuner(
        tune.with_resources(trial, on.asks),
        tune_config=tune.TuneConfig(search_alg=source, num_samples=len(trials), reuse_actors=True),
        run_config=run_config(storage, on, [Begun(source)]),
    )
    pauses: list[Pause] = []
    results = watched(tuner.fit, lambda: _poll(source, report, handle, pauses))
    if pauses and queue.left():
        raise pauses[0]
    if source.bug:
        raise RuntimeError(f"a trial failed, {source.bug}")
    queue.running.clear()
    queue.settle()
    if left := queue.left():  # Tune ended early
        lost = RuntimeError(f"Ray Tune came home with {len(left)} trials not done")
        raise next(iter(results.errors), lost)


def _poll(source: TrialSource, report: Tell, handle: RunHandle, pauses: list[Pause]) -> None:
    """Tell how far it is, and hear what people ask for: at a pause nothing new is begun, and what
    is in flight ends.
    """
    report(source.queue.state())
    if pauses:
        return
    try:
        handle.poll()
    except Pause as pause:
        pauses.append(pause)
        source.draining = True


def idle(seconds: float = 30.0) -> None:
    """Wait until what a search held is free again: the next stage asks for all of it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and ray.available_resources().get(
        "CPU", 0
    ) < ray.cluster_resources().get("CPU", 0):
        time.sleep(0.1)
