"""What planning, handing out, committing and judging cost as images become many: 458,920, on 1 to
64 simulated samplers.

    python benchmarks/scale.py            28,680 to 458,920 images, about ten minutes on a core
    python benchmarks/scale.py --quick    1,800 to 7,200

The run is real but for two things: nobody generates and nobody looks (simulated.py). The hard
cases, the plan, the task queue, the worker pool, the parts, the manifests, the verdicts and the mix
are made by adversa's own code; a sampler reads its part's requests, commits a real part at once,
with one small picture in all rows, and says that it took 20 ms an image. Its clock is simulated: a
call ends when it would, and the seconds that the coordinator itself takes pass on that clock too.
Every phase is a process of its own, as if the coordinator had just been started anew: its memory is
the largest resident set less what it began with (below 8 MiB: 8), its seconds are of CPU.

Exponents: the slope of log(quantity) over log(images), over sizes 16 times apart (on S3 4 times, to
a quarter of the images). The bar is 1.1: a sort (n log n) has 1.09 there, and a fifth more on one
end's seconds makes 0.07; n^1.25 does not pass. Fixed costs only make it smaller. With --quick
seconds have no bar. What is known to grow faster (docs/scale.md) comes last, without one.

S3 is moto's server behind a proxy that counts requests: its seconds say little of a real store. At
30 ms a request, tables.AT_ONCE at a time, the counts say how long that takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from common import Result, parser, publish
from simulated import ARMS, GENERATE, PER_CASE, SIDE, Simulated, judge, pair, prepare

from adversa import config as cfg
from adversa.pipeline import arms, curate, finalize, planning, train
from adversa.pipeline import generate as pipeline_generate
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import tables
from adversa.storage.path import rmtree, storage_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import s3

CASES = 11_473  # hard cases: 458,920 images
SAMPLERS, PACE = 64, 0.02
BAR, RTT = 1.1, 0.03
LARGEST = 10_000_000
LISTED = (1_000, 4_000, 16_000, 39_063)  # files of a folder; the last: 10 million images
Took = dict[str, float]


# ---- phases, each in a process of its own --------------------------------------------------------


def plan(run: RunDir, samplers: int) -> Took:
    planning.plan(
        run.round(1, "hard"),
        None,
        "scale",
        1,
        ARMS,
        GENERATE,
        run.round(1, "requests"),
        (run.arm(0, "real", 0) / "classifier", 0),
    )
    files = (
        [p.stat().st_size for p in tables.parts(run.round(1, "requests"))]
        if isinstance(run.root, Path)
        else []
    )
    return {"files": len(files), "bytes": sum(files)}


def generate(run: RunDir, samplers: int) -> Took:
    engine, began = Simulated(samplers, PACE), time.process_time()
    pipeline_generate.generate(
        engine,
        run.round(1, "requests"),
        run.data,
        run.denoiser,
        None,
        GENERATE,
        run.round(1, "synthetic"),
    )
    fleet = engine.fleet
    assert fleet is not None, "there was nothing to generate"
    return {
        "commit": fleet.working_cpu,
        "coordinating": time.process_time() - began - fleet.working_cpu,
        "pool": engine.pool_cpu,
        "idle": 1 - fleet.busy / (fleet.clock * samplers),
    }


def resume(run: RunDir, samplers: int) -> Took:
    """Killed between the last part and the manifest: the coordinator finds out that nothing is left
    to do.
    """
    folder = run.round(1, "synthetic")
    (folder / step_folder.MANIFEST).unlink()
    pipeline_generate.generate(
        Simulated(samplers, PACE),
        run.round(1, "requests"),
        run.data,
        run.denoiser,
        None,
        GENERATE,
        folder,
    )
    return {}


def listing(run: RunDir, samplers: int) -> Took:
    return {"files": len(tables.parts(run.root))}


def inspect(run: RunDir, samplers: int) -> Took:
    requests, synthetic, inspected = (
        run.round(1, x) for x in ("requests", "synthetic", "inspected")
    )
    engine = Simulated(samplers, PACE, {curate.make_inspected: judge})
    classifier = run.arm(0, "real", 0) / "classifier"
    curate.inspect(
        engine,
        requests,
        synthetic,
        run.data,
        run.features,
        run.limits,
        classifier,
        run.judge,
        cfg.Curate(),
        inspected,
    )
    return {}


def twins(run: RunDir, samplers: int) -> Took:
    """Handing out and committing; the search itself is `search`."""
    inspected = run.round(1, "inspected")
    engine = Simulated(samplers, PACE, {finalize.make_near_duplicates: pair(inspected)})
    finalize.near_duplicates(
        engine, run.round(1, "synthetic"), inspected, run.limits, run.round(1, "twins")
    )
    return {}


def gather(run: RunDir, samplers: int) -> Took:
    """What each worker of that search reads before it begins: one arm's pictures."""
    _, blocks = finalize.pictures_of(
        run.round(1, "synthetic"), finalize.waiting(run.round(1, "inspected"))["guided"]
    )
    return {"pictures": sum(map(len, blocks))}


def settle(run: RunDir, samplers: int) -> Took:
    finalize.finalize(
        run.round(1, "inspected"),
        run.round(1, "twins"),
        run.limits,
        cfg.Curate(),
        run.round(1, "verdicts"),
    )
    return {"kept": step_folder.manifest(run.round(1, "verdicts"))["kept"]}


def mix(run: RunDir, samplers: int) -> Took:
    section, added = cfg.Mix(synthetic_ratio=1e6), arms.Added(1e6)
    hard, verdicts = [run.round(1, "hard")], [run.round(1, "verdicts")]
    out = run.arm(1, "guided") / "mix"
    train.mix(run.data, hard, verdicts, "guided", section, PER_CASE, out, added)
    return {}


ROUND = (plan, generate, resume, inspect, twins, gather, settle, mix)
PHASES: dict[str, Callable[[RunDir, int], Took]] = {f.__name__: f for f in (*ROUND, listing)}


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) << 10


def child(name: str, root: str, samplers: int) -> None:
    """Do a phase and print what it took."""
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # so that what is loaded at a first use is not counted
        prepare(RunDir(Path(folder)), 20)
        plan(RunDir(Path(folder)), 1)
        if name in ("generate", "resume"):
            generate(RunDir(Path(folder)), 1)
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set is counted from here
    base, cpu, began = resident("VmRSS"), time.process_time(), time.perf_counter()
    extra = PHASES[name](RunDir(storage_path(root)), samplers)
    took = {
        "cpu": time.process_time() - cpu,
        "seconds": time.perf_counter() - began,
        "memory": resident("VmHWM") - base,
    }
    print(json.dumps(took | extra))


def phase(name: str, root: object, samplers: int = SAMPLERS) -> Took:
    command = [sys.executable, __file__, "--phase", name, str(root), "--samplers", str(samplers)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    took = json.loads(ended.stdout.splitlines()[-1])
    print(
        f"{name}, {samplers} samplers, {root}:",
        *(f"{k} {v:.4g}" for k, v in took.items()),
        file=sys.stderr,
        flush=True,
    )
    return took


# ---- what is measured ----------------------------------------------------------------------------


def exponent(sizes: list[float], values: list[float]) -> float:
    """The slope of the least squares line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def images_of(cases: int) -> int:
    return cases * PER_CASE * len(ARMS)


def local(sizes: list[int], base: Path) -> dict[str, list[float]]:
    """Quantity -> its value at each size; by 64 samplers."""
    found: dict[str, list[float]] = {}
    for cases in sizes:
        run = RunDir(base / f"run-{cases}")
        prepare(run, cases)
        took = {f.__name__: phase(f.__name__, run.root) for f in ROUND}
        parts = took["plan"]["files"]
        for name in ("plan", "resume", "inspect", "twins", "gather", "settle", "mix"):
            found.setdefault(f"{name}: seconds", []).append(took[name]["cpu"])
        found.setdefault("hand out: seconds", []).append(took["generate"]["pool"])
        found.setdefault("commits: seconds", []).append(took["generate"]["commit"])
        for name in ("plan", "generate", "resume", "inspect", "twins", "gather", "settle", "mix"):
            found.setdefault(f"{name}: memory", []).append(
                max(took[name]["memory"], 8 << 20) / 2**20
            )
        found.setdefault("request files", []).append(parts)
        found.setdefault("request bytes", []).append(took["plan"]["bytes"])
        found.setdefault("files of the round", []).append(
            sum(1 for p in run.round(1).rglob("*") if p.is_file())
        )
        began = time.process_time()
        listed = [tables.parts(run.round(1, "synthetic")) for _ in range(20)]
        assert len(listed[0]) == parts
        found.setdefault("listing: seconds", []).append((time.process_time() - began) / 20)
    return found


def samplers(cases: int, counts: list[int], base: Path) -> list[Result]:
    """The hand-out with fewer samplers than 64, of the largest size."""
    run, found = RunDir(base / f"run-{cases}"), []
    for count in counts:
        rmtree(run.round(1, "synthetic"))
        took = phase("generate", run.root, count)
        found.append(
            Result(f"handed out, {count} samplers", images_of(cases) / took["pool"], "requests/s")
        )
        found.append(Result(f"idle, {count} samplers", 100 * took["idle"], "%"))
    return found


def on_s3(sizes: list[int]) -> dict[str, list[float]]:
    """Requests to the store of the plan, of generation with 64 samplers, and of a resume with
    nothing left to do.
    """
    found: dict[str, list[float]] = {}
    with store() as (proxy, address):
        for cases in sizes:
            run = RunDir(storage_path(address(f"run-{cases}")))
            prepare(run, cases)
            for name in ("plan", "generate", "resume"):
                proxy.seen.clear()
                phase(name, run.root)
                found.setdefault(f"S3 requests: {name}", []).append(len(proxy.seen))
    return found


@contextlib.contextmanager
def store() -> Iterator[tuple[s3.Proxy, Callable[[str], str]]]:
    """A server, a proxy before it, and the address of a folder there."""
    os.environ.update(s3.ENVIRONMENT)
    with s3.server() as upstream, contextlib.closing(s3.Proxy(upstream)) as proxy:
        yield (
            proxy,
            lambda name: f"s3://{s3.BUCKET}/{name}?endpoint_override={proxy.at}&scheme=http",
        )


def listed(counts: tuple[int, ...]) -> tuple[list[Result], float]:
    """Listing folders of so many parts on S3, empty ones: what they hold makes no difference."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    found, requests = [], []
    with store() as (proxy, address):
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        for count in counts:
            bucket = f"listed-{count}"  # the server looks through all of a bucket
            backend.create_bucket(bucket, "us-east-1")
            for i in range(count):
                backend.put_object(bucket, f"run/{tables.part_name(i)}", b"")
            proxy.seen.clear()
            took = phase("listing", address("run").replace(s3.BUCKET, bucket))
            assert took["files"] == count
            requests.append(len(proxy.seen))
            found.append(
                Result(
                    f"S3 listing, {count} files", took["seconds"], f"s ({requests[-1]} requests)"
                )
            )
    return found, exponent(list(map(float, counts)), requests)


def search(counts: tuple[int, ...], queries: int) -> list[Result]:
    """Seconds a picture of the search for near-duplicates, by one thread, as an arm becomes larger;
    the pictures are noise, smoothed.
    """
    from threadpoolctl import threadpool_limits

    from adversa.curate.near_copy import NearCopy

    threadpool_limits(1)
    rng, found, each, memory = np.random.default_rng(0), [], [], []
    for count in counts:
        images = (
            rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
            .repeat(SIDE // 8, 1)
            .repeat(SIDE // 8, 2)
        )
        base, began = resident("VmRSS"), time.process_time()
        index = NearCopy([f"{i:08d}" for i in range(count)], images)
        built, began = time.process_time() - began, time.process_time()
        index.pairs(0.9, slice(0, queries))
        each.append((time.process_time() - began) / queries)
        memory.append(resident("VmRSS") - base)
        found.append(
            Result(
                f"twin search, {count} in the arm",
                1e3 * each[-1],
                f"ms a picture (index {built:.1f} s)",
            )
        )
        del index
    slope, fixed = np.polyfit(counts, each, 1)
    found.append(Result("twin search: fixed", 1e3 * fixed, "ms a picture"))
    found.append(
        Result("twin search: grows by", 1e6 * slope, "us a picture and picture of the arm")
    )
    found.append(Result("twin index", memory[-1] / counts[-1] / 1e3, "kB a picture"))
    for images in (images_of(CASES), LARGEST):
        arm = images / len(ARMS)
        found.append(
            Result(
                f"twin search of {images} images",
                images * (fixed + slope * arm) / 3600,
                "core-hours",
            )
        )
    return found


def mining(budgets: tuple[int, ...]) -> list[Result]:
    """Farthest-first among four times a class's places, 512 features."""
    from adversa.mine.hard import farthest_first

    rng, took = np.random.default_rng(0), []
    for budget in budgets:
        points, began = rng.normal(size=(4 * budget, 512)), time.process_time()
        farthest_first(points, budget)
        took.append(time.process_time() - began)
    slope, last = exponent(list(budgets), took), took[-1] / budgets[-1] ** 2
    ends = [
        Result(f"mining {n} hard cases", 7 * last * (n / 7) ** 2 / 3600, "core-hours (7 classes)")
        for n in (CASES, 250_000)
    ]
    return [Result("mining: exponent in the budget", slope, ""), *ends]


# ---- the table -----------------------------------------------------------------------------------


def rows(sizes: list[float], found: dict[str, list[float]], quick: bool) -> list[Result]:
    """Of each quantity the value at the largest size, and the exponent with its bar."""
    out = []
    for name, values in found.items():
        unit = "s" if name.endswith("seconds") else "MiB" if name.endswith("memory") else ""
        out.append(Result(name, values[-1], unit))
        slope, timed = exponent(sizes, values), name.endswith("seconds")
        bar = "" if timed and quick else f"at most {BAR:g}"
        out.append(Result("  its exponent", slope, "", bar, slope <= BAR if bar else None))
    return out


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--phase", nargs=2, metavar=("NAME", "RUN"), help=argparse.SUPPRESS)
    arguments.add_argument("--samplers", type=int, default=SAMPLERS, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.phase:
        return child(*args.phase, args.samplers)
    sizes = (
        [45, 90, 180] if args.quick else [CASES // 16, CASES // 8, CASES // 4, CASES // 2, CASES]
    )
    images = [float(images_of(n)) for n in sizes]
    with tempfile.TemporaryDirectory() as base:
        here = local(sizes, Path(base))
        fewer = samplers(sizes[-1], [16, 4, 1], Path(base))
    stored = sizes if args.quick else sizes[:3]
    there = on_s3(stored)
    pages, growth = listed(LISTED[:2] if args.quick else LISTED)
    found = [
        Result("images", images[-1], ""),
        *rows(images, here, args.quick),
        *rows(images[: len(stored)], there, args.quick),
    ]
    found.append(Result("planned", images[-1] / here["plan: seconds"][-1], "requests/s"))
    found.append(
        Result(
            f"handed out, {SAMPLERS} samplers",
            images[-1] / here["hand out: seconds"][-1],
            "requests/s",
        )
    )
    found += [
        *fewer,
        Result("a commit", 1e3 * here["commits: seconds"][-1] / here["request files"][-1], "ms"),
        *pages,
    ]
    found.append(
        Result("S3 listing's requests: exponent", growth, "", f"at most {BAR:g}", growth <= BAR)
    )
    resumed = there["S3 requests: resume"][-1] / images[len(stored) - 1]
    for n in (images_of(CASES), LARGEST):
        found.append(
            Result(
                f"resume on S3, {n} images",
                resumed * n * RTT / 60 / tables.AT_ONCE,
                f"min at {1e3 * RTT:g} ms a request",
            )
        )
    found += search((500, 1000), 64) if args.quick else search((500, 2000, 8000), 256)
    publish(found + mining((100, 200) if args.quick else (200, 400, 800)), args.json)


if __name__ == "__main__":
    main()
