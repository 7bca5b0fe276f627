"""Whole runs on S3 (moto on loopback), cut off and resumed, and commands that work on them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from adversa.config import dump
from adversa.engine.local import LocalEngine
from adversa.pipeline import loop
from adversa.report import page
from adversa.run import control, file_lock, run_lock, step_folder
from adversa.run import create as run_create
from adversa.run.folder import RunDir
from adversa.storage import tables, weights
from adversa.storage.path import (
    BucketPath,
    names,
)
from adversa.sweep import report as sweep_page
from adversa.sweep import run as sweep_run
from adversa.types import UserError

spec = importlib.util.spec_from_file_location("s3", Path(__file__).parents[1] / "s3.py")
s3 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(s3)


class Killed(BaseException):
    """What stands for kill -9 in this process: nothing after it is done."""


def same(run, undisturbed):
    """That two runs generated the same, kept the same, trained the same and say the same."""
    for name in ("requests", "synthetic", "verdicts"):
        ours, theirs = (tables.read(r.round(1, name)).to_pylist() for r in (run, undisturbed))
        assert repr(ours) == repr(theirs), name  # repr: what was not measured is not a number
    models = [undisturbed.name_of(p.parent) for p in undisturbed.root.rglob(weights.MODEL)]
    assert len(models) > 5
    for name in models:
        assert step_folder.fingerprint(run.root / name) == step_folder.fingerprint(
            undisturbed.root / name
        ), name
        metrics = [f.root / name / "metrics.jsonl" for f in (run, undisturbed)]
        assert metrics[0].exists() == metrics[1].exists() and (
            not metrics[1].exists() or metrics[0].read_text() == metrics[1].read_text()
        )
    ours, theirs = (json.loads(r.summary.read_text()) for r in (run, undisturbed))
    told = (
        "accepted",
        "generated",
        "rejected",
        "arms",
        "intervals",
        "verdict",
        "split_hash",
        "run_id",
    )
    assert {k: ours[k] for k in told} == {k: theirs[k] for k in told}


def no_secret_in(root):
    files = [p for p in root.rglob("*") if p.is_file()]
    assert len(files) > 50
    assert not [
        p
        for p in files
        if s3.SECRET.encode() in (data := p.read_bytes()) or s3.KEY.encode() in data
    ]


@pytest.mark.slow
def test_a_run_on_s3_that_is_cut_off_again_and_again_ends_as_one_in_a_folder(
    finished, store, proxy, monkeypatch, adversa
):
    """Killed in a training and in the generation; then the store fails in the filter, and the same
    command goes on.
    """
    config, undisturbed = finished
    put, cuts = (
        BucketPath.write_bytes,
        {"classifier/checkpoint.json", "synthetic/part-00001.parquet"},
    )

    def killing(self, data):
        if (at := f"{self.parent.name}/{self.name}") in cuts:
            cuts.remove(at)
            raise Killed(at)
        put(self, data)

    def work():
        run = loop.open_run(config, store)
        loop.run(config, run, LocalEngine(1, 1), page.write)
        return run

    monkeypatch.setattr(BucketPath, "write_bytes", killing)
    for at in ("classifier/checkpoint.json", "synthetic/part-00001.parquet"):
        with pytest.raises(Killed, match=at):
            work()
    generated = names(store / "round-001" / "synthetic")
    assert "part-00000.parquet" in generated and "part-00001.parquet" not in generated
    proxy.fault = lambda method, path, before: (
        503 if method == "PUT" and "verdicts/part" in path else None
    )
    with pytest.raises(UserError, match="run the same command again") as e:
        work()
    s3.one_line(e)
    assert not tables.parts(store / "round-001" / "verdicts")
    assert not step_folder.is_finished(store / "round-001" / "verdicts")
    proxy.fault = s3._none
    before = proxy.count("PUT", "synthetic/part-00000")
    run = work()
    assert proxy.count("PUT", "synthetic/part-00000") == before, (
        "what was generated is not generated again"
    )
    same(run, undisturbed)
    no_secret_in(store)
    status = adversa("status", store)
    assert status.exit_code == 0 and "report" in status.output
    (store / "report.html").unlink()
    assert adversa("report", store).exit_code == 0
    assert len((store / "report.html").read_text()) > 10_000


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_on_ray_and_s3_is_that_of_the_local_engine(finished, store, proxy, tmp_path):
    """Pool, streams and Ray Train of a command of its own: its Ray has the credentials of its
    environment, and nothing else.
    """
    config, undisturbed = finished
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"cpus": 2})})
    (tmp_path / "tiny.yaml").write_text(dump(config))
    command = [
        sys.executable,
        "-m",
        "adversa.cli",
        "loop",
        str(tmp_path / "tiny.yaml"),
        "--run-dir",
        str(store),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=800, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert s3.SECRET not in done.stdout + done.stderr and not [
        p for p in tmp_path.iterdir() if p.name != "tiny.yaml"
    ]
    same(RunDir(store), undisturbed)
    no_secret_in(store)
    assert not (store / ".ray-train").exists()


def test_a_sweep_on_s3_is_that_of_a_folder(tiny_sweep, store, tmp_path):
    config = tiny_sweep(real=[2], ratios=[0, 1], arms=["guided"])
    found = []
    for root in (store, tmp_path / "run"):
        run = sweep_run.open_run(config, root)
        sweep_run.run(config, run, LocalEngine(1, 1), sweep_page.write)
        assert {"sweep.html", "sweep.json", "sweep.parquet"} <= names(
            run.root
        ) and "dose.svg" in names(run.root / "figures")
        found.append(sweep_run.table(config, run).drop_columns(["device_seconds", "wall_seconds"]))
    assert len(found[0]) == 2 and found[0].equals(found[1])
    no_secret_in(store)


def test_a_second_command_on_a_run_in_a_store_is_refused_from_wherever_it_comes(
    store, monkeypatch, tmp_path
):
    """From this machine by its lock, from another by the heartbeat; whoever died is followed, and
    nothing is left in the end.
    """
    run, quick = (
        run_create.open_run(store, {}, ""),
        run_lock.Timing(heartbeat=0.3, expiry=3.0, settle=0.8),
    )

    def hold(name):
        return control.held(run, name, lambda: None, timing=quick)

    def elsewhere(folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / folder))

    with hold("first") as handle:
        assert file_lock.is_locked(run)
        with pytest.raises(UserError, match="is being worked on by first-"), hold("second"):
            pass
        elsewhere("far")
        assert not file_lock.is_locked(run)
        with pytest.raises(UserError, match="is being worked on by first-"), hold("third"):
            pass
        handle.check()
        handle.over.set()  # it dies: no more heartbeats
        handle.thread.join()
        said = []
        with control.held(run, "fourth", lambda: None, said.append, timing=quick):
            assert len(said) == 1 and "watching its heartbeat for 3 s" in said[0]
            with pytest.raises(run_lock.RunLockLost, match="fourth-.* has taken it over"):
                handle.check()
    assert run_lock.holder(run) is None


def test_another_recipe_changes_nothing_while_another_machine_works_on_the_run(
    store, monkeypatch, tmp_path
):
    monkeypatch.setattr(
        run_lock, "STORE_TIMING", run_lock.Timing(heartbeat=0.3, expiry=3.0, settle=0.8)
    )
    run = run_create.open_run(store, {"seed": 1}, "seed: 1")
    with control.held(run, "first", lambda: None):
        (tmp_path / "far").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "far"))
        with pytest.raises(UserError, match="seed: 1 -> 2"):
            run_create.open_run(store, {"seed": 2}, "seed: 2", busy=run_lock.is_worked_on)
        assert (store / "config.yaml").read_text() == "seed: 1"
    run_create.open_run(store, {"seed": 2}, "seed: 2", busy=run_lock.is_worked_on)
    assert (store / "config.yaml").read_text() == "seed: 2"


def test_a_command_works_on_a_run_in_a_store(store, tiny, tmp_path, adversa):
    (tmp_path / "tiny.yaml").write_text(dump(tiny(data={"phantom": {"images": 60}})))
    done = adversa("prepare", tmp_path / "tiny.yaml", "--run-dir", store, "--engine", "local")
    assert done.exit_code == 0 and f"prepare is done in {store}" in done.output, done.output
    assert step_folder.is_finished(store / "data") and adversa("status", store).exit_code == 0


@pytest.mark.parametrize("terminal", [True, False])
def test_following_a_job_shows_the_live_view_of_a_run_that_can_be_read(
    store, tiny, tmp_path, terminal
):
    import io

    from adversa.cli.cluster import _View
    from adversa.cli.console import Screen

    screen = Screen(file=io.StringIO(), force_terminal=terminal, width=100)
    for at in (str(store), str(tmp_path / "elsewhere")):
        with _View(at, screen) as view:
            view.show("10:00:00 before there is a run")
            if at == str(store):
                loop.open_run(tiny(), store)
            view.show("10:00:01 prepare: data")
            view.show("report: there")
    said = screen.file.getvalue()
    assert said.count("before there is a run") == 2 and said.count("report: there") == 2
    assert (
        said.count("10:00:01 prepare: data") == (1 if terminal else 2)
        and ("to do" in said) == terminal
    )


def test_a_recipe_of_a_run_knows_nothing_of_where_it_lies(tiny):
    assert "s3://" not in json.dumps(loop.recipe_of(tiny()))
