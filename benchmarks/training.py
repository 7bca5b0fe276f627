"""What Ray Train and Ray Data cost a training: images a second beside the same loop without them,
seconds before the first step.

    python benchmarks/training.py                    the demo's classifier and denoiser, one worker
    python benchmarks/training.py --quick
    python benchmarks/training.py configs/ham10000-cpu.yaml --run-dir runs/ham10000-cpu

Three processes train the same model on the same batches:

    bare    forward, backward, AdamW over tensors in memory: no augmentation, no averaged weights,
            no checkpoint, no progress
    core    the core's fit function over batches in memory
    ray     the same fit function as a job of a Ray Train launch, fed by Ray Data, with all the
            processes that Ray has

They take turns, a window of a few seconds each while the others are stopped (SIGSTOP), so that what
else the machine does falls on all of them: its speed changes by half within minutes. A window
counts from its second step to its last whole one. The bar, ray against bare, is on the median over
the turns of the ratio within a turn. Core against bare is what the recipe itself costs, ray against
core what Ray does. All have the same number of torch threads; no evaluation is in it. The start-up
is of launches that nothing else ran beside; the first is the classifier's, and they are the two in
turn.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from common import Result, parser, publish

from adversa import config as cfg
from adversa.engine.batches import Batch
from adversa.engine.interface import FitJob
from adversa.engine.local import LocalEngine
from adversa.pipeline import loop, train
from adversa.run import environment
from adversa.run import folder as run_folder
from adversa.run.folder import RunDir

WINDOW = 4.0  # seconds of a turn
Window = tuple[str, float, float]  # who ran, from, to
ENDLESS = 10**6  # steps of a process that is ended from outside


@dataclasses.dataclass(frozen=True)
class Timed:
    """A fit function that notes when each batch was asked for and when it came: a line a batch in
    `out`.times.
    """

    fit: Any

    def __call__(self, batches: Any, *, out: Path, **options: Any) -> dict[str, Any]:
        with open(times_of(out), "w") as notes:
            return self.fit(watched(batches, notes), out=out, **options)


def watched(batches: Any, notes: Any) -> Iterator[Batch]:
    source = iter(batches)
    while True:
        asked = time.time()
        batch = next(source, None)
        if batch is None:
            return
        notes.write(f"{asked} {time.time()}\n")
        notes.flush()
        yield batch


def times_of(out: Path) -> Path:
    return out.with_suffix(".times")


def read_times(out: Path) -> list[tuple[float, float]]:
    """(asked, came) of each batch; a last line that is cut short is left out."""
    lines = times_of(out).read_text().split("\n")[:-1] if times_of(out).exists() else []
    return [(float(a), float(b)) for a, b in (line.split() for line in lines)]


# ---- the two that need no Ray --------------------------------------------------------------------


def alone(how: str, what: str, job: FitJob, config: cfg.Config, classes: int, threads: int) -> None:
    """Train over batches in memory, again and again, until the process is ended."""
    import torch

    torch.set_num_threads(threads)
    stored = list(job.feed.batches())
    job.out.mkdir(parents=True)
    if how == "core":
        job.fit(
            itertools.cycle(stored),
            out=job.out,
            report=lambda _: None,
            threads=threads,
            committed=lambda _: None,
            **({} if what == "denoiser" else {"select": lambda: []}),
        )
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = (_classifier_step if what == "classifier" else _denoiser_step)(config, classes, device)
    tensors = [
        {
            "image": torch.as_tensor(b["image"]).to(device),
            "label": torch.as_tensor(b["label"]).to(device),
        }
        for b in stored
    ]
    with open(times_of(job.out), "w") as notes:
        for batch in watched(itertools.cycle(tensors), notes):
            step(batch["image"], batch["label"])


def _classifier_step(config: cfg.Config, classes: int, device: Any) -> Callable[[Any, Any], float]:
    import torch

    from adversa.classify.model import build

    c = config.classifier
    model = build(c, classes, config.data.resolution).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, fused=True)

    def step(images: Any, labels: Any) -> float:
        pixels = images.permute(0, 3, 1, 2).float() / 255
        with torch.autocast(device.type, torch.bfloat16, enabled=c.amp):
            logits, _ = model(pixels)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        return _update(optimizer, loss)

    return step


def _denoiser_step(config: cfg.Config, classes: int, device: Any) -> Callable[[Any, Any], float]:
    import torch

    from adversa.diffuse import edm

    c = config.denoiser
    model = edm.build(c, classes, config.data.resolution).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, fused=True)

    def step(images: Any, labels: Any) -> float:
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        sigma = (c.p_mean + c.p_std * torch.randn(len(x), device=device)).exp()
        with torch.autocast(device.type, torch.bfloat16, enabled=c.amp):
            error = model(x + torch.randn_like(x) * sigma.view(-1, 1, 1, 1), sigma, labels) - x
        loss = (edm.loss_weight(sigma, c.sigma_data) * error.square().flatten(1).mean(1)).mean()
        return _update(optimizer, loss)

    return step


def _update(optimizer: Any, loss: Any) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()


class Processes:
    """When Ray's processes were created during a launch: {title of the process: time}, of several
    of one title the last.
    """

    def __init__(self) -> None:
        self.seen: dict[int, tuple[str, float]] = {}
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stopped.wait(0.2):
            for p in psutil.Process().children(recursive=True):
                try:
                    self.seen[p.pid] = (
                        p.cmdline()[0].removeprefix("ray::").split(".")[0],
                        p.create_time(),
                    )
                except (psutil.NoSuchProcess, IndexError):
                    continue  # it ended while we looked

    def stop(self) -> dict[str, float]:
        self.stopped.set()
        self.thread.join()
        found: dict[str, float] = {}
        for title, created in self.seen.values():
            found[title] = max(created, found.get(title, 0.0))
        return found


# ---- taking turns --------------------------------------------------------------------------------


class Turns:
    """While `ray` trains, lets it and the other processes run one after the other."""

    def __init__(self, out: Path, others: dict[str, subprocess.Popen[bytes]]) -> None:
        self.out, self.others, self.windows = out, others, list[Window]()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while len(read_times(self.out)) < 3:  # the launch has all for itself
            if self.ended.wait(0.2):
                return
        while not self.ended.is_set():
            for who in ("ray", *self.others):
                if who != "ray":
                    self._signal("ray", signal.SIGSTOP)
                self._signal(who, signal.SIGCONT)
                began = time.time()
                self.ended.wait(WINDOW)
                self.windows.append((who, began, time.time()))
                if who != "ray":
                    self._signal(who, signal.SIGSTOP)
                    self._signal("ray", signal.SIGCONT)

    def _signal(self, who: str, which: signal.Signals) -> None:
        pids = (
            [self.others[who].pid]
            if who != "ray"
            else [
                p.pid
                for p in psutil.Process().children(recursive=True)
                if p.pid not in {o.pid for o in self.others.values()}
            ]
        )
        for pid in pids:
            try:
                os.kill(pid, which)
            except ProcessLookupError:
                continue  # it ended while we looked

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()


def rates(
    windows: list[Window], times: dict[str, list[tuple[float, float]]], batch: int
) -> dict[str, list[float]]:
    """Images a second of each whole turn, by who."""
    found: dict[str, list[float]] = {who: [] for who in times}
    turns = len(windows) // len(times)
    for i in range(turns):
        turn = {}
        for who, began, ended in windows[i * len(times) : (i + 1) * len(times)]:
            asked = [a for a, _ in times[who] if began <= a <= ended][
                1:
            ]  # the first was asked for by a step that was cut in two
            if len(asked) >= 3:
                turn[who] = (len(asked) - 1) * batch / (asked[-1] - asked[0])
        if len(turn) == len(times):
            for who, value in turn.items():
                found[who].append(value)
    return found


def launch(
    engine: Any, job: FitJob, others: dict[str, subprocess.Popen[bytes]]
) -> tuple[dict[str, float], Turns]:
    """Train on Ray, in turns with the others; seconds from the call to each stage of its
    start-up.
    """
    watch, called = Processes(), time.time()
    turns = Turns(job.out, others)
    try:
        engine.fit([job])
    finally:
        turns.stop()  # whatever happened, Ray is not left stopped
    created, marks = watch.stop(), engine.started
    stages = {
        "training worker's process": created.get("RayTrainWorker", float("nan")),
        "its function called": marks["began"],
        "modules imported": marks["imported"],
        "first batch there": marks["first batch"],
        "first step done": read_times(job.out)[1][0],
    }
    return {name: at - called for name, at in stages.items()}, turns


def job_of(what: str, config: cfg.Config, run: RunDir, out: Path, steps_: int) -> FitJob:
    mix, side = run.arm(0, "real") / "mix", config.data.resolution
    if what == "classifier":
        section = config.classifier.model_copy(
            update={"evaluations": 1, "steps": steps_, "patience": None}
        )
        job = train.classifier_job(run.data, mix, [], section, 0, side, out)
    else:
        section_ = config.denoiser.model_copy(update={"steps": steps_, "sample_steps": 0})
        job = dataclasses.replace(
            train.denoiser_job(run.data, mix, section_, 0, side, out), select=None
        )  # no evaluations
    return dataclasses.replace(job, fit=Timed(job.fit))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "config", nargs="?", type=Path, help="a configuration; default: the demo"
    )
    arguments.add_argument(
        "--run-dir",
        type=Path,
        help="a run whose data is prepared; default: prepared in a temporary folder",
    )
    arguments.add_argument("--rounds", type=int, default=2, help="launches of each")
    arguments.add_argument(
        "--steps",
        type=int,
        default=1000,
        help="of the classifier on Ray; a quarter as many of the denoiser",
    )
    arguments.add_argument(
        "--alone",
        nargs=3,
        metavar=("HOW", "WHAT", "OUT"),
        help="for this program itself: train without Ray",
    )
    args = arguments.parse_args()
    if args.quick:
        args.rounds, args.steps = 1, 400
    config = cfg.load(args.config)
    threads = config.cluster.training_threads or environment.cpus()
    if args.alone is not None:
        how, what, out = args.alone
        run = RunDir(args.run_dir.absolute())
        job = job_of(what, config, run, Path(out), 200)
        if how == "core":
            job = dataclasses.replace(job_of(what, config, run, Path(out), ENDLESS), feed=job.feed)
        alone(how, what, job, config, len(run_folder.classes_of(run.data)), threads)
        return
    with tempfile.TemporaryDirectory() as temporary:
        publish(measure(args, config, Path(temporary)), args.json)


def measure(args: Any, config: cfg.Config, base: Path) -> list[Result]:
    run = RunDir((args.run_dir or base / "run").absolute())
    if args.run_dir is None:
        loop.open_run(config, run.root)
        loop.run(config, run, LocalEngine(1, 1), None, until="prepare")
        train.mix(run.data, [], [], "real", config.mix, 1, run.arm(0, "real") / "mix")
    from adversa.distributed.engine import RayEngine

    sizes = {"classifier": config.classifier.batch_size, "denoiser": config.denoiser.batch_size}
    found: dict[str, dict[str, list[float]]] = {
        what: {"ray": [], "bare": [], "core": []} for what in sizes
    }
    waits: dict[str, list[float]] = {what: [] for what in sizes}
    launches = []
    started = time.time()
    engine = RayEngine(config.cluster, run.root, config.data.resolution**2 * 3)
    ready = time.time() - started
    try:
        for i, what in itertools.product(range(args.rounds), sizes):
            outs = {how: base / f"{what}-{how}-{i}" for how in found[what]}
            others = {how: start_alone(args, run, how, what, outs[how]) for how in ("bare", "core")}
            try:
                job = job_of(
                    what, config, run, outs["ray"], args.steps // (1 if what == "classifier" else 4)
                )
                stages, turns = launch(engine, job, others)
            finally:
                for process in others.values():
                    process.kill()
                    process.wait()
            launches.append(stages)
            times = {how: read_times(out) for how, out in outs.items()}
            for how, values in rates(turns.windows, times, sizes[what]).items():
                found[what][how] += values
            waits[what].append(waiting(times["ray"], turns.windows))
    finally:
        engine.close()
    return table(found, waits, launches, ready)


def start_alone(args: Any, run: RunDir, how: str, what: str, out: Path) -> subprocess.Popen[bytes]:
    """Running, and stopped for now."""
    command = [
        sys.executable,
        __file__,
        *([str(args.config)] if args.config else []),
        "--run-dir",
        str(run.root),
    ]
    process = subprocess.Popen([*command, "--alone", how, what, str(out)])
    while len(read_times(out)) < 5:
        if process.poll() is not None:
            sys.exit(f"ended with {process.returncode}: {how} {what}")
        time.sleep(0.2)
    process.send_signal(signal.SIGSTOP)
    return process


def waiting(times: list[tuple[float, float]], windows: list[Window]) -> float:
    """Share of its windows that `ray` waits for data; the first window is that of the launch's own
    first batches.
    """
    own = [(a, b) for who, a, b in windows if who == "ray"][1:]
    waited = sum(
        came - asked for asked, came in times if any(a <= asked and came <= b for a, b in own)
    )
    return waited / sum(b - a for a, b in own)


def table(
    found: dict[str, dict[str, list[float]]],
    waits: dict[str, list[float]],
    launches: list[dict[str, float]],
    ready: float,
) -> list[Result]:
    rows = []
    for what, by in found.items():
        rows.append(Result(f"{what}, turns", len(by["ray"]), ""))
        rows += [
            Result(f"{what}, {how}", statistics.median(by[how]), "images/s")
            for how in ("bare", "core", "ray")
        ]
        for one, other, bar in (
            ("ray", "bare", 0.9),
            ("ray", "core", None),
            ("core", "bare", None),
        ):
            ratio = statistics.median(a / b for a, b in zip(by[one], by[other], strict=True))
            said, holds = (f"at least {bar}", ratio >= bar) if bar else ("", None)
            rows.append(Result(f"{what}, {one} / {other}", ratio, "", said, holds))
        share = statistics.median(waits[what])
        rows.append(
            Result(
                f"{what}, share of the time waiting for data", share, "", "under 0.05", share < 0.05
            )
        )
    rows.append(Result("Ray started", ready, "s"))
    for name in launches[0]:
        rows.append(Result(f"first launch: {name}", launches[0][name], "s after the call"))
        if len(launches) > 1:
            later = statistics.median(x[name] for x in launches[1:])
            rows.append(Result(f"later launches: {name}", later, "s after the call"))
    return rows


if __name__ == "__main__":
    main()
