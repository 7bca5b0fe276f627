"""What Ray Train and Ray Data cost a training: images a second beside the same loop without them, seconds before the first step.

    python benchmarks/training.py                    the demo's classifier and denoiser, one worker, three rounds
    python benchmarks/training.py --quick
    python benchmarks/training.py configs/ham10000-cpu.yaml --run-dir runs/ham10000-cpu

Three ways of training the same model on the same batches, one after the other, round after round, so that what else the machine
does falls on all of them:

    bare    forward, backward, AdamW over tensors in memory: no augmentation, no averaged weights, no checkpoint, no progress
    core    the core's fit function over batches in memory, in this process
    ray     the same fit function as a job of a Ray Train launch, fed by Ray Data

Steady state is from the tenth batch to the last, without evaluations. The bar, ray against bare, is on the median over the
rounds of the ratio within a round. Core against bare is what the recipe itself costs, ray against core what Ray does. All at the
same number of torch threads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from common import Result, parser, publish

from adversa import config as cfg
from adversa.loop import cycle, steps
from adversa.loop.engine import FitJob, LocalEngine
from adversa.loop.feed import Batch
from adversa.runs import RunDir

SKIPPED = 10  # batches before the steady state: caches, first kernels, the filling of the stream's buffers


@dataclasses.dataclass(frozen=True)
class Timed:
    """A fit function that writes down when each batch was asked for and when it came: `out`.times.json."""

    fit: Any

    def __call__(self, batches: Any, *, out: Path, **options: Any) -> dict[str, Any]:
        asked: list[float] = []
        came: list[float] = []

        def watched() -> Iterator[Batch]:
            source = iter(batches)
            while True:
                asked.append(time.time())
                batch = next(source, None)
                if batch is None:
                    return
                came.append(time.time())
                yield batch

        metrics = self.fit(watched(), out=out, **options)
        out.with_suffix(".times.json").write_text(json.dumps({"asked": asked[: len(came)], "came": came}))
        return metrics


def steady(out: Path, batch: int) -> tuple[float, float]:
    """(images a second, share of the time spent waiting for data) of the steady state."""
    times = json.loads(out.with_suffix(".times.json").read_text())
    asked, came = times["asked"][SKIPPED:], times["came"][SKIPPED:]
    elapsed = asked[-1] - asked[0]
    return (len(asked) - 1) * batch / elapsed, sum(c - a for a, c in zip(asked[:-1], came[:-1], strict=True)) / elapsed


def core(job: FitJob, threads: int) -> None:
    batches = list(job.feed.batches())
    select = list(job.select.batches()) if job.select is not None else []
    more = {"select": lambda: select} if job.select is not None else {}
    job.out.mkdir(parents=True)
    job.fit(batches, out=job.out, report=lambda _: None, threads=threads, committed=lambda _: None, **more)


def bare(what: str, job: FitJob, config: cfg.Config, classes: int, threads: int) -> float:
    """Images a second."""
    import torch

    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step, batch = (_classifier_step if what == "classifier" else _denoiser_step)(config, classes, device)
    stored = [(torch.as_tensor(b["image"]).to(device), torch.as_tensor(b["label"]).to(device)) for b in job.feed.batches()]
    started = 0.0
    for i, (images, labels) in enumerate(stored):
        if i == SKIPPED:
            started = time.time()
        step(images, labels)
    return (len(stored) - SKIPPED) * batch / (time.time() - started)


def _classifier_step(config: cfg.Config, classes: int, device: Any) -> tuple[Callable[[Any, Any], float], int]:
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

    return step, c.batch_size


def _denoiser_step(config: cfg.Config, classes: int, device: Any) -> tuple[Callable[[Any, Any], float], int]:
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

    return step, c.batch_size


def _update(optimizer: Any, loss: Any) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()


class Processes:
    """When Ray's processes were created during a launch: {title of the process: time}, the earliest of each; CPU seconds of all."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[str, float, float]] = {}
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stopped.wait(0.2):
            for p in psutil.Process().children(recursive=True):
                try:
                    title, cpu = p.cmdline()[0], p.cpu_times()
                    self.seen[p.pid] = (title.removeprefix("ray::").split(".")[0], p.create_time(), cpu.user + cpu.system)
                except (psutil.NoSuchProcess, IndexError):
                    continue  # it ended while we looked

    def stop(self) -> dict[str, float]:
        self.stopped.set()
        self.thread.join()
        found: dict[str, float] = {}
        for title, created, _ in self.seen.values():
            found[title] = max(created, found.get(title, 0.0))  # a launch's processes are the last of their kind
        return found


def launch(engine: Any, jobs: list[FitJob]) -> dict[str, float]:
    """Train on Ray; seconds from the call to each stage of its start-up, and to its end."""
    watch, called = Processes(), time.time()
    engine.fit(jobs)
    ended, created, marks = time.time(), watch.stop(), engine.started
    first = json.loads(jobs[0].out.with_suffix(".times.json").read_text())["asked"]
    stages = {
        "training worker's process": created.get("RayTrainWorker", float("nan")), "its function called": marks["began"],
        "modules imported": marks["imported"], "first batch there": marks["first batch"], "first step done": first[1],
        "return": ended,
    }  # fmt: skip
    return {name: at - called for name, at in stages.items()}


def jobs_of(config: cfg.Config, run: Any, base: Path, which: str) -> dict[str, FitJob]:
    mix, side = run.arm(0, "real") / "mix", config.data.resolution
    found = {
        "classifier": steps.classifier_job(run.data, mix, [], config.classifier, 0, side, base / f"classifier-{which}"),
        "denoiser": steps.denoiser_job(run.data, mix, config.denoiser, 0, side, base / f"denoiser-{which}"),
    }
    found["denoiser"] = dataclasses.replace(found["denoiser"], select=None)  # else five evaluations in so short a training
    return {what: dataclasses.replace(job, fit=Timed(job.fit)) for what, job in found.items()}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("config", nargs="?", type=Path, help="a configuration; default: the demo")
    arguments.add_argument("--run-dir", type=Path, help="a run whose data is prepared; default: prepared in a temporary folder")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=200, help="of the classifier; half as many of the denoiser")
    args = arguments.parse_args()
    if args.quick:
        args.rounds, args.steps = 1, 60
    config = cfg.load(args.config)
    changes = {"evaluations": 1, "steps": args.steps, "patience": None}
    config = config.model_copy(
        update={
            "classifier": config.classifier.model_copy(update=changes),
            "denoiser": config.denoiser.model_copy(update={"steps": args.steps // 2, "sample_steps": 0}),
        }
    )
    with tempfile.TemporaryDirectory() as temporary:
        publish(measure(config, args.run_dir, Path(temporary), args.rounds), args.json)


def measure(config: cfg.Config, run_dir: Path | None, base: Path, rounds: int) -> list[Result]:
    run = RunDir((run_dir or base / "run").absolute())
    if run_dir is None:
        cycle.open_run(config, run.root)
        cycle.run(config, run, LocalEngine(1, 1), None, until="prepare")
        steps.mix(run.data, [], "real", ["real"], config.mix, run.arm(0, "real") / "mix")
    from adversa.distributed.engine import RayEngine

    threads = config.cluster.training_threads or os.cpu_count() or 1
    classes = len(steps.classes_of(run.data))
    sizes = {"classifier": config.classifier.batch_size, "denoiser": config.denoiser.batch_size}
    rates: dict[tuple[str, str], list[float]] = {}
    waits: dict[str, list[float]] = {"classifier": [], "denoiser": []}
    launches = []
    started = time.time()
    engine = RayEngine(config.cluster, run.root, config.data.resolution**2 * 3)
    ready = time.time() - started
    try:
        for i in range(rounds):
            jobs = jobs_of(config, run, base, f"core-{i}")
            for what, job in jobs.items():
                rates.setdefault((what, "bare"), []).append(bare(what, job, config, classes, threads))
                core(job, threads)
                rates.setdefault((what, "core"), []).append(steady(job.out, sizes[what])[0])
            jobs = jobs_of(config, run, base, f"ray-{i}")
            launches.append(launch(engine, list(jobs.values())))
            for what, job in jobs.items():
                rate, wait = steady(job.out, sizes[what])
                rates.setdefault((what, "ray"), []).append(rate)
                waits[what].append(wait)
    finally:
        engine.close()
    return table(rates, waits, launches, ready)


def table(
    rates: dict[tuple[str, str], list[float]], waits: dict[str, list[float]], launches: list[dict[str, float]], ready: float
) -> list[Result]:
    found = []
    for what in waits:
        found += [Result(f"{what}, {how}", statistics.median(rates[what, how]), "images/s") for how in ("bare", "core", "ray")]
        for one, other, bar in (("ray", "bare", 0.9), ("ray", "core", None), ("core", "bare", None)):
            ratio = statistics.median(a / b for a, b in zip(rates[what, one], rates[what, other], strict=True))
            said, holds = (f"at least {bar}", ratio >= bar) if bar else ("", None)
            found.append(Result(f"{what}, {one} / {other}", ratio, "", said, holds))
        share = statistics.median(waits[what])
        found.append(Result(f"{what}, share of a step waiting for data", share, "", "under 0.05", share < 0.05))
    found.append(Result("Ray started", ready, "s"))
    for name in launches[0]:
        found.append(Result(f"first launch: {name}", launches[0][name], "s after the call"))
        if len(launches) > 1:
            later = statistics.median(x[name] for x in launches[1:])
            found.append(Result(f"later launches: {name}", later, "s after the call"))
    return found


if __name__ == "__main__":
    main()
