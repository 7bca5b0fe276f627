"""The coordinator without Ray: its outcome is in the run folder, and what is asked of it there is
heard. One tiny run for all.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict

import pytest

from adversa.config import dump
from adversa.engine.local import LocalEngine
from adversa.pipeline import generate, loop, stages
from adversa.pipeline.coordinator import Coordinator, CoordinatorTask, follow
from adversa.run import control, file_lock, status, step_folder
from adversa.run.run_lock import Timing
from adversa.storage import files, tables
from adversa.types import UserError

TIMING = Timing(heartbeat=0.1, expiry=1.0, settle=0.3)


def never():
    raise AssertionError("the process was to be ended")


class Idle:
    """An engine that is never asked for anything."""

    def close(self):
        pass


def coordinate(config, run, engine=LocalEngine, end=never, command="loop", **more):
    task = CoordinatorTask("me", dump(config), str(run.root), command, str(run.root))
    made = Coordinator(
        task,
        lambda config, run: engine(),
        lambda root: root / "report.html",
        end,
        timing=TIMING,
        **more,
    )
    made.start()
    return made


def ended(coordinator, seconds=300):
    assert coordinator.over.wait(seconds)
    coordinator.thread.join(10)
    return files.read_json(coordinator.run.status)


@pytest.fixture
def run(tiny, tmp_path):
    config = tiny()
    return config, loop.open_run(config, tmp_path / "run")


@pytest.fixture
def work(monkeypatch):
    """Puts a function of (config, run) in the place of the whole loop."""

    def put(act):
        monkeypatch.setattr(loop, "run", lambda config, run, *args, **more: act(config, run))

    return put


def test_a_command_that_was_carried_out_says_where_it_ended(run, work):
    config, folder = run
    stage = loop.todo(stages.plan(config, folder, "prepare"), "prepare")[-1]
    work(lambda config, run: stage)
    found = coordinate(*run, Idle, command="prepare")
    status = ended(found)
    assert (status["state"], status["worked"], status["command"]) == (
        "stopped",
        "prepare",
        "prepare",
    )
    assert found.state() | {"note": ""} == {
        "id": "me",
        "command": "prepare",
        "taken": True,
        "over": True,
        "refused": None,
        "note": "",
    }
    assert not (folder.root / "lock.json").exists() and not file_lock.is_locked(folder)


def test_what_the_user_can_mend_and_what_not_are_told_apart(run, work):
    def mendable(config, run):
        error = UserError("no such file")
        error.add_note("give another")
        raise error

    work(mendable)
    status = ended(coordinate(*run, Idle))
    assert (status["state"], status["error"], status["user"]) == (
        "failed",
        "no such file; give another",
        True,
    )
    assert "trace" not in status

    def fault(config, run):
        raise RuntimeError("a bug\nof ours")

    work(fault)
    status = ended(coordinate(*run, Idle))
    assert (status["state"], status["error"]) == (
        "failed",
        "a bug of ours",
    ) and "user" not in status
    assert "in fault" in status["trace"] and status["trace"].endswith("of ours\n")


def test_a_run_of_somebody_else_is_refused_and_left_alone(run):
    config, folder = run
    with control.held(folder, "first", never, timing=TIMING):
        before = folder.status.read_bytes()
        found = coordinate(*run, Idle)
        ended(found)
        assert (
            "is being worked on by first-" in found.state()["refused"]
            and not found.state()["taken"]
        )
        assert folder.status.read_bytes() == before


def test_one_that_loses_the_run_writes_nothing_more(run, monkeypatch):
    monkeypatch.setattr(control, "POLL_SECONDS", 0.0)
    go_on = threading.Event()

    def lose(*args, handle, **more):
        mine = handle.lock
        with mine.writing:  # or the thread's next heartbeat may come on top
            far = {"owner": "elsewhere", "machine": "far"}
            files.write_json(mine.path, asdict(mine.record) | far)
        go_on.wait(10)
        handle.check()

    monkeypatch.setattr(loop, "run", lose)
    found = coordinate(*run, Idle)
    time.sleep(0.5)
    before = run[1].status.read_bytes()
    go_on.set()
    assert ended(found)["state"] == "running" and run[1].status.read_bytes() == before
    assert "elsewhere" in found.state()["refused"]
    assert json.loads((run[1].root / "lock.json").read_text())["owner"] == "elsewhere"


def test_work_that_does_not_look_ends_with_its_process_and_is_stopped(run, work, monkeypatch):
    monkeypatch.setattr(control, "GRACE_SECONDS", 0.3)
    told, begun, go_on = threading.Event(), threading.Event(), threading.Event()
    work(lambda config, run: begun.set() or go_on.wait(20))
    found = coordinate(*run, Idle, told.set)
    assert begun.wait(10)  # or it would be stopped before it works, and end by itself
    found.stop()
    assert told.wait(10)
    assert (
        files.read_json(run[1].status)["state"] == "stopped"
        and not (run[1].root / "lock.json").exists()
    )
    go_on.set()


def test_a_stop_outlives_the_coordinator_that_did_not_hear_it(run, work):
    work(lambda config, run: pytest.fail("it was to stop"))
    control.request(run[1], control.STOP)
    assert ended(coordinate(*run, Idle, back=True))["state"] == "stopped"


@pytest.mark.slow
def test_pauses_in_the_middle_and_settings_leave_a_run_as_it_would_be(
    finished, tiny, tmp_path, monkeypatch
):
    """Paused after the first generated part; then a second round with another budget."""
    monkeypatch.setattr(control, "POLL_SECONDS", 0.0)
    config = tiny(rounds=2)
    run = loop.open_run(config, tmp_path / "run")
    name = loop.recipe_of(config)
    made = generate._row

    def pausing(*args):
        if not (run.root / "paused").exists():
            (run.root / "paused").touch()
            control.request(run, control.PAUSE, {"mine.budget": 6})
        return made(*args)

    monkeypatch.setattr(generate, "_row", pausing)
    found = coordinate(config, run, lambda: LocalEngine(1, 1))
    until = time.monotonic() + 600
    while (files.read_json(run.status) or {}).get("state") != "paused":
        assert time.monotonic() < until and not found.over.is_set(), files.read_json(run.status)
        time.sleep(0.05)
    parts = tables.parts(run.round(1, "synthetic"))
    time.sleep(1)
    assert (
        parts
        and tables.parts(run.round(1, "synthetic")) == parts
        and not step_folder.is_finished(run.round(1, "synthetic"))
    )
    written = {p: p.stat().st_mtime_ns for p in parts}
    control.request(run, control.GO)
    assert ended(found, 600)["state"] == "finished", files.read_json(run.status)
    assert all(p.stat().st_mtime_ns == t for p, t in written.items())
    assert control.recorded(run) == {2: {"mine.budget": 6}}
    assert [len(tables.read(run.round(n, "hard"))) for n in (1, 2)] == [12, 6]
    ids = {r["request_id"] for r in tables.read(run.round(1, "requests")).to_pylist()}
    assert len(ids) == len(tables.read(finished[1].round(1, "requests")))
    summary = json.loads(run.summary.read_text())
    assert summary["settings"] == {"2": {"mine.budget": 6}} and summary["restarts"] == 0
    assert any("round 2 was made with mine.budget 6" in note for note in summary["notes"])
    assert files.read_json(run.recipe)["recipe"] == json.loads(json.dumps(name))


def test_following_ends_with_the_run_or_with_our_patience(run):
    folder = run[1]
    status.set_status(folder, "running", "train")
    with control.held(folder, "far", never, timing=TIMING):
        threading.Timer(1.5, status.set_status, (folder, "stopped")).start()
        assert follow(folder, 1.0)["state"] == "stopped"
        status.set_status(folder, "running", "train")
    with pytest.raises(
        UserError, match="has given no sign of life for 1 s; see whether the cluster is up"
    ):
        follow(folder, 1.0)


def test_one_that_comes_back_to_a_paused_run_rests_until_it_is_resumed(run, work):
    config, folder = run
    work(lambda config, run: None)
    control.request(folder, control.PAUSE)
    found = coordinate(*run, Idle, back=True)
    until = time.monotonic() + 20
    while (files.read_json(folder.status) or {}).get("state") != "paused":
        assert time.monotonic() < until and not found.over.is_set()
        time.sleep(0.05)
    control.request(folder, control.GO)
    assert ended(found)["state"] == "stopped"  # no report yet


def test_one_that_comes_back_waits_for_the_end_of_the_one_before(run, work):
    """Its node has lost the head and not the storage. A new one is refused at once."""
    config, folder = run
    work(lambda config, run: None)
    with control.held(folder, "coordinator", never, timing=TIMING):
        found = coordinate(*run, Idle, back=True)
        new = coordinate(*run, Idle)
        assert new.over.wait(5) and "is being worked on by coordinator-" in new.refused
        assert not found.over.wait(1) and "is being worked on by coordinator-" in found.note
    assert ended(found)["state"] == "stopped" and found.refused is None
