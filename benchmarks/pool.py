"""What the pool itself costs: actors that sleep for 10 ms in place of generating.

    python benchmarks/pool.py             64 actors, 100,000 requests, one a part
    python benchmarks/pool.py --rows 16   the same requests in parts of 16: 6,250 parts, over in
                                          about a second
    python benchmarks/pool.py --quick     8 actors, 4,000 requests

A part sleeps for 10 ms, whatever its number of requests, and commits an empty file: what Parquet
costs is the sampler's, not the pool's. Everything else is as in a run: the same actors, leases,
commits and progress.

share of ideal: ideal is parts x 10 ms / actors; it is divided by the time from when the actors were
up (they wait for each other; how long that took is told apart) until the call came back. Beside it
the same share for as many processes that sleep and write the same files in a plain loop, without a
pool: what the machine itself leaves of the ideal. driver memory: by how much the driver's own
memory (anonymous pages) grew at most after a tenth of the parts were done.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from common import Result, parser, publish

from adversa.engine.tasks import Part, TaskStats
from adversa.storage.tables import part_name

SLEEP = 0.01  # seconds a part
FLAT = 16 << 20  # bytes the driver may grow by


@dataclass(frozen=True)
class Measured:
    up: float  # seconds until every actor was
    seconds: float  # from then to the end
    cpu: float  # seconds of the driver in them
    grown: int  # bytes


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--actors", type=int, help="default: 64; 8 with --quick")
    arguments.add_argument("--requests", type=int, help="default: 100,000; 4,000 with --quick")
    arguments.add_argument("--rows", type=int, default=1, help="requests a part")
    args = arguments.parse_args()
    actors = args.actors or (8 if args.quick else 64)
    requests = args.requests or (4_000 if args.quick else 100_000)
    parts = [
        Part(i, min(args.rows, requests - i * args.rows)) for i in range(-(-requests // args.rows))
    ]
    ideal = len(parts) * SLEEP / actors
    with tempfile.TemporaryDirectory() as folder:
        plain = without_pool(actors, len(parts), Path(folder) / "plain")
        found = with_pool(actors, parts, Path(folder))
    share, full = ideal / found.seconds, not args.quick
    publish(
        [
            Result("actors", actors, ""),
            Result("parts", len(parts), f"of {args.rows}"),
            Result("actors up after", found.up, "s"),
            Result("ideal", ideal, "s"),
            Result("hand out to the end", found.seconds, "s"),
            Result(
                "share of ideal",
                share,
                "",
                "at least 0.9" if full else "",
                share >= 0.9 if full else None,
            ),
            Result("share of ideal, no pool", ideal / plain, ""),
            Result("driver's CPU", 1e3 * found.cpu / len(parts), "ms a part"),
            Result(
                "driver memory grows by",
                found.grown / 2**20,
                "MiB",
                "at most 16",
                found.grown <= FLAT,
            ),
        ],
        args.json,
    )


def make_sleeper(meeting: Path, actors: int) -> Any:
    """Ready at the same moment in every actor: a second after the last has come."""
    (meeting / str(os.getpid())).touch()
    while (
        len(os.listdir(meeting)) < actors
    ):  # not often: it keeps those from starting that are still to come
        time.sleep(0.5)
    time.sleep(max(0.0, begin(meeting) - time.time()))

    def work(part: Part, path: Path) -> TaskStats:
        time.sleep(SLEEP)
        path.touch()
        return TaskStats(part.rows)

    return work


def begin(meeting: Path) -> float:
    return max(p.stat().st_mtime for p in meeting.iterdir()) + 1.0


def with_pool(actors: int, parts: list[Part], folder: Path) -> Measured:
    from adversa.config import Cluster
    from adversa.distributed.engine import RayEngine
    from adversa.distributed.pool import Actors
    from adversa.engine.worker_pool import work_off

    meeting, out = folder / "meeting", folder / "out"
    meeting.mkdir()
    out.mkdir()
    os.environ.setdefault(
        "RAY_worker_register_timeout_seconds", "600"
    )  # so many processes start slowly on a few cores
    engine = RayEngine(Cluster(cpus=actors, object_store_mb=100), folder, 1)
    watch, started = Watch(sum(p.rows for p in parts)), time.time()
    try:
        made = Actors(partial(make_sleeper, meeting, actors), out, {"num_cpus": 1}, None)
        work_off(made, parts, out, watch, lambda: actors, 3)
        ended, cpu = time.time(), time.process_time()
    finally:
        watch.stop()
        engine.close()
    assert len(os.listdir(out)) == len(parts), "parts are missing"
    up = begin(meeting)
    return Measured(up - started, ended - up, cpu - watch.cpu_at_start, watch.grown)


class Watch:
    """Takes the pool's progress; looks at this process's memory four times a second."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.cpu_at_start = total, 0, time.process_time()
        self.base = self.peak = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def __call__(self, state: dict[str, Any]) -> None:
        if self.done == 0:
            self.cpu_at_start = time.process_time()
        self.done = state["done"]

    def _watch(self) -> None:
        process = psutil.Process()
        while not self.stopped.wait(0.25):
            if self.done >= self.total / 10:
                info = process.memory_info()
                used = info.rss - getattr(
                    info, "shared", 0
                )  # libraries count as shared or not as other processes come and go
                self.base, self.peak = self.base or used, max(self.peak, used)

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()

    @property
    def grown(self) -> int:
        return self.peak - self.base


def without_pool(processes: int, parts: int, out: Path) -> float:
    """Seconds that so many processes take for the same sleeps and files, each its part of them in a
    loop.
    """
    out.mkdir()
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(processes + 1)
    workers = [
        context.Process(target=loop, args=(ready, range(i, parts, processes), out))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    ready.wait()
    started = time.monotonic()
    for worker in workers:
        worker.join()
    return time.monotonic() - started


def loop(ready: Any, mine: range, out: Path) -> None:
    ready.wait()
    for i in mine:
        time.sleep(SLEEP)
        (out / part_name(i)).touch()


if __name__ == "__main__":
    main()
