"""`adversa pause | resume | stop`: what is written, who is waited for, and what there is to say
where nobody works.
"""

from __future__ import annotations

import threading

import pytest

from adversa.config import dump
from adversa.run import control, file_lock, requests, run_lock, status
from adversa.run import create as run_create
from adversa.storage import files
from adversa.types import UserError


@pytest.fixture
def run(tiny, tmp_path):
    config = tiny(rounds=2)
    return run_create.open_run(tmp_path / "run", config.model_dump(mode="json"), dump(config))


@pytest.fixture
def at_work(run):
    with file_lock.lock(run):
        status.set_status(run, "running", "train")
        yield run


def one_line(result, *parts):
    assert result.exit_code == 2 and result.output.count("\n") == 1
    assert all(part in result.output for part in parts), result.output


@pytest.mark.parametrize("command", ["pause", "resume", "stop"])
def test_nothing_is_asked_of_a_run_that_nobody_works_on(adversa, run, command):
    one_line(
        adversa(command, run.root), f"is not started: there is nothing to {command}", "adversa loop"
    )
    status.set_status(run, "finished")
    one_line(adversa(command, run.root), "is finished")
    assert not (run.root / control.CONTROL).exists()


def test_a_folder_that_is_no_run(adversa, tmp_path):
    one_line(adversa("pause", tmp_path), "is not a run")


def test_pause_and_resume_write_the_wish(adversa, at_work):
    assert (
        adversa("pause", at_work.root).exit_code == 0
        and control.read(at_work).state == control.PAUSE
    )
    result = adversa(
        "resume", at_work.root, "--set", "mine.budget=5", "--set", "mix.synthetic_ratio=0.25"
    )
    assert (
        result.exit_code == 0
        and "from round 1 on: mine.budget 5, mix.synthetic_ratio 0.25; " in result.output
    )
    assert control.read(at_work) == control.Requested(
        control.GO, {"mine.budget": 5, "mix.synthetic_ratio": 0.25}
    )


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("seed=3", "only mix.synthetic_ratio and mine.budget may change"),
        ("mine.budget=0", "mine.budget = 0"),
        ("mine.budget", "KEY"),
    ],
)
def test_settings_that_may_not_change_or_are_no_good(adversa, at_work, setting, part):
    one_line(
        adversa("resume", at_work.root, "--set", setting),
        part if part != "KEY" else "write key.sub=value",
    )
    assert not (at_work.root / control.CONTROL).exists()


def test_settings_come_too_late_for_the_last_round(adversa, at_work):
    at_work.round(1).mkdir()
    assert "from round 2 on" in adversa("resume", at_work.root, "--set", "mine.budget=5").output
    at_work.round(2).mkdir()
    one_line(
        adversa("resume", at_work.root, "--set", "mine.budget=6"), "every round of", "has begun"
    )
    assert control.read(at_work).settings == {"mine.budget": 5}


def test_settings_wait_for_a_run_that_nobody_works_on(adversa, run):
    result = adversa("resume", run.root, "--set", "mine.budget=5")
    assert result.exit_code == 0 and "nobody works on" in result.output
    assert control.read(run).settings == {"mine.budget": 5}


def test_stop_waits_until_it_is_heard(run, monkeypatch):
    held, heard = threading.Event(), threading.Event()

    def work():
        with file_lock.lock(run):
            status.set_status(run, "running", "train")
            held.set()
            while control.read(run).state != control.STOP:
                heard.wait(0.05)
            status.set_status(run, "stopped")

    thread = threading.Thread(target=work)
    thread.start()
    assert held.wait(10)
    assert "is stopped; everything finished is kept. Resume with: adversa loop" in requests.stop(
        run
    )
    thread.join(10)
    assert files.read_json(run.status)["state"] == "stopped"


def test_a_stop_that_is_not_heard_is_said(at_work, monkeypatch):
    monkeypatch.setattr(requests, "HEARD_SECONDS", 0.3)
    with pytest.raises(
        UserError, match="has not stopped after 0 s; it will when it looks: adversa status"
    ):
        requests.stop(at_work)


def test_a_run_of_another_machine_is_known_by_its_heartbeat(run, monkeypatch):
    from adversa.cli import view

    quick = run_lock.Timing(heartbeat=0.3, expiry=2.0, settle=0.7)
    monkeypatch.setattr(run_lock, "TIMING", quick)
    monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.05)
    status.set_status(run, "running", "train")
    far = run_lock.RunLock(run, "far", quick)
    far.record = run_lock.replace(far.record, machine="far")
    far.take()
    assert view.state_of(run)[0] == "killed"  # no sign of life
    over = threading.Event()

    def beat():
        while not over.wait(0.2):
            far.renew()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        run_lock._watched.clear()
        assert view.state_of(run)[0] == "running"
    finally:
        over.set()
        thread.join()
