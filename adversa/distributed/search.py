"""Ray Tune around a list of trials: as many at a time as there is room for, each on an actor that
is used again and again.

Tune asks `TrialSource` what to run next, and that looks at the folders: what is finished is never
suggested, what waits for another is not suggested yet. So Tune keeps no state that matters, and a
search that was killed is simply begun anew (docs/decisions/0014).
"""

from __future__ import annotations

import os
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from adversa.config import Cluster
from adversa.distributed.errors import user_error
from adversa.distributed.training import _stored
from adversa.engine import resources
from adversa.engine.interface import Tell, Trial
from adversa.engine.local import LocalEngine
from adversa.engine.trials import TrialQueue, fault
from adversa.run.control import Pause, RunHandle
from adversa.storage.path import StoragePath
from adversa.types import UserError

POLL_SECONDS = 0.5
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

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
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


class Runner:
    """The trainable: works on the trial that Tune names. An exception comes home as a result: only
    dead processes are replaced.
    """

    def __init__(self, trials: Sequence[Trial], threads: int, home: Path) -> None:
        self.trials, self.threads, self.home = list(trials), threads, home

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        if self.home.is_dir():
            os.chdir(self.home)
        try:
            self.trials[config["trial"]].work(LocalEngine(self.threads, self.threads), _tell_nobody)
        except UserError as e:
            return {OVER: 1, FAULT: fault(e)}
        except Exception:
            return {OVER: 1, BUG: traceback.format_exc()}
        return {OVER: 1}


def _tell_nobody(state: dict[str, Any]) -> None:
    """Progress lies in the trial's folders; Tune needs none where no scheduler chooses."""


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
    source, runner = TrialSource(queue, on.most), Runner(trials, on.threads, Path.cwd())
    tuner = tune.Tuner(
        tune.with_resources(_function(runner), on.asks),
        tune_config=tune.TuneConfig(search_alg=source, num_samples=len(trials), reuse_actors=True),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex,
            verbose=0,
            callbacks=[Begun(source)],
            failure_config=tune.FailureConfig(max_failures=on.attempts - 1),
            **_stored(storage),
        ),
    )
    pauses: list[Pause] = []
    results = watched(tuner, lambda: _poll(source, report, handle, pauses))
    if pauses and queue.left():
        raise pauses[0]
    if source.bug:
        raise RuntimeError(f"a trial failed, {source.bug}")
    queue.running.clear()
    queue.settle()
    if left := queue.left():  # Tune ended early
        raise _lost(results, len(left))


def _lost(results: tune.ResultGrid, left: int) -> BaseException:
    return next(iter(results.errors), None) or RuntimeError(
        f"Ray Tune came home with {left} trials not done"
    )


def _function(runner: Runner) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Tune looks at the signature of a plain function."""

    def trial(config: dict[str, Any]) -> dict[str, Any]:
        return runner(config)

    return trial


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


def watched(tuner: tune.Tuner, poll: Callable[[], None]) -> tune.ResultGrid:
    """`tuner.fit()` in a thread of its own; this one polls, twice a second. UserError of a
    trial comes back as itself.
    """
    failure: list[BaseException] = []
    result: list[tune.ResultGrid] = []

    def call() -> None:
        try:
            result.append(tuner.fit())
        except BaseException as e:  # handed to the main thread, whatever it is
            failure.append(e)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        poll()
    if failure:
        raise user_error(failure[0]) or failure[0]
    return result[0]


def idle(seconds: float = 30.0) -> None:
    """Wait until what a search held is free again: the next stage asks for all of it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and ray.available_resources().get(
        "CPU", 0
    ) < ray.cluster_resources().get("CPU", 0):
        time.sleep(0.1)
