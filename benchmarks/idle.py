"""Idle samplers in a generation on three nodes, and how soon a node that joins takes work.

    python benchmarks/idle.py             three nodes of one sampler, 600 parts of half a second
    python benchmarks/idle.py --quick     60 parts

A part sleeps for its time in place of generating (log-normal, sigma 0.5, around --seconds), so that
three nodes on one machine do not fight for its cores; everything else is as in a run: actors,
leases, commits and progress, on a Ray of three raylets.

idle: 1 - the time in parts / the time from when each sampler was ready to when the last part was
committed. joins: with half of the parts done a fourth node comes; seconds from when Ray lists it to
the start of its first part.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Result, parser, publish

from adversa.engine.tasks import Part, TaskStats

NODES = 3
SMALL = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}


@dataclass(frozen=True)
class Times:
    """Of a sampler: when it was ready, and its parts' starts and ends, in Unix seconds."""

    ready: float
    parts: list[tuple[float, float]]

    @property
    def busy(self) -> float:
        return sum(b - a for a, b in self.parts)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--parts", type=int, help="default: 600; 60 with --quick")
    arguments.add_argument("--seconds", type=float, default=0.5, help="the median of a part's time")
    args = arguments.parse_args()
    number, full = args.parts or (60 if args.quick else 600), not args.quick
    lengths = np.random.default_rng(0).lognormal(np.log(args.seconds), 0.5, number)
    parts = [Part(i, 16, {"seconds": float(s)}) for i, s in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        found, joined = measure(parts, Path(folder))
    end = max(b for t in found for _, b in t.parts)
    idle = 1 - sum(t.busy for t in found) / sum(end - t.ready for t in found)
    publish(
        [
            Result("samplers at the start", NODES, ""),
            Result("parts", number, ""),
            Result("ready to the end", end - min(t.ready for t in found), "s"),
            Result("idle", idle, "", "at most 0.1" if full else "", idle <= 0.1 if full else None),
            Result("a node that joins has work after", joined, "s", "at most 15", joined <= 15),
        ],
        args.json,
    )


def make_sleeper(log: Path) -> Callable[[Part, Path], TaskStats]:
    path = log / f"{os.getpid()}.jsonl"
    path.write_text(json.dumps(time.time()) + "\n")

    def work(part: Part, out: Path) -> TaskStats:
        started = time.time()
        time.sleep(part.payload["seconds"])
        out.touch()
        with open(path, "a") as f:
            f.write(json.dumps([started, time.time()]) + "\n")
        return TaskStats(part.rows)

    return work


def measure(parts: list[Part], folder: Path) -> tuple[list[Times], float]:
    """(times of each sampler, the one of the node that joined last; seconds from its joining to its
    first part)
    """
    from ray.cluster_utils import Cluster as Nodes

    from adversa.config import Cluster
    from adversa.distributed.engine import RayEngine

    nodes = Nodes(initialize_head=True, head_node_args=SMALL)
    for _ in range(NODES - 1):
        nodes.add_node(**SMALL)
    os.environ["RAY_ADDRESS"] = nodes.address
    engine = RayEngine(Cluster(), folder, 12)
    out, log = folder / "out", folder / "log"
    out.mkdir()
    log.mkdir()
    half, failure = threading.Event(), []

    def tell(state: dict[str, Any]) -> None:
        if state["done"] >= sum(p.rows for p in parts) / 2:
            half.set()

    def work() -> None:  # nodes can be added from the main thread only
        try:
            engine.map_parts(partial(make_sleeper, log), parts, out, tell)
        except BaseException as e:  # raised below, whatever it is
            failure.append(e)
        half.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        half.wait()
        nodes.add_node(**SMALL)
        came = time.time()
        thread.join()
    finally:
        engine.close()
        nodes.shutdown()
    if failure:
        raise failure[0]
    every = [read(p) for p in log.iterdir()]
    newest = max(every, key=lambda t: t.ready)
    assert len(every) == NODES + 1 and newest.parts, (
        "the node that joined got no work: take more parts"
    )
    return every, newest.parts[0][0] - came


def read(path: Path) -> Times:
    ready, *parts = [json.loads(line) for line in path.read_text().splitlines()]
    return Times(ready, [(a, b) for a, b in parts])


if __name__ == "__main__":
    main()
