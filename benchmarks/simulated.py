"""A run in which nobody generates and nobody looks, and all else is adversa's own: for scale.py."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from adversa import config as cfg
from adversa.curate.filter import Verdict
from adversa.engine.task_queue import Task
from adversa.engine.tasks import (
    Done,
    Make,
    Name,
    Part,
    Report,
    Share,
    TaskStats,
    do_part,
    missing,
    row_name,
)
from adversa.engine.worker import Returned, Sampler
from adversa.engine.worker_pool import work_off
from adversa.pipeline import curate, finalize, generate
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.run.step_folder import Recipe
from adversa.storage import files, tables
from adversa.storage.path import StoragePath, storage_path
from adversa.types import ROLES, HardCase, digest

CLASSES, SIDE = 7, 32
PER_CASE, ARMS = (
    20,
    ("unguided", "guided"),
)  # each hard case is varied so often, and as many images of its class are sampled
GENERATE = cfg.Generate(per_case=PER_CASE)
PICTURE = tables.encode_png(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8))
FACTS = {"seconds": 0.0, "compute_seconds": 0.0, "device_seconds": 0.0, "rows": 0}


# ---- a run without models ------------------------------------------------------------------------


def finished(folder: StoragePath) -> None:
    """Mark a folder as a finished step: what reads it asks for no more."""
    recipe = Recipe("given", 1, {}, {})
    step_folder.begin(folder, recipe)
    step_folder.finish(folder, recipe, **FACTS)


def prepare(run: RunDir, cases: int) -> None:
    """Hard cases, and everything that a round reads beside them, as small as it may be."""
    rows = [
        HardCase(digest("case", i), i % CLASSES, (i + 1) % CLASSES, 1.0, -0.5, "misclassified", i)
        for i in range(cases)
    ]
    tables.write_part(
        run.round(1, "hard") / tables.part_name(0), tables.to_table(rows, tables.HARD_CASES)
    )
    names = [f"class {c}" for c in range(CLASSES)]
    files.write_json(run.data / "classes.json", {"classes": names})
    for role in ("mine", "train"):
        own = [{"id": digest(role, i), "label": i % CLASSES, "image": PICTURE} for i in range(100)]
        tables.write_part(
            run.data / role / tables.part_name(0), pa.Table.from_pylist(own, schema=tables.EXAMPLES)
        )
    files.write_json(run.denoiser / generate.CONFIG, {"classes": names, "resolution": SIDE})
    limits = {
        "near_copy": 0.9,
        "near_copy_features": 0.9,
        "most_agreement": 1.0,
        "held_out": [0.1] * 1000,
    }
    files.write_json(
        run.limits / curate.THRESHOLDS,
        limits | {"realism": [1.0] * CLASSES, "realism_2": [1.0] * CLASSES},
    )
    verifiers = curate.folders(run.judge, cfg.Curate().folds)
    features = [run.features / role for role in ROLES]
    for folder in (
        run.round(1, "hard"),
        run.data,
        run.denoiser,
        run.limits,
        run.arm(0, "real", 0) / "classifier",
    ):
        finished(folder)
    for folder in (*verifiers, *features):
        finished(folder)


def commit(part: Part, path: StoragePath) -> TaskStats:
    """A sampler's part: its requests read, a row for each committed."""
    requests = generate.read_requests(storage_path(part.payload["path"]))
    rows = [
        {
            "request_id": r.request_id,
            "arm": r.arm,
            "label": r.label,
            "image": PICTURE,
            "finite": True,
            "denoiser": "simulated",
            "evaluations": GENERATE.steps,
            "skipped": 0,
        }
        for r in requests
    ]
    tables.write_part(path, pa.Table.from_pylist(rows, schema=tables.SYNTHETIC))
    return TaskStats(len(rows), len(rows) * GENERATE.steps)


def judge(part: Part, path: StoragePath) -> int:
    """A verdict for each image: every tenth is not let through."""
    rows = tables.read_part(
        storage_path(part.payload["path"]), ["request_id", "arm", "label"]
    ).to_pylist()
    asked = tables.read_part(
        storage_path(part.payload["requests"]), ["strategy", "example"]
    ).to_pylist()
    told = [
        Verdict(
            r["request_id"],
            r["arm"],
            r["label"],
            q["strategy"],
            q["example"],
            False,
            "judge disagrees" if int(r["request_id"][:4], 16) % 10 == 0 else "not settled",
            **dict.fromkeys(
                [
                    "contrast",
                    "clipped",
                    "agreement",
                    "realism",
                    "realism_2",
                    "similarity",
                    "similarity_2",
                ],
                0.5,
            ),
            nearest=r["request_id"],
            nearest_2=r["request_id"],
        )
        for r, q in zip(rows, asked, strict=True)
    ]
    tables.write_part(path, tables.to_table(told, tables.VERDICTS))
    return len(rows)


def pair(inspected: StoragePath) -> Callable[[Part, StoragePath], int]:
    """Every tenth image has a near-duplicate: the one before it."""
    waiting = finalize.waiting(inspected)

    def work(part: Part, path: StoragePath) -> int:
        ids = waiting[part.payload["arm"]][part.payload["start"] : part.payload["stop"]]
        rows = [{"a": i} for i in ids] + [
            {"a": a, "b": b, "similarity": 0.95}
            for a, b in zip(ids[::10], ids[1::10], strict=False)
        ]
        tables.write_part(path, pa.Table.from_pylist(rows, schema=tables.TWINS))
        return part.rows

    return work


# ---- simulated samplers --------------------------------------------------------------------------


@dataclass
class Fleet:
    """The Backend (engine/worker_pool.py) of samplers that commit at once and are done when they
    would be; one process, one thread.

    clock: simulated seconds; working: real seconds of the samplers' own work, of which CPU is
    `working_cpu`.
    """

    out: StoragePath
    pace: float
    clock: float = 0.0
    working: float = 0.0
    working_cpu: float = 0.0
    busy: float = 0.0
    calls: int = 0
    started: float = field(default_factory=time.perf_counter)
    ends: list[tuple[float, int]] = field(default_factory=list)
    answers: dict[int, Any] = field(default_factory=dict)
    free: dict[int, float] = field(default_factory=dict)

    def start(self) -> Sampler:
        sampler = Sampler()
        sampler.out, sampler.work = self.out, commit
        return sampler

    def _call(self, answer: Any, end: float) -> int:
        self.calls += 1
        self.answers[self.calls] = answer
        heapq.heappush(self.ends, (end, self.calls))
        return self.calls

    def place(self, worker: Sampler) -> int:
        return self._call(worker.place(), self.clock)

    def load(self, worker: Sampler, place: int) -> int:
        return self._call(None, self.clock)

    def do(self, worker: Sampler, orders: Sequence[Task]) -> int:
        began, cpu = time.perf_counter(), time.process_time()
        done = worker.do(orders)
        real = time.perf_counter() - began
        self.working, self.working_cpu, self.started = (
            self.working + real,
            self.working_cpu + time.process_time() - cpu,
            self.started + real,
        )
        seconds = real + self.pace * sum(o.part.rows for o in orders)
        end = self.free[id(worker)] = max(self.clock, self.free.get(id(worker), 0.0)) + seconds
        self.busy += seconds
        return self._call(replace(done, seconds=seconds), end)

    def wait(self, calls: Sequence[int], seconds: float) -> Sequence[int]:
        """The next call to end, and all that ended while the coordinator was at work."""
        self.clock += time.perf_counter() - self.started
        self.clock, ready = max(self.clock, self.ends[0][0]), []
        while self.ends and self.ends[0][0] <= self.clock:
            ready.append(heapq.heappop(self.ends)[1])
        self.started = time.perf_counter()
        return ready

    def answer(self, call: int) -> Returned | None:
        return self.answers.pop(call)

    def stop(self, worker: Sampler) -> None:
        """It does nothing between calls."""


class Simulated:
    """The Engine of the simulation: its `map_parts` is the worker pool with a Fleet, its
    `map_batches` the local one.
    """

    name = "simulated"

    def __init__(
        self, samplers: int, pace: float, works: dict[Any, Callable[[Part, Any], int]] | None = None
    ) -> None:
        """works: in place of what these functions make."""
        self.count, self.pace, self.works, self.pool_cpu = samplers, pace, works or {}, 0.0
        self.fleet: Fleet | None = None

    def tasks(self, model: bool = False) -> int:
        return 1

    def samplers(self) -> int:
        return self.count

    def map_parts(
        self, make: Make, parts: Sequence[Part], out: Any, report: Report, name: Name = row_name
    ) -> list[Share]:
        self.fleet, began = Fleet(out, self.pace), time.process_time()
        shares = work_off(self.fleet, parts, out, report, self.samplers, 3, name)
        self.pool_cpu = time.process_time() - began - self.fleet.working_cpu
        return shares

    def map_batches(
        self, make: Any, parts: Sequence[Part], out: Any, report: Report, model: bool = False
    ) -> list[Done]:
        work = self.works[make.func]
        return [do_part(work, part, out) for part in missing(parts, out)]
