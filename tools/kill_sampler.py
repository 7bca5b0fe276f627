"""Kill samplers with -9 while they generate, or the driver; all images must arrive, once each, the
same as undisturbed.

    python tools/kill_sampler.py                    every 5 seconds a random sampler actor dies
    python tools/kill_sampler.py --driver --runs 3  the driver dies at a random moment, and the
                                                    same is started again

Generates with the shipped phantom denoiser, from noise, on an embedded Ray. With --driver the
second start must leave the parts alone that were complete when the first was killed: it starts at
once, while actors of the dead driver may still be about. Exit code 1 where an image is missing,
there twice, or differs; where a complete part was generated again; or a process outlives its
driver.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from adversa import config as cfg
from adversa.diffuse.edm import SHIPPED
from adversa.engine.tasks import Make, Name, Part, Report, Share, Work
from adversa.generation import job
from adversa.pipeline import generate
from adversa.run.control import NULL_HANDLE
from adversa.run.step_folder import RECIPE
from adversa.storage import tables

# Ray names an actor's process by its class, and by the method it is in: ray::Actor.do
ACTOR = "ray::Actor"
OUTLIVE = 30.0  # seconds that the processes of a dead driver have to end


def noting(make: Make, log: Path, out: Path) -> Work:
    """The work of `make`, with a line in `log` for each part it begins; a file named by its process
    says that it is ready.
    """
    work = make()
    log.with_suffix(".ready").mkdir(exist_ok=True)
    (log.with_suffix(".ready") / str(os.getpid())).touch()

    def noted(part: Part, path: Path) -> Any:
        kind = "trial" if path.parent != out else "complete" if path.exists() else "missing"
        with open(log, "a") as f:
            f.write(f"{part.index} {kind}\n")
        return work(part, path)

    return noted


@dataclass(frozen=True)
class Noting:
    """An engine that notes which parts are begun."""

    engine: Any
    log: Path

    def samplers(self) -> int:
        return self.engine.samplers()

    def map_parts(
        self, make: Make, parts: Sequence[Part], out: Path, report: Report, name: Name
    ) -> list[Share]:
        return self.engine.map_parts(partial(noting, make, self.log, out), parts, out, report, name)

    def ready(self) -> set[int]:
        """Samplers that have loaded their models."""
        folder = self.log.with_suffix(".ready")
        return {int(name) for name in os.listdir(folder)} if folder.exists() else set()

    def begun(self) -> Counter[tuple[int, str]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return Counter((int(index), kind) for index, kind in map(str.split, lines))


def settings(args: argparse.Namespace) -> cfg.Generate:
    return cfg.Generate(steps=args.steps, part_size=args.part_size)


def plan(args: argparse.Namespace, base: Path) -> None:
    """The requests, classes in equal shares; the folder `requests`."""
    classes = len(job.classes_of(SHIPPED))
    labels = {k: len(range(k, args.images, classes)) for k in range(classes)}
    job.plan(
        job.GenerationJob(SHIPPED, labels, "sample", args.seed, settings(args), base, "folder"),
        base / "requests",
        NULL_HANDLE,
    )


def generate_all(args: argparse.Namespace, engine: Any, base: Path, out: str) -> float:
    """Into base/out; seconds it took."""
    started = time.monotonic()
    generate.generate(engine, base / "requests", None, SHIPPED, None, settings(args), base / out)
    return time.monotonic() - started


@contextlib.contextmanager
def ray_engine(args: argparse.Namespace, base: Path) -> Any:
    from adversa.distributed.engine import RayEngine

    engine = RayEngine(
        cfg.Cluster(cpus=args.actors, samplers=args.actors, object_store_mb=100), base, 32 * 32 * 3
    )
    try:
        yield engine
    finally:
        engine.close()


def compared(base: Path, out: str) -> tuple[str, list[str]]:
    """What is to be said of a folder of images, and what is wrong with it, beside the undisturbed
    one and the requests.
    """
    ours, theirs = (
        tables.read(base / out, schema=tables.SYNTHETIC),
        tables.read(base / "undisturbed", schema=tables.SYNTHETIC),
    )
    asked = tables.read(base / "requests", ["request_id"])["request_id"].to_pylist()
    there = Counter(ours["request_id"].to_pylist())
    once = sum(there[i] == 1 for i in asked)
    mine, images = (
        dict(zip(t["request_id"].to_pylist(), t["image"].to_pylist(), strict=True))
        for t in (ours, theirs)
    )
    same = sum(i in mine and mine[i] == images.get(i) for i in asked)
    wrong = (
        [f"{len(asked) - once} images missing or there twice"]
        if once < len(asked) or len(ours) != len(asked)
        else []
    )
    wrong += [f"{len(asked) - same} images differ"] if same < len(asked) else []
    wrong += ["the tables differ"] if not wrong and not ours.equals(theirs) else []
    return (
        f"{len(asked)} images asked for, {once} there once each, {same} identical to undisturbed",
        wrong,
    )


# ---- actors --------------------------------------------------------------------------------------


def kill_often(
    every: float,
    anyone: bool,
    draw: random.Random,
    noted: Noting,
    stop: threading.Event,
    killed: list[str],
) -> None:
    """A random sampler each `every` s, or as soon after as one is there; notes what it was at.
    anyone: also who is not ready.
    """
    from adversa.distributed.engine import ray_processes

    while not stop.wait(every):
        while not stop.is_set():
            with contextlib.suppress(
                psutil.NoSuchProcess
            ):  # it ended as we looked: another is taken
                names = {p: "".join(p.cmdline()[:1]) for p in ray_processes()}
                actors = {
                    p: name
                    for p, name in names.items()
                    if name.startswith(ACTOR) and (anyone or p.pid in noted.ready())
                }
                if actors:
                    victim = draw.choice(sorted(actors, key=lambda p: p.pid))
                    victim.send_signal(signal.SIGKILL)
                    killed.append(
                        "generation"
                        if actors[victim].startswith(f"{ACTOR}.do")
                        else "starting or waiting"
                    )
                    break
            stop.wait(0.05)


def actors_die(args: argparse.Namespace, base: Path) -> list[str]:
    plan(args, base)
    draw, stop, killed = random.Random(args.seed), threading.Event(), []
    with ray_engine(args, base) as engine:
        noted = Noting(engine, base / "killed.log")
        killer = threading.Thread(
            target=kill_often,
            args=(args.every, not args.ready, draw, noted, stop, killed),
            daemon=True,
        )
        killer.start()
        try:
            seconds = generate_all(args, noted, base, "killed")
        finally:
            stop.set()
            killer.join()
        undisturbed = generate_all(args, engine, base, "undisturbed")
    said, wrong = compared(base, "killed")
    begun = noted.begun()
    parts, again = (
        len(tables.parts(base / "killed")),
        sum(n - 1 for (_, kind), n in begun.items() if kind == "missing"),
    )
    late, trials = (
        sum(n for (_, kind), n in begun.items() if kind == what) for what in ("complete", "trial")
    )
    victims = ", ".join(f"{n} {what}" for what, n in Counter(killed).items())
    print(f"{len(killed)} kills of {args.actors} actors ({victims}): {said}")
    print(
        f"{seconds:.1f} s with kills, {undisturbed:.1f} s without; {parts} parts, {again} "
        f"begun again, {trials} trials of rows"
    )
    wrong += [f"{late} complete parts were generated again"] if late else []
    return wrong + (
        [] if killed else ["nothing was killed: ask for more images, or kill more often"]
    )


# ---- the driver ----------------------------------------------------------------------------------


def start(args: argparse.Namespace, base: Path, out: str, log: str) -> subprocess.Popen[bytes]:
    """A driver of its own process, which generates the planned requests."""
    same = [
        f"--{key}={getattr(args, key.replace('-', '_'))}"
        for key in ("images", "steps", "part-size", "actors", "seed")
    ]
    return subprocess.Popen([sys.executable, __file__, *same, "--child", str(base), out, log])


def finished(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        sys.exit(f"a driver that nobody killed ended with {process.returncode}")


def kill_at(
    process: subprocess.Popen[bytes], out: Path, parts: int, delay: float
) -> list[psutil.Process] | None:
    """-9 to a driver `delay` s after so many parts are complete, and to it alone; what it had
    started. None: it had ended.
    """
    while process.poll() is None and not (
        (out / RECIPE).exists() and len(tables.parts(out)) >= parts
    ):
        time.sleep(0.01)
    time.sleep(delay)
    if process.poll() is not None:
        finished(process)
        return None
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    return below


def drivers_die(args: argparse.Namespace, base: Path) -> list[str]:
    plan(args, base)
    parts, draw, wrong = len(tables.parts(base / "requests")), random.Random(args.seed), []
    started = time.monotonic()
    finished(start(args, base, "undisturbed", "undisturbed.log"))
    seconds = time.monotonic() - started
    print(
        f"undisturbed: {parts} parts in {seconds:.1f} s, start-up of the driver and Ray included",
        flush=True,
    )
    kills = i = 0
    while (
        kills < args.runs and (i := i + 1) <= 2 * args.runs
    ):  # some moments come after a driver's end
        out, at, delay = f"killed-{i}", draw.randrange(parts), draw.random() * seconds / parts
        below = kill_at(start(args, base, out, f"first-{i}.log"), base / out, at, delay)
        if below is not None:
            kills += 1
            wrong += [f"run {i}: {fault}" for fault in again(args, base, out, parts, below)]
    return wrong + ([] if kills == args.runs else [f"only {kills} were killed"])


def again(
    args: argparse.Namespace, base: Path, out: str, parts: int, below: Sequence[psutil.Process]
) -> list[str]:
    """Start a killed driver again; what is wrong then. below: what the killed one had started."""
    complete = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in tables.parts(base / out)}
    log, started = Noting(None, base / f"{out}-again.log"), time.monotonic()
    finished(start(args, base, out, log.log.name))
    seconds = time.monotonic() - started
    said, wrong = compared(base, out)
    touched = [
        p.name for p, was in complete.items() if (p.stat().st_ino, p.stat().st_mtime_ns) != was
    ]
    begun = {tables.part_name(index) for index, _ in log.begun()}
    regenerated = sorted(begun & {p.name for p in complete})
    wrong += [f"complete parts were touched: {', '.join(touched)}"] if touched else []
    wrong += (
        [f"complete parts were generated again: {', '.join(regenerated)}"] if regenerated else []
    )
    _, alive = psutil.wait_procs(below, timeout=max(0.0, OUTLIVE - seconds))
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
            wrong.append(
                f"the killed driver's process {process.pid} lives on "
                f"({' '.join(process.cmdline()[:3])}, {process.status()})"
            )
            process.kill()
    there = f"driver killed with {len(complete)} of {parts} parts complete"
    print(f"{there}; again in {seconds:.1f} s, {len(begun)} parts begun: {said}", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--driver", action="store_true", help="kill the driver, not the actors")
    parser.add_argument("--runs", type=int, default=3, help="drivers killed")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument(
        "--every", type=float, default=5.0, help="seconds between two kills of an actor"
    )
    parser.add_argument(
        "--ready",
        action="store_true",
        help="kill none that still loads: where that takes longer than --every",
    )
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--part-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="of the solver")
    parser.add_argument("--seed", type=int, default=0, help="of the images, and of what dies when")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        base, out, log = args.child
        with ray_engine(args, Path(base)) as engine:
            generate_all(args, Noting(engine, Path(base) / log), Path(base), out)
        return
    with tempfile.TemporaryDirectory() as temporary:
        wrong = (drivers_die if args.driver else actors_die)(args, Path(temporary))
    print("; ".join(wrong) or "nothing was lost, and nothing differs")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
