"""Twenty-two deaths on three nodes: what a run leaves does not depend on them. `make nightly`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adversa.config import dump

TOOL = Path(__file__).resolve().parents[2] / "tools" / "chaos.py"


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.timeout(7200)
def test_whoever_dies_the_run_ends_like_an_undisturbed_one(tiny, tmp_path):
    longer = {"steps": 40, "checkpoint_steps": 4}  # every stage has a middle
    config = tiny(
        data={"part_rows": 32},
        classifier=longer,
        denoiser=longer,
        mine={"budget": 24},
        generate={"per_case": 8, "part_size": 8},
    )
    (tmp_path / "tiny.yaml").write_text(dump(config))
    for victims, stages, kills in (
        ("worker,node,coordinator,head", "prepare,train,generate,curate,retrain", 20),
        ("controller", "train,retrain", 2),
    ):
        tool = [
            sys.executable,
            str(TOOL),
            "--out",
            str(tmp_path),
            "--config",
            str(tmp_path / "tiny.yaml"),
        ]
        done = subprocess.run(
            [*tool, "--victims", victims, "--stages", stages], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads((tmp_path / "chaos.json").read_text())["runs"]
        assert sum(len(run["kills"]) for run in found) == kills
        assert not any(
            run["code"] or run["different"] or kill["again"]
            for run in found
            for kill in run["kills"]
        )
