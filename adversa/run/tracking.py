"""Metrics of a run's trainings sent to TensorBoard, MLflow or Weights & Biases, where the user
asked for it.

The `metrics.jsonl` of each training is the truth; a follower reads it and passes new lines on. So
nothing of this touches a training, its recipe or its worker: tracking may be turned on later
(everything there is is sent), and a service that fails costs no step. What was sent is noted in the
run folder: a training that resumes writes some lines again, and none is sent twice; one that is
begun afresh (its folder was deleted) is sent whole, as NAME-2.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from adversa.storage import files
from adversa.storage.path import StoragePath, relative
from adversa.types import Json, UserError, digest

METRICS = "metrics.jsonl"
WHERE = ("*", "round-*/*/*/*")  # folders of trainings, below the run's
SECONDS = 2.0
log = logging.getLogger("adversa.tracking")


class Sink(Protocol):
    """One service. name: of a training, its folder in the run (begun afresh, with -2 after it, then
    -3); lines come in order.
    """

    def send(self, name: str, step: int, values: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tracking/tensorboard`, a TensorBoard run for each training."""

    def __init__(self, root: StoragePath, state: Json) -> None:
        self.writer = _import("tensorboard", "torch.utils.tensorboard").SummaryWriter
        self.folder = _local(root, "tensorboard") / "tracking" / "tensorboard"
        self.writers: dict[str, Any] = {}

    def send(self, name: str, step: int, values: dict[str, float]) -> None:
        if name not in self.writers:
            self.writers[name] = self.writer(log_dir=str(self.folder / name))
        for key, value in values.items():
            self.writers[name].add_scalar(key, value, step)

    def flush(self) -> None:
        for writer in self.writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class MLflow:
    """An MLflow run for each training, in the server of MLFLOW_TRACKING_URI, else in
    `tracking/mlflow` of the run folder.
    """

    def __init__(self, root: StoragePath, state: Json) -> None:
        self.module, self.root, self.state = _import("mlflow"), root, state
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            _local(root, "mlflow (without MLFLOW_TRACKING_URI)")
        self.client: Any = None
        self.experiment = ""

    def send(self, name: str, step: int, values: dict[str, float]) -> None:
        client = self._client()
        known = self.state.setdefault("mlflow_runs", {})
        if name not in known:
            tags = {"mlflow.runName": f"{self.root.name}/{name}", "adversa.run": str(self.root)}
            known[name] = client.create_run(self.experiment, tags=tags).info.run_id
        for key, value in values.items():
            client.log_metric(known[name], key, value, step=step)

    def _client(self) -> Any:
        if self.client is None:
            uri = os.environ.get("MLFLOW_TRACKING_URI")
            if not uri:
                folder = self.root / "tracking" / "mlflow"
                folder.mkdir(parents=True, exist_ok=True)
                uri = f"sqlite:///{folder.absolute()}/mlflow.db"
            self.client = self.module.MlflowClient(tracking_uri=uri)
            found = self.client.get_experiment_by_name("adversa")
            self.experiment = (
                found.experiment_id
                if found is not None
                else self.client.create_experiment("adversa")
            )
        return self.client

    def flush(self) -> None:
        """Each metric is on the server when log_metric returns."""

    def close(self) -> None:
        for run in self.state.get("mlflow_runs", {}).values() if self.client is not None else ():
            self.client.set_terminated(run)


class Wandb:
    """One W&B run for the run folder; a training's metrics are NAME/metric over NAME/step.

    Offline in `tracking/wandb` (to be sent with `wandb sync`) unless WANDB_API_KEY or WANDB_MODE is
    set.
    """

    def __init__(self, root: StoragePath, state: Json) -> None:
        self.module, self.root = _import("wandb"), root
        _local(root, "wandb")
        self.run: Any = None
        self.defined: set[str] = set()

    def send(self, name: str, step: int, values: dict[str, float]) -> None:
        if self.run is None:
            mode = (
                None
                if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")
                else "offline"
            )
            folder = self.root / "tracking"
            folder.mkdir(parents=True, exist_ok=True)
            self.run = self.module.init(
                project="adversa",
                name=self.root.name,
                id=digest(str(self.root.absolute()), size=8),
                resume="allow",
                dir=str(folder),
                mode=mode,
                settings={
                    "silent": True,
                    "console": "off",
                },  # the terminal belongs to the live view
            )
        if name not in self.defined:
            self.run.define_metric(f"{name}/*", step_metric=f"{name}/step")
            self.defined.add(name)
        self.run.log(
            {f"{name}/step": step} | {f"{name}/{key}": value for key, value in values.items()}
        )

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


SINKS: dict[str, Callable[[StoragePath, Json], Sink]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": Wandb,
}


def _local(root: StoragePath, service: str) -> Path:
    """UserError where the run lies on an object store, and this service writes files beside it,
    piece by piece.
    """
    if not isinstance(root, Path):
        raise UserError(
            f"tracking: {service} writes files in the run's folder, and {root} is an "
            "object store; leave it out"
        )
    return root


def _import(package: str, module: str = "") -> Any:
    try:
        return importlib.import_module(module or package)
    except ImportError as e:
        raise UserError(
            f"tracking: {package} cannot be imported ({' '.join(str(e).split())}); "
            f"install it with `pip install {package}`, or leave it out of tracking"
        ) from None


class Follow:
    """While entered, passes what the run's trainings write to the services of `names`, from a
    thread that only reads the run.

    UserError at once where a service's package is missing. A service that fails later is left alone
    from then on, with a warning: it gets the rest when the same command runs again.
    """

    def __init__(self, names: Sequence[str], root: StoragePath) -> None:
        self.root = root
        self.states = {n: files.read_json(self._noted(n)) or {} for n in names}
        self.sinks = {n: SINKS[n](root, self.states[n]) for n in names}
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Follow:
        if self.sinks:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        if not self.sinks:
            return
        self.thread.join()
        self.poll()
        for name, sink in list(self.sinks.items()):
            self._guarded(name, sink.close)

    def _watch(self) -> None:
        while not self.stopped.wait(SECONDS):
            self.poll()

    def poll(self) -> None:
        """Send every line that was not sent yet (`unsent`)."""
        for name in list(self.sinks):
            self._guarded(name, partial(self._send, name))

    def _send(self, service: str) -> None:
        sink, state = self.sinks[service], self.states[service]
        trainings = state.setdefault("trainings", {})
        before = json.dumps(state)
        try:
            for path in sorted(p for where in WHERE for p in self.root.glob(f"{where}/{METRICS}")):
                name = relative(path.parent, self.root)
                noted = trainings.setdefault(name, {"start": 1, "first": "", "lines": 0})
                for step, values in unsent(list(lines(path)), noted):
                    sink.send(
                        name if noted["start"] == 1 else f"{name}-{noted['start']}", step, values
                    )
                    noted["lines"] += 1
            sink.flush()
        finally:
            if json.dumps(state) != before:
                files.write_json(self._noted(service), state)

    def _guarded(self, service: str, call: Callable[[], None]) -> None:
        try:
            call()
        except (
            Exception
        ) as e:  # whatever a service's client raises: a training of hours must not end with it
            del self.sinks[service]
            log.warning(
                "tracking: %s failed and is left alone from here on (%s); run the same "
                "command again to send the rest",
                service,
                " ".join(str(e).split())[:300] or type(e).__name__,
            )

    def _noted(self, service: str) -> StoragePath:
        return self.root / "tracking" / f"{service}.json"


def unsent(
    rows: Sequence[tuple[int, dict[str, float]]], noted: Json
) -> Sequence[tuple[int, dict[str, float]]]:
    """The lines of a training that are not sent yet, all of them where it is not the one that
    `noted` is about.

    noted: "lines" sent of the training whose "first" line has this digest, the "start"-th under its
    name; the caller counts on. The first line tells two trainings apart: a resumed one has it
    still, or has no line yet. What a resumed one has beyond its checkpoint it writes again, a line
    for a line, so that their number alone says which are new.
    """
    if not rows:
        return rows
    if (first := digest(rows[0])) != noted["first"]:
        noted.update(start=noted["start"] + (noted["lines"] > 0), first=first, lines=0)
    return rows[noted["lines"] :]


def lines(path: StoragePath) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, its finite numbers) of each whole line of a metrics.jsonl, in order."""
    for text in path.read_text().splitlines(keepends=True):
        if not text.endswith("\n"):
            return  # it is being written
        row = json.loads(text)
        numbers = {
            k: float(v)
            for k, v in row.items()
            if k != "step" and type(v) in (int, float) and math.isfinite(v)
        }
        yield int(row["step"]), numbers
