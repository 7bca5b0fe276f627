"""The branches that only GPUs take, under a GPU that Ray believes in: torch works on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from adversa.engine.tasks import Part, TaskStats
from adversa.storage import tables

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHORT = {"steps": 4, "batch_size": 16, "evaluations": 1, "checkpoint_steps": 2}
VERIFIER = {"model": "convnext_atto", "model_args": {"depths": [1] * 4, "dims": [16] * 4}}
SMALL = {
    "data": {"resolution": 32, "part_rows": 32, "phantom": {"images": 200}},
    "classifier": SHORT | {"model_args": {"channels": [8, 8, 8, 8]}},
    "denoiser": {"architecture": "unet", "patch": 2, "channels": [8, 8], "weights": None}
    | {"steps": 4, "batch_size": 8, "checkpoint_steps": 2},
    "mine": {"budget": 8},
    "mix": {"arms": ["real", "guided"]},
    "generate": {"per_case": 2, "steps": 2, "batch_size": 8, "part_size": 8},
    "curate": {"min_agreement": 0.05, "judge": SHORT | VERIFIER},
    "evaluate": {"bootstrap": 200},
    "cluster": {"training_threads": 1, "object_store_mb": 100, "cpus": 2},
}


def under(gpus: int, *command: object) -> subprocess.CompletedProcess[str]:
    """A command of this Python where Ray believes in so many GPUs."""
    made_up = {"RAY_OVERRIDE_RESOURCES": json.dumps({"GPU": gpus})}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | made_up,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_whole_loop_runs_on_gpus(tmp_path: Path, gpus: int) -> None:
    config, run = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(SMALL))
    done = under(gpus, "-m", "adversa.cli", "loop", config, "--run-dir", run, "--engine", "ray")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["arms"]) >= {"real", "guided"}


def make_counted(folder: Path):
    """Leaves a file for each call, named by its process."""
    (folder / f"{os.getpid()}-{len(list(folder.iterdir()))}").touch()

    def work(part: Part, path: Path) -> TaskStats:
        tables.write_part(path, pa.table({"pid": [os.getpid()]}))
        return TaskStats(1)

    return work


def score(folder: Path) -> None:
    """Eight parts of model work; run in a process of its own."""
    from adversa.config import Cluster
    from adversa.distributed.engine import RayEngine

    engine = RayEngine(Cluster(cpus=2, object_store_mb=100), folder, 12)
    assert engine.tasks(model=True) == 2
    try:
        parts, make = [Part(i, 1) for i in range(8)], partial(make_counted, folder / "made")
        done = engine.map_batches(make, parts, folder / "out", lambda _: None, model=True)
    finally:
        engine.close()
    assert [d.index for d in done] == list(range(8))


def test_models_are_loaded_once_an_actor(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    done = under(1, __file__, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    pids = set(tables.read(tmp_path / "out", ["pid"])["pid"].to_pylist())
    made = [int(p.name.split("-")[0]) for p in (tmp_path / "made").iterdir()]
    assert sorted(made) == sorted(set(made)) and pids <= set(made)
    assert len(pids) <= 2


if __name__ == "__main__":
    score(Path(sys.argv[1]))
