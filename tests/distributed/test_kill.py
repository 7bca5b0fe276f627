"""kill -9 of the whole process tree at five points of a run on Ray; the same command finishes
it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from adversa.config import dump

TOOL = Path(__file__).resolve().parents[2] / "tools" / "kill_and_resume.py"


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_run_ends_like_an_undisturbed_one(finished, tmp_path):
    """The undisturbed run is the local engine's: its images and weights are the same as Ray's
    (test_engine).
    """
    config, undisturbed = finished
    (tmp_path / "tiny.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "adversa.cli", "loop", str(tmp_path / "tiny.yaml")]
    tool = [
        sys.executable,
        str(TOOL),
        "--run-dir",
        str(tmp_path / "run"),
        "--undisturbed",
        str(undisturbed.root),
        "--",
        *command,
    ]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed after") == 5 and done.stdout.count(": equal") == 5


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("what", ["classifier", "denoiser"])
def test_a_training_whose_worker_is_killed_ends_with_the_weights_of_an_undisturbed_one(what):
    tool = [
        sys.executable,
        str(TOOL.with_name("kill_training_worker.py")),
        "--what",
        what,
        "--runs",
        "1",
    ]
    done = subprocess.run(
        [*tool, "--steps", "20", "--checkpoint-steps", "4"],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        done.stdout.count("after the batch of step") == done.stdout.count("done again, equal") == 1
    )
