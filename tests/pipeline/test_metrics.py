"""The numbers for a monitor, from the run folder; and that the dashboard shows those that are
exported, all of them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from adversa.pipeline.metrics import NAMES, run_metrics
from adversa.run import control, status, step_folder
from adversa.run import create as run_create
from adversa.storage import files

DASHBOARD = Path(__file__).resolve().parents[2] / "cluster" / "grafana.json"


@pytest.fixture
def run(tmp_path):
    return run_create.open_run(tmp_path / "run", {}, "")


def finish(folder, **facts):
    files.write_json(folder / step_folder.MANIFEST, facts)


def test_every_metric_of_the_dashboard_is_exported_and_every_exported_one_is_shown():
    shown = json.loads(DASHBOARD.read_text())["panels"]
    named = [set(re.findall(r"ray_(adversa_\w+)", t["expr"])) for p in shown for t in p["targets"]]
    assert all(len(names) == 1 for names in named)
    assert set.union(*named) == set(NAMES) and len(shown) == len(NAMES)


def test_the_dashboard_lists_runs_by_a_metric_that_is_there():
    (variable,) = [
        v for v in json.loads(DASHBOARD.read_text())["templating"]["list"] if v["name"] == "run"
    ]
    assert (
        re.fullmatch(r"label_values\(ray_(adversa_\w+), run\)", variable["definition"])[1] in NAMES
    )


def test_a_run_that_generates(tiny, run):
    finish(run.data, device_seconds=10.0)
    files.write_json(
        run.round(1, "synthetic") / step_folder.PROGRESS,
        {
            "done": 64,
            "total": 640,
            "unit": "image",
            "rate": 1.0,
            "elapsed": 1.0,
            "images_per_second": 4.0,
        },
    )
    status.set_status(
        run, "running", "round 1: generate", folders=["round-001/requests", "round-001/synthetic"]
    )
    found = run_metrics(tiny(), run)()
    assert set(found) == set(NAMES) and all(isinstance(v, float) for v in found.values())
    assert found["adversa_images_per_second"] == 4 and found["adversa_queue_depth"] == 576
    assert (found["adversa_stage"], found["adversa_round"]) == (5, 1)
    assert found["adversa_device_seconds"] == 10 and found["adversa_accepted_share"] == 0


def test_a_training_has_steps_to_do_and_no_images(tiny, run):
    files.write_json(
        run.denoiser / step_folder.PROGRESS, {"done": 5, "total": 20, "rate": 2.0, "elapsed": 1.0}
    )
    status.set_status(run, "running", "train", folders=["denoiser"])
    found = run_metrics(tiny(), run)()
    assert (
        found["adversa_queue_depth"],
        found["adversa_images_per_second"],
        found["adversa_stage"],
    ) == (15, 0, 3)


def test_what_is_finished_is_learned_as_it_comes(tiny, run):
    read = run_metrics(tiny(rounds=2), run)
    assert read()["adversa_accepted_share"] == 0
    finish(run.round(1, "verdicts"), rows=40, kept=10, device_seconds=1.0)
    assert read()["adversa_accepted_share"] == 0.25
    finish(run.round(2, "verdicts"), rows=60, kept=40, device_seconds=2.0)
    found = read()
    assert found["adversa_accepted_share"] == 0.5 and found["adversa_device_seconds"] == 3


def test_a_pause_a_restart_and_an_end(tiny, run):
    read = run_metrics(tiny(), run)
    status.set_status(run, "paused", "round 1: curate", folders=[])
    files.write_json(run.root / control.RESTARTS, {"restarts": 2, "seconds": 30.0})
    found = read()
    assert (found["adversa_paused"], found["adversa_stage"], found["adversa_restarts"]) == (1, 6, 2)
    status.set_status(run, "finished")
    found = read()
    assert (found["adversa_paused"], found["adversa_stage"], found["adversa_queue_depth"]) == (
        0,
        0,
        0,
    )
