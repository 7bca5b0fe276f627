"""The tools that check adversa from outside must be able to find a fault."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).resolve().parents[1] / "tools" / "kill_and_resume.py"
    spec = importlib.util.spec_from_file_location("kill_and_resume", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return {root / n for n in names}


def test_what_is_committed_is_watched_before_its_step_is_finished(tool, tmp_path):
    watched = touch(
        tmp_path,
        "round-001/synthetic/part-00000.parquet",
        "round-001/verdicts/part-00003.parquet",
        "round-001/scores/part-00000.parquet",
        "test/part-00000.parquet",
        "denoiser/model.safetensors",
        "denoiser/manifest.json",
        "round-001/requests/part-00000.parquet",
        "round-001/requests/manifest.json",
    )
    touch(
        tmp_path,
        "data/decoded/part-00000.parquet",
        "data/train/part-00000.parquet",
        "data/test/part-00000.parquet",
        "judge/model.safetensors",
        "judge/checkpoint.pt",
        "round-001/hard/part-00000.parquet",
        "round-001/synthetic/.part-00001.parquet.77",
    )
    assert tool.finished_files(tmp_path).keys() == watched
    watched |= {
        tmp_path / "data/train/part-00000.parquet",
        tmp_path / "data/test/part-00000.parquet",
    }
    watched |= touch(tmp_path, "data/manifest.json")
    assert tool.finished_files(tmp_path).keys() == watched


def test_a_finished_run_is_watched_whole(tool, finished):
    _, run = finished
    watched = tool.finished_files(run.root).keys()
    assert watched >= set(run.root.rglob("*.parquet")) | set(run.root.rglob("*.safetensors"))


SLEEPS = "import pathlib, sys, time\nroot = pathlib.Path(sys.argv[1])\n"


def test_a_kill_in_the_middle_and_kills_that_are_none(tool, tmp_path):
    def command(code):
        return [sys.executable, "-c", SLEEPS + code, str(tmp_path)]

    assert (
        tool.kill_at(
            command("(root / 'begun').touch(); time.sleep(60); (root / 'done').touch()"),
            tmp_path,
            "begun",
            "done",
        )
        > 0
    )
    assert not (tmp_path / "done").exists()
    with pytest.raises(RuntimeError, match="ended with 3 before never"):
        tool.kill_at(command("sys.exit(3)"), tmp_path, "never", "done")
    with pytest.raises(RuntimeError, match="too late: done is there already"):
        tool.kill_at(
            command("(root / 'done').touch(); (root / 'late').touch(); time.sleep(60)"),
            tmp_path,
            "late",
            "done",
        )
