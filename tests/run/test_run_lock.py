"""Who may work on a run: two holders, one that died, one that slept; on the test's own clock and
a real folder.
"""

from __future__ import annotations

import heapq
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from adversa.run import create as run_create
from adversa.run import file_lock, run_lock
from adversa.run.folder import RunDir
from adversa.run.run_lock import LOCK, HeartbeatMonitor, Holder, RunLock, RunLockLost, Timing
from adversa.types import UserError

TIMING = Timing(heartbeat=2.0, expiry=20.0, settle=5.0)


class World:
    """Time that passes only in `sleep`, where what others do at that time happens."""

    def __init__(self):
        self.now, self.events, self.count = 0.0, [], 0

    def clock(self):
        return self.now

    def at(self, when, act):
        heapq.heappush(self.events, (when, self.count, act))
        self.count += 1

    def sleep(self, seconds):
        until = self.now + seconds
        while self.events and self.events[0][0] <= until:
            self.now, _, act = heapq.heappop(self.events)
            act()
        self.now = max(self.now, until)

    def beats(self, held, until):
        """A living holder."""

        def beat():
            held.renew()
            if self.now + TIMING.heartbeat < until:
                self.at(self.now + TIMING.heartbeat, beat)

        self.at(self.now + TIMING.heartbeat, beat)


@pytest.fixture
def world():
    return World()


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path)


def holder(world, run, name):
    return RunLock(run, name, TIMING, world.clock, world.sleep)


def break_storage(monkeypatch):
    """From now on the folder's storage can neither be read nor written."""

    def broken(*_):
        raise OSError("no route to the storage")

    monkeypatch.setattr(run_lock, "read_json", broken)
    monkeypatch.setattr(run_lock, "write_json", broken)


def test_a_second_one_is_refused_at_the_first_heartbeat_it_sees(world, run):
    a, b = holder(world, run, "a"), holder(world, run, "b")
    a.take()
    taken = world.now
    world.beats(a, 1000)
    with pytest.raises(
        UserError,
        match=rf"{run.root} is being worked on by a-\w+ on {a.record.host} "
        rf"\(process {os.getpid()}\) for [27] s",
    ):
        b.take()
    assert world.now <= taken + 2 * TIMING.heartbeat
    a.check()


def test_one_that_died_is_followed_after_the_expiry_by_the_watchers_clock(world, run):
    a, b = holder(world, run, "a"), holder(world, run, "b")
    a.take()
    started, told = world.now, []
    b.take(tell=told.append)
    assert TIMING.expiry <= world.now - started <= TIMING.expiry + TIMING.settle + 2
    assert len(told) == 1 and "for 20 s" in told[0]
    b.check()
    with pytest.raises(RunLockLost, match=r"b-\w+ on .* has taken it over"):
        a.check()


def test_one_that_slept_finds_out_before_it_commits_and_stays_out(world, run):
    a, b = holder(world, run, "a"), holder(world, run, "b")
    a.take()
    b.take()
    for act in (a.check, a.renew, a.check):
        with pytest.raises(RunLockLost):
            act()
    a.release()
    b.check()
    assert run_lock.holder(run).owner == b.record.owner


def test_one_that_slept_leaves_the_lock_of_its_successor_when_it_ends(world, run):
    a, b = holder(world, run, "a"), holder(world, run, "b")
    a.take()
    b.take()
    a.release()
    assert run_lock.holder(run).owner == b.record.owner


def test_one_that_slept_and_was_not_followed_goes_on_and_is_seen(world, run):
    a, b = holder(world, run, "a"), holder(world, run, "b")
    a.take()
    world.at(world.now + 15, a.check)  # wakes up while b watches
    with pytest.raises(UserError, match="is being worked on by a-"):
        b.take()
    a.check()


def test_of_many_that_start_at_the_same_time_one_has_the_run(run):
    locks, together = [RunLock(run, f"n{i}", TIMING) for i in range(8)], threading.Barrier(8)

    def start(lock):
        together.wait()
        return lock._create()

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(start, locks))
    assert sum(made) == 1
    assert run_lock.holder(run).owner == locks[made.index(True)].record.owner


def test_one_whose_answer_to_the_creation_was_lost_has_the_run(world, run):
    a = holder(world, run, "a")
    a._create()
    a.take()
    assert world.now == 0
    a.check()


@pytest.mark.parametrize("gap", [0.1, 4.9])
def test_of_two_that_take_over_at_the_same_time_the_last_writer_wins(world, run, gap):
    """b has seen the same dead holder, and writes its claim `gap` seconds after a has."""
    dead, a, b = (holder(world, run, name) for name in ("dead", "a", "b"))
    dead.take()
    world.at(TIMING.expiry + gap, b._write)
    with pytest.raises(UserError, match="is being worked on by b-"):
        a.take()
    assert run_lock.holder(run).owner == b.record.owner


def test_a_late_claim_is_seen_by_the_holder_before_the_claimant_begins(world, run):
    """The worst case: a claim written long after the look that allowed it, over a holder that is
    sure of itself.
    """
    a, b = holder(world, run, "a"), holder(world, run, "b")
    a.take()
    b._write()
    claimed = world.now
    world.sleep(TIMING.heartbeat)
    with pytest.raises(RunLockLost):
        a.renew()
    assert world.now < claimed + TIMING.settle


def test_a_claim_that_the_holder_overwrites_is_taken_back(world, run):
    a, b = holder(world, run, "a"), holder(world, run, "b")
    a.take()
    world.at(TIMING.expiry + 2, a._write)  # it had read just before b wrote
    with pytest.raises(UserError, match="is being worked on by a-"):
        b.take()
    a.check()


def test_released_is_free_at_once(world, run):
    a, b = holder(world, run, "a"), holder(world, run, "b")
    a.take()
    a.release()
    assert run_lock.holder(run) is None
    before = world.now
    b.take()
    assert world.now == before


def test_one_of_this_machine_is_known_to_be_dead_by_the_lock(world, run):
    a, b = holder(world, run, "a"), holder(world, run, "b")
    a.take()
    before = world.now
    b.take(alone_here=True)
    assert world.now == before and run_lock.holder(run).owner == b.record.owner


def test_the_lock_says_nothing_of_another_machine(world, run):
    a, b = holder(world, run, "a"), holder(world, run, "b")
    a.record = run_lock.replace(a.record, machine="elsewhere")
    a.take()
    before = world.now
    b.take(alone_here=True)
    assert world.now - before >= TIMING.expiry


def test_a_storage_that_fails_for_long_ends_the_work_before_another_may_begin(
    world, run, monkeypatch
):
    a = holder(world, run, "a")
    a.take()
    break_storage(monkeypatch)
    broken_at = world.now
    with pytest.raises(
        RunLockLost, match="could not be written for 1[0-9] s .no route to the storage"
    ):
        while True:
            world.sleep(TIMING.heartbeat)
            a.renew()
    assert world.now - broken_at < TIMING.expiry


def test_a_storage_that_fails_once_is_forgiven(world, run, monkeypatch):
    a = holder(world, run, "a")
    a.take()
    with monkeypatch.context() as patch:
        break_storage(patch)
        world.sleep(TIMING.heartbeat)
        a.renew()
    world.sleep(TIMING.heartbeat)
    a.renew()
    assert run_lock.holder(run).beat == a.record.beat


def test_a_lock_that_somebody_deleted_is_written_again(world, run):
    a = holder(world, run, "a")
    a.take()
    a.path.unlink()
    a.renew()
    assert run_lock.holder(run).owner == a.record.owner


def test_a_watch_knows_how_long_a_counter_stands_still(world, run):
    a, watch = holder(world, run, "a"), HeartbeatMonitor(run, world.clock)
    a.take()
    watch.look()
    world.sleep(7)
    watch.look()
    assert watch.still() == 7 and watch.changes == 0
    a.renew()
    watch.look()
    assert watch.still() == 0 and watch.changes == 1


def test_a_record_of_another_version_is_one_line(run):
    (run.root / LOCK).write_text('{"holder": "somebody"}')
    with pytest.raises(UserError, match="is no lock that this version of adversa can read"):
        run_lock.holder(run)


def test_an_unreadable_record_is_none(run):
    (run.root / LOCK).write_text("{")
    assert run_lock.holder(run) is None


def test_a_file_that_stays_unreadable_is_replaced_in_the_end(world, run):
    (run.root / LOCK).write_text("{")
    a = holder(world, run, "a")
    a.take()
    assert TIMING.expiry <= world.now <= TIMING.expiry + TIMING.settle + 1
    a.check()


def test_files_leave_nothing_behind(world, run):
    a, b = (holder(world, run, name) for name in "ab")
    a.take()
    assert not b._create()
    a.release()
    assert list(run.root.iterdir()) == []


HOLD = """
import sys, time
from pathlib import Path
from adversa.run.folder import RunDir
from adversa.run.run_lock import RunLock, RunLockLost, Timing
held = RunLock(RunDir(Path(sys.argv[1])), "sleeper", Timing(0.1, 1.0, 0.3))
held.take()
print("held", flush=True)
try:
    while True:
        held.check()  # before a commit
        held.renew()
        time.sleep(0.1)
except RunLockLost as e:
    print(e, flush=True)
"""


def test_a_process_that_is_stopped_and_wakes_up_after_a_takeover_steps_back(run):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.root)], stdout=subprocess.PIPE, text=True
    ) as sleeper:
        try:
            assert sleeper.stdout.readline() == "held\n"
            other = RunLock(run, "other", Timing(0.1, 1.0, 0.3))
            with pytest.raises(UserError, match="is being worked on by sleeper-"):
                other.take()
            os.kill(sleeper.pid, signal.SIGSTOP)
            other = RunLock(run, "other", Timing(0.1, 1.0, 0.3))
            other.take()
            os.kill(sleeper.pid, signal.SIGCONT)
            deadline = time.monotonic() + 20
            while sleeper.poll() is None and time.monotonic() < deadline:
                other.renew()
                time.sleep(0.1)
            assert "has taken it over; this process has stopped" in sleeper.stdout.read()
            other.check()
        finally:
            sleeper.kill()


def test_a_record_has_all_that_people_ask_for():
    record = Holder("loop-1", "gpu-3", "boot", 4711, 3, 12.4)
    assert record.line() == "loop-1 on gpu-3 (process 4711) for 12 s"


def test_one_that_slept_while_another_came_and_went_stays_out(world, run):
    a, b = holder(world, run, "a"), holder(world, run, "b")
    a.take()
    b.take()
    b.release()
    with pytest.raises(RunLockLost, match=r"it stood still for \d+ s, and its lock.json is gone"):
        a.check()
    assert run_lock.holder(run) is None


def test_a_lock_file_of_another_mount_is_another_machine(tmp_path, monkeypatch):
    run = run_create.open_run(tmp_path / "run", {}, "")
    assert run_lock.machine(run) == ""  # nobody here has held it
    with file_lock.lock(run):
        here = run_lock.machine(run)
    (tmp_path / "other").write_text("")
    monkeypatch.setattr(file_lock, "lock_file", lambda run: tmp_path / "other")
    assert here and run_lock.machine(run) not in ("", here)
