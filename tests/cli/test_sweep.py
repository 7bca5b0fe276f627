"""`adversa sweep` as a user meets it: what is refused, the dry run, a first and a second run, kill
-9 in the middle.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from adversa.config import load
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.sweep import grid, run

LOCAL = ("--engine", "local")


@pytest.fixture
def small(tiny_sweep, tmp_path):
    """Writes the configuration of a tiny sweep."""

    def write(**changes):
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(tiny_sweep(**changes).model_dump(mode="json")))
        return path

    return write


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("sweep.real=[2,900]", "sweep.real 900: train has fewer images of some classes"),
        (
            "sweep.ratios=[0]",
            "sweep.ratios [0.0] leaves the arms replay, unguided, guided without images; "
            "add a ratio above 0",
        ),
        ("sweep.ratios=[0,-2]", "sweep.ratios.1 = -2: Input should be greater than or equal to 0"),
        ("sweep.ratios=[0,.nan]", "sweep.ratios.1 = nan: Input should be a finite number"),
        ("sweep.ratios=[.inf]", "sweep.ratios.0 = inf: Input should be a finite number"),
        ("sweep.max_trials=3", "sweep.max_trials 3: this grid has 14 trials"),
        ("sweep.search={space: {}}", "sweep.search.space"),
        (
            "sweep.search={space: {classifier.rate: {choice: [1]}}}",
            "sweep.search.space.classifier.rate: classifier.rate: no such setting",
        ),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry-run"])
def test_what_cannot_be_is_one_line_before_anything_runs(
    adversa, small, tmp_path, setting, said, dry
):
    result = adversa(
        "sweep", small(), "--run-dir", tmp_path / "run", "--set", setting, *LOCAL, *dry
    )
    assert result.exit_code == 2, result.output
    assert said in result.output and len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_search_is_rays(adversa, small, tmp_path):
    search = "sweep.search={space: {classifier.lr: {loguniform: [0.001, 0.01]}}}"
    one = ("--set", "sweep.real=[2]", "--set", "sweep.arms=[replay]")
    result = adversa("sweep", small(), "--run-dir", tmp_path / "run", "--set", search, *one, *LOCAL)
    assert result.exit_code == 2 and "--engine local: sweep.search is Ray Tune's" in result.output
    result = adversa("sweep", small(), "--run-dir", tmp_path / "run", "--set", search)
    assert (
        result.exit_code == 2
        and "sweep.real [2, 4]: sweep.search is for one of them" in result.output
    )
    unknown = search.replace("}}}", "}}, searcher: guess}")
    result = adversa("sweep", small(), "--run-dir", tmp_path / "run", "--set", unknown, *one)
    assert result.exit_code == 2 and "sweep.search.searcher guess:" in result.output
    strange = search.replace("}}}", "}}, scheduler: asha, scheduler_args: {graze: 1}}")
    result = adversa("sweep", small(), "--run-dir", tmp_path / "run", "--set", strange, *one)
    assert (
        result.exit_code == 2
        and "sweep.search.scheduler_args: asha knows no graze; it takes time_attr" in result.output
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dry_run_counts_and_estimates_and_writes_nothing(adversa, small, tmp_path):
    result = adversa("sweep", small(), "--run-dir", tmp_path / "run", "--dry-run")
    assert result.exit_code == 0, result.output
    assert (
        re.search(r"^in all +14 +", result.output, re.M)
        and "14 trials in 2 cells, " in result.output
    )
    assert re.search(
        r"generated images +4 +180 images", result.output
    )  # 2 arms x (2 + 4) x 5 classes x ratio 2 x 1.5
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_sweep_its_report_and_the_same_command_again(adversa, small, tmp_path):
    path, root = small(), tmp_path / "run"
    result = adversa("sweep", path, "--run-dir", root, *LOCAL)
    assert result.exit_code == 0, result.output
    assert (
        "best balanced accuracy on select so far" in result.output
        and f"report: {root}/sweep.html" in result.output
    )
    assert {"sweep.html", "sweep.json", "sweep.parquet", "figures"} <= {
        p.name for p in root.iterdir()
    }
    told = json.loads((root / "sweep.json").read_text())
    assert all(line in result.output for line in told["sentences"])
    status = adversa("status", root)
    assert (
        status.exit_code == 0 and "finished" in status.output and status.output.count("done") >= 3
    )
    before = {p: p.stat().st_mtime_ns for p in (root / "trials").rglob("manifest.json")}
    again = adversa("sweep", path, "--run-dir", root, "--set", "sweep.metric=accuracy", *LOCAL)
    assert (
        again.exit_code == 0
        and "no trial left to do" in again.output
        and "best accuracy on select" in again.output
    )
    assert before == {p: p.stat().st_mtime_ns for p in (root / "trials").rglob("manifest.json")}
    assert json.loads((root / "sweep.json").read_text())["what"]["metric"] == "accuracy"
    other = adversa("loop", path, "--run-dir", root, *LOCAL)
    assert (
        other.exit_code == 2
        and "holds a sweep, this command is for a run of the loop" in other.output
    )
    report = adversa("report", root)
    assert report.exit_code == 0 and "sweep.html" in report.output


@pytest.mark.slow
@pytest.mark.ray
def test_killed_with_9_in_the_middle_it_ends_as_undisturbed_with_no_trial_twice(
    swept, small, tmp_path
):
    """As a command, on Ray: the driver and all it started die; the same command goes on."""
    root, path = tmp_path / "run", small()
    words = [sys.executable, "-m", "adversa.cli", "sweep", str(path), "--run-dir", str(root)]
    results = root / "trials"

    def begun():
        return subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    process = begun()
    until = time.monotonic() + 600
    while len(list(results.rglob("result/manifest.json"))) < 4:
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=30)  # actors of a dead driver end by themselves
    written = {p: p.stat().st_mtime_ns for p in results.rglob("result/manifest.json")}
    assert 4 <= len(written) < 14
    process = begun()
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    assert all(p.stat().st_mtime_ns == t for p, t in written.items())
    config = load(path)
    rows = [
        run.table(*x).drop_columns(["device_seconds", "wall_seconds"])
        for x in ((config, RunDir(root)), swept)
    ]
    assert rows[0].equals(rows[1]) and len(rows[0]) == 14
    assert (files.read_json(root / "restarts.json") or {})["restarts"] == 1


@pytest.mark.slow
@pytest.mark.ray
def test_ctrl_c_stops_and_says_how_to_go_on(small, tmp_path):
    root, path = tmp_path / "run", small(real=[2])
    words = [sys.executable, "-m", "adversa.cli", "sweep", str(path), "--run-dir", str(root)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 600
    while not (root / "cells").exists():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 143, said
    assert (
        "stopped; everything finished is kept. Resume with: adversa sweep" in said
        and "Traceback" not in said
    )
    assert (
        not run.is_finished(load(path), RunDir(root))
        and files.read_json(root / "status.json")["state"] == "stopped"
    )
    assert grid.points(load(path))
