"""Requests and settings in the run folder, and what holds a run: the locks and the thread
that keeps it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import asdict

import pytest

from adversa.run import control, run_lock, status
from adversa.run import create as run_create
from adversa.run import hold as run_hold
from adversa.run.control import Pause, Stop
from adversa.run.run_lock import RunLockLost, Timing
from adversa.storage import files
from adversa.types import UserError

TIMING = Timing(heartbeat=0.1, expiry=1.0, settle=0.3)
OWN = {"mine.budget": 64, "mix.synthetic_ratio": 0.5, "seed": 0}


@pytest.fixture
def run(tmp_path):
    return run_create.open_run(tmp_path / "run", {}, "")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(control, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(control, "POLL_SECONDS", 0.05)


def never():
    raise AssertionError("nobody was to be interrupted")


def hold(run, interrupt=never, **more):
    return control.held(run, "test", interrupt, timing=TIMING, **more)


# ---- requests ------------------------------------------------------------------------------------


def test_nobody_wants_anything_at_first_and_the_newest_request_counts(run):
    assert control.read(run) == control.Requested(control.GO, {})
    control.request(run, control.PAUSE, {"mine.budget": 3})
    control.request(run, control.GO, {"mix.synthetic_ratio": 1.0})
    assert control.read(run) == control.Requested(
        control.GO, {"mine.budget": 3, "mix.synthetic_ratio": 1.0}
    )


def test_a_poll_raises_what_is_asked_and_a_wait_ends_with_the_pause(run, quick):
    with hold(run) as handle:
        handle.poll(force=True)
        control.request(run, control.PAUSE)
        with pytest.raises(Pause):
            handle.poll(force=True)
        threading.Timer(0.3, control.request, (run, control.GO)).start()
        started = time.monotonic()
        handle.wait()
        assert time.monotonic() - started > 0.2
        control.request(run, control.STOP)
        with pytest.raises(Stop):
            handle.wait()
        time.sleep(0.6)  # the work knows: it is not interrupted as well


def test_work_is_begun_again_after_each_pause(run, quick):
    done, told = [], []

    def work():
        done.append(1)
        if len(done) == 1:
            control.request(run, control.PAUSE)
            handle.poll(force=True)
        return "made"

    def paused():
        told.append(1)
        threading.Timer(0.2, control.request, (run, control.GO)).start()

    with hold(run) as handle:
        assert control.with_pauses(handle, work, paused) == "made"
    assert (len(done), len(told)) == (2, 1)


def test_polls_read_no_file_more_often_than_said(run, monkeypatch):
    monkeypatch.setattr(control, "POLL_SECONDS", 60.0)
    readers = []  # the thread that keeps the lock reads, too
    with hold(run) as handle:
        handle.poll()
        read = control.read
        monkeypatch.setattr(
            control, "read", lambda run: readers.append(threading.get_ident()) or read(run)
        )
        for _ in range(1000):
            handle.poll()
        assert threading.get_ident() not in readers
        handle.poll(force=True)
        assert threading.get_ident() in readers


def test_work_that_does_not_poll_is_interrupted_after_a_grace(run, quick):
    called = threading.Event()
    with hold(run, called.set):
        control.request(run, control.STOP)
        assert called.wait(10)


def test_a_request_that_is_taken_back_in_time_interrupts_nobody(run, monkeypatch):
    monkeypatch.setattr(control, "GRACE_SECONDS", 1.0)
    with hold(run):
        control.request(run, control.STOP)
        time.sleep(0.3)
        control.request(run, control.GO)
        time.sleep(1.2)


@pytest.mark.parametrize("afresh", [True, False])
def test_old_requests_hold_for_one_that_comes_back_and_for_no_new_start(run, afresh):
    control.request(run, control.PAUSE, {"mine.budget": 3})
    with hold(run, afresh=afresh):
        assert control.read(run) == control.Requested(
            control.GO if afresh else control.PAUSE, {"mine.budget": 3}
        )


# ---- holding -------------------------------------------------------------------------------------


def test_a_second_holder_is_told_who_has_the_run(run):
    with (
        hold(run),
        pytest.raises(
            UserError, match=rf"{run.root} is being worked on by test-\w+ on .* for \d+ s"
        ),
        hold(run),
    ):
        pass


def test_a_run_is_let_go_of_and_the_next_waits_for_nothing(run):
    with hold(run):
        time.sleep(0.3)
        assert run_lock.holder(run).beat > 1  # the thread
    assert run_lock.holder(run) is None
    started = time.monotonic()
    with hold(run):
        assert time.monotonic() - started < TIMING.expiry


def test_a_holder_that_is_overtaken_is_interrupted_and_may_not_commit(run, quick):
    called = threading.Event()
    with hold(run, called.set) as handle:
        far = {"owner": "elsewhere", "host": "far", "machine": "far"}
        with handle.lock.writing:  # or the thread's next heartbeat may come on top
            files.write_json(handle.lock.path, asdict(handle.lock.record) | far)
        assert called.wait(10)
        for act in (handle.check, lambda: handle.poll(force=True)):
            with pytest.raises(RunLockLost, match="elsewhere on far"):
                act()
    assert run_lock.holder(run).owner == "elsewhere"


# ---- restarts ------------------------------------------------------------------------------------


def test_deaths_are_counted_with_the_time_between_and_ends_are_not(run):
    clock = run.root / "clock.json"
    files.write_json(clock, {"wall_seconds": 1.0})
    control.note_start(run)
    assert control.restarts(run) == (0, 0.0)
    then = clock.stat().st_mtime - 30
    for state, count in (("running", 1), ("stopped", 1), ("failed", 1), ("paused", 2)):
        status.set_status(run, state)
        os.utime(clock, (then, then))
        control.note_start(run)
        assert control.restarts(run)[0] == count
    assert 60 <= control.restarts(run)[1] < 90


# ---- settings of rounds --------------------------------------------------------------------------


def test_settings_hold_for_rounds_that_have_not_begun(run):
    control.enter_round(run, 1, OWN)
    run.round(1).mkdir()
    control.request(run, None, {"mine.budget": 20})
    control.enter_round(run, 1, OWN)  # again, after a kill
    assert control.recorded(run) == {}
    control.enter_round(run, 2, OWN)
    run.round(2).mkdir()
    control.request(run, None, {"mine.budget": 30})
    control.enter_round(run, 2, OWN)
    control.enter_round(run, 3, OWN)
    assert control.recorded(run) == {2: {"mine.budget": 20}, 3: {"mine.budget": 30}}
    assert control.notes(run) == [
        "round 2 was made with mine.budget 20, set by hand",
        "round 3 was made with mine.budget 30, set by hand",
    ]


def test_a_round_that_was_entered_and_not_begun_may_still_change_its_mind(run):
    control.request(run, None, {"mine.budget": 20})
    control.enter_round(run, 1, OWN)
    control.request(run, None, {"mine.budget": 64})
    control.enter_round(run, 1, OWN)
    assert control.recorded(run) == {}


def test_what_may_not_change_does_not_even_where_the_file_says_so(run):
    (run.root / control.CONTROL).write_text(
        json.dumps({"settings": {"seed": 7, "mine.budget": 20}})
    )
    control.enter_round(run, 1, OWN)
    assert control.recorded(run) == {1: {"mine.budget": 20}}


def test_ids_of_rounds_differ_from_a_changed_round_on(run):
    control.request(run, None, {"mine.budget": 20})
    run.round(1).mkdir()
    control.enter_round(run, 2, OWN)
    assert control.run_id("name", run, 1) == "name"
    assert control.run_id("name", run, 2) == control.run_id("name", run, 3) != "name"


def test_what_is_asked_while_one_waits_for_the_lock_is_heard(run, quick):
    """Only what was asked before it came is of the past."""
    control.request(run, control.STOP)
    with hold(run) as handle:
        handle.poll(force=True)
    # Left by one that died elsewhere.
    files.write_json(handle.lock.path, {**asdict(handle.lock.record), "machine": "far"})
    threading.Timer(0.4, control.request, (run, control.STOP)).start()
    with hold(run) as handle, pytest.raises(Stop):
        handle.poll(force=True)


# ---- a folder that goes away ---------------------------------------------------------------------


@pytest.mark.parametrize("at", ["a poll", "a write", "a beat", "the clock"])
def test_a_run_whose_storage_vanishes_ends_and_leaves_the_empty_mount_point_alone(
    run, quick, monkeypatch, at
):
    """As `umount -l` leaves it: an empty folder where the run was."""
    monkeypatch.setattr(run_lock, "TIMING", TIMING)

    def work(handle):
        run.root.rename(run.root.with_name("elsewhere"))
        run.root.mkdir()
        if at == "a poll":
            handle.poll(force=True)
        elif at == "a write":
            raise FileNotFoundError(run.root / "denoiser")
        elif at == "the clock":
            clock.tick()
            handle.check()
        else:
            time.sleep(30)

    clock = status.Clock(run)
    with pytest.raises(RunLockLost, match="run.json is gone.*; put it back") as told:
        run_hold.hold("loop", run, work, lambda: "finished", lambda text: None)
    assert "\n" not in str(told.value) and str(run.root) in str(told.value)
    assert list(run.root.iterdir()) == []


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_a_command_leaves_the_run_stopped(run, number):
    found = signal.signal(number, signal.SIG_DFL)  # the tests may be run by nohup

    def work(handle):
        os.kill(os.getpid(), number)
        time.sleep(10)

    try:
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            run_hold.hold("loop", run, work, lambda: "finished", lambda text: None)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, found)
    assert status.state_of(run)[0] == "stopped"


def test_under_nohup_a_closed_terminal_ends_nothing(run):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run_hold.hold(
            "loop",
            run,
            lambda handle: os.kill(os.getpid(), signal.SIGHUP),
            lambda: "finished",
            lambda text: None,
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert status.state_of(run)[0] == "finished"
