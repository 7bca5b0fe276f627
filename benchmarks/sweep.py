"""What a trial of a sweep costs beside its compute: in a lane that is used again, and as a launch
of Ray Train of its own.

    python benchmarks/sweep.py             two lanes, 12 and 24 trials of 200 steps; 3 launches
    python benchmarks/sweep.py --quick     6 and 12 trials of 60 steps; 2 launches

The same trial each time: a classifier on a small cell of phantoms, scored on `select`. In lanes:
the wall time by which the longer search exceeds the shorter one, times the lanes, over its further
trials, less their mean compute (the seconds of training and of evaluating on `select`, from their
manifests), so the start of Ray's processes and of the lanes is not in it; it is told by itself. A
launch: the wall time of `RayEngine.fit` of one such training, less its compute, the launches after
the first.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import Result, parser, publish

from adversa.config import Config, check
from adversa.distributed.engine import RayEngine
from adversa.engine.interface import Trial
from adversa.pipeline import prepare, train
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.sweep import grid, regimes
from adversa.sweep import run as sweep_run

BAR = 8.0  # seconds of a trial beyond compute, once warm
LANES = 2


def config_of(training_steps: int, seeds: int) -> Config:
    return check(
        {
            "data": {
                "source": "phantom",
                "resolution": 32,
                "phantom": {"images": 1200, "seed": 3, "tail": 0.8},
            },
            "classifier": {"steps": training_steps, "evaluations": 3, "checkpoint_steps": 1000},
            "sweep": {"real": [16], "ratios": [0, 1], "arms": ["replay"], "seeds": seeds},
            "cluster": {"cpus": LANES, "training_threads": 1},
        },
        "the benchmark",
    )


def trials(config: Config, run: RunDir, engine: RayEngine) -> list[Trial]:
    """Of the sweep, its cell made already."""
    prepare.prepare(engine, config.data, run.data)
    found = sweep_run.trials(config, run)
    points = {p.name for p in grid.points(config)}
    engine.search([t for t in found if t.name not in points], lambda _: None)
    return [t for t in found if t.name in points]


def searched(engine: RayEngine, some: list[Trial]) -> tuple[float, float, float]:
    """(wall seconds of a search, mean compute of its trials, seconds until its first trial was
    done).
    """
    began, first = time.perf_counter(), [float("nan")]

    def look(state: dict[str, Any]) -> None:
        if state["done"] and np.isnan(first[0]):
            first[0] = time.perf_counter() - began

    engine.search(some, look)
    wall = time.perf_counter() - began
    compute = [step_folder.manifest(t.out.parent / "classifier")["compute_seconds"] for t in some]
    scored = [step_folder.manifest(t.out.parent / "select")["device_seconds"] for t in some]
    return wall, float(np.mean(compute) + np.mean(scored)), first[0]


def launched(engine: RayEngine, config: Config, d: RunDir, root: Path, count: int) -> list[float]:
    """Seconds of each launch of Ray Train beyond its training's compute."""
    found = []
    for i in range(count):
        out = root / f"launch-{i}"
        mix = d.arm(0, "real") / "mix"
        job = train.classifier_job(
            d.data, mix, [], config.classifier, i, config.data.resolution, out
        )
        began = time.perf_counter()
        engine.fit([job])
        found.append(time.perf_counter() - began - step_folder.manifest(out)["compute_seconds"])
    return found


def measure(quick: bool) -> list[Result]:
    few, length, launches = (6, 60, 2) if quick else (12, 200, 3)
    config = config_of(length, 3 * few // 2)  # two trials a seed
    config = config.model_copy(
        update={"sweep": config.sweep.model_copy(update={"keep_models": True})}
    )
    with tempfile.TemporaryDirectory(prefix="adversa-") as folder:
        run = sweep_run.open_run(config, Path(folder) / "run")
        engine = RayEngine(config.cluster, run.root, config.data.resolution**2 * 3)
        try:
            every = trials(config, run, engine)
            assert len(every) == 3 * few, len(every)
            short, _, first = searched(engine, every[:few])
            long, compute, _ = searched(engine, every[few:])
            d = grid.cell_dir(run, grid.cells(config.sweep)[0])
            regimes.first_mix(d)
            beyond = launched(engine, config, d, Path(folder), launches)
        finally:
            engine.close()
    each = (long - short) * LANES / few
    overhead = each - compute
    return [
        Result(
            "a trial in a warm lane, beyond compute", overhead, "s", f"<= {BAR:g}", overhead <= BAR
        ),
        Result("a trial's compute", compute, "s"),
        Result("a search's first trial, from the call", first, "s"),
        Result("a launch of Ray Train, beyond compute", float(np.median(beyond[1:])), "s"),
        Result("the first launch", beyond[0], "s"),
    ]


def main() -> None:
    args = parser(__doc__).parse_args()
    publish(measure(args.quick), args.json)


if __name__ == "__main__":
    main()
