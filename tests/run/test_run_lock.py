"""Who may work on a run: two holders, one that died, one that slept; on the test's own clock, with
and without atomic writes.
"""

from __future__ import annotations

import heapq
import os
import signal
import subprocess
import sys
import time

import pytest

from adversa.run import create as run_create
from adversa.run import file_lock, run_lock
from adversa.run.run_lock import File, Lease, LeaseLost, Pulse, Record, Times
from adversa.types import UserError

TIMES = Times(beat=2.0, expiry=20.0, settle=5.0)


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
            if self.now + TIMES.beat < until:
                self.at(self.now + TIMES.beat, beat)

        self.at(self.now + TIMES.beat, beat)


class Memory:
    """A storage that can only read and write whole files, as an object store without conditions."""

    def __init__(self, atomic=False):
        self.record, self.atomic, self.broken = None, atomic, False

    def _works(self):
        if self.broken:
            raise OSError("no route to the storage")

    def read(self):
        self._works()
        return self.record

    def write(self, record):
        self._works()
        self.record = record

    def create(self, record):
        self._works()
        if not self.atomic:
            return None
        if self.record is None:
            self.record = record
            return True
        return False

    def remove(self):
        self.record = None


@pytest.fixture
def world():
    return World()


@pytest.fixture(params=["file", "atomic", "not atomic"])
def place(request, tmp_path):
    return (
        File(tmp_path / "lease.json")
        if request.param == "file"
        else Memory(request.param == "atomic")
    )


def holder(world, place, name):
    return Lease(place, "runs/x", name, "machine", TIMES, world.clock, world.sleep)


def test_a_second_one_is_refused_at_the_first_heartbeat_it_sees(world, place):
    a, b = holder(world, place, "a"), holder(world, place, "b")
    a.take()
    taken = world.now
    world.beats(a, 1000)
    with pytest.raises(
        UserError,
        match=rf"runs/x is being worked on by a-\w+ on {a.record.host} \(process {os.getpid()}\) "
        r"for [27] s",
    ):
        b.take()
    assert world.now <= taken + 2 * TIMES.beat
    a.check()


def test_one_that_died_is_followed_after_the_expiry_by_the_watchers_clock(world, place):
    a, b = holder(world, place, "a"), holder(world, place, "b")
    a.take()
    started, told = world.now, []
    b.take(tell=told.append)
    assert TIMES.expiry <= world.now - started <= TIMES.expiry + TIMES.settle + 2
    assert len(told) == 1 and "for 20 s" in told[0]
    b.check()
    with pytest.raises(LeaseLost, match=r"b-\w+ on .* has taken it over"):
        a.check()


def test_one_that_slept_finds_out_before_it_commits_and_stays_out(world, place):
    a, b = holder(world, place, "a"), holder(world, place, "b")
    a.take()
    b.take()
    for act in (a.check, a.renew, a.check):
        with pytest.raises(LeaseLost):
            act()
    a.release()
    b.check()
    assert place.read().owner == b.record.owner


def test_one_that_slept_and_was_not_followed_goes_on_and_is_seen(world, place):
    a, b = holder(world, place, "a"), holder(world, place, "b")
    a.take()
    world.at(world.now + 15, a.check)  # wakes up while b watches
    with pytest.raises(UserError, match="is being worked on by a-"):
        b.take()
    a.check()


@pytest.mark.parametrize("gap", [0.1, 4.9])
def test_of_two_that_claim_at_the_same_time_the_last_writer_wins(world, gap):
    """b has read that there is no lease, and writes its claim `gap` seconds after a has."""
    place = Memory()
    a, b = holder(world, place, "a"), holder(world, place, "b")
    world.at(gap, lambda: place.write(b._next()))
    with pytest.raises(UserError, match="is being worked on by b-"):
        a.take()
    assert place.read().owner == b.record.owner


def test_a_late_claim_is_seen_by_the_holder_before_the_claimant_begins(world):
    """The worst case: a claim written long after the look that allowed it, over a holder that is
    sure of itself.
    """
    place = Memory()
    a, b = holder(world, place, "a"), holder(world, place, "b")
    a.take()
    b.place.write(b._next())
    claimed = world.now
    world.sleep(TIMES.beat)
    with pytest.raises(LeaseLost):
        a.renew()
    assert world.now < claimed + TIMES.settle


def test_a_claim_that_the_holder_overwrites_is_taken_back(world):
    place = Memory()
    a, b = holder(world, place, "a"), holder(world, place, "b")
    a.take()
    world.at(TIMES.expiry + 7, lambda: place.write(a._next()))  # it had read just before b wrote
    with pytest.raises(UserError, match="is being worked on by a-"):
        b.take()
    a.check()


def test_released_is_free_at_once(world, place):
    a, b = holder(world, place, "a"), holder(world, place, "b")
    a.take()
    a.release()
    assert place.read() is None
    before = world.now
    b.take()
    assert world.now - before <= (TIMES.settle if place.create(b.record) is None else 0)


def test_one_of_this_machine_is_known_to_be_dead_by_the_lock(world, place):
    a, b = holder(world, place, "a"), holder(world, place, "b")
    a.take()
    before = world.now
    b.take(alone_here=True)
    assert world.now == before and place.read().owner == b.record.owner


def test_the_lock_says_nothing_of_another_machine(world, place):
    a, b = holder(world, place, "a"), holder(world, place, "b")
    a.record = run_lock.replace(a.record, machine="elsewhere")
    a.take()
    before = world.now
    b.take(alone_here=True)
    assert world.now - before >= TIMES.expiry


def test_a_storage_that_fails_for_long_ends_the_work_before_another_may_begin(world):
    place = Memory()
    a = holder(world, place, "a")
    a.take()
    place.broken, broken_at = True, world.now
    with pytest.raises(
        LeaseLost, match="could not be written for 1[0-9] s .no route to the storage"
    ):
        while True:
            world.sleep(TIMES.beat)
            a.renew()
    assert world.now - broken_at < TIMES.expiry


def test_a_storage_that_fails_once_is_forgiven(world):
    place = Memory()
    a = holder(world, place, "a")
    a.take()
    place.broken = True
    world.sleep(TIMES.beat)
    a.renew()
    place.broken = False
    world.sleep(TIMES.beat)
    a.renew()
    assert place.read().beat == a.record.beat


def test_a_lease_that_somebody_deleted_is_written_again(world, place):
    a = holder(world, place, "a")
    a.take()
    place.remove()
    a.renew()
    assert place.read().owner == a.record.owner


def test_a_pulse_knows_how_long_a_counter_stands_still(world):
    place = Memory()
    a, pulse = holder(world, place, "a"), Pulse(place, world.clock)
    a.take()
    pulse.look()
    world.sleep(7)
    pulse.look()
    assert pulse.still() == 7 and pulse.changes == 0
    a.renew()
    pulse.look()
    assert pulse.still() == 0 and pulse.changes == 1


def test_a_record_of_another_version_is_one_line(tmp_path):
    (tmp_path / "lease.json").write_text('{"holder": "somebody"}')
    with pytest.raises(UserError, match="is no lease that this version of adversa can read"):
        File(tmp_path / "lease.json").read()


def test_an_unreadable_record_is_none(tmp_path):
    (tmp_path / "lease.json").write_text("{")
    assert File(tmp_path / "lease.json").read() is None


def test_a_file_that_stays_unreadable_is_replaced_in_the_end(world, tmp_path):
    (tmp_path / "lease.json").write_text("{")
    a = holder(world, File(tmp_path / "lease.json"), "a")
    a.take()
    assert TIMES.expiry <= world.now <= TIMES.expiry + TIMES.settle + 1
    a.check()


def test_files_leave_nothing_behind(world, tmp_path):
    a, b = (holder(world, File(tmp_path / "lease.json"), name) for name in "ab")
    a.take()
    assert b.place.create(b.record) is False
    a.release()
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys, time
from pathlib import Path
from adversa.run.run_lock import File, Lease, LeaseLost, Times
held = Lease(File(Path(sys.argv[1])), "x", "sleeper", Times(0.1, 1.0, 0.3))
held.take()
print("held", flush=True)
try:
    while True:
        held.check()  # before a commit
        held.renew()
        time.sleep(0.1)
except LeaseLost as e:
    print(e, flush=True)
"""


def test_a_process_that_is_stopped_and_wakes_up_after_a_takeover_steps_back(tmp_path):
    path = tmp_path / "lease.json"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    ) as sleeper:
        try:
            assert sleeper.stdout.readline() == "held\n"
            other = Lease(File(path), "x", "other", Times(0.1, 1.0, 0.3))
            with pytest.raises(UserError, match="is being worked on by sleeper-"):
                other.take()
            os.kill(sleeper.pid, signal.SIGSTOP)
            other = Lease(File(path), "x", "other", Times(0.1, 1.0, 0.3))
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
    record = Record("loop-1", "gpu-3", "boot", 4711, "2026-01-01", 3, 12.4, "2026-01-01")
    assert record.line() == "loop-1 on gpu-3 (process 4711) for 12 s"


def test_one_that_slept_while_another_came_and_went_stays_out(world, place):
    a, b = holder(world, place, "a"), holder(world, place, "b")
    a.take()
    b.take()
    b.release()
    with pytest.raises(LeaseLost, match=r"it stood still for \d+ s, and its lease.json is gone"):
        a.check()
    assert place.read() is None


def test_a_lock_file_of_another_mount_is_another_machine(tmp_path, monkeypatch):
    run = run_create.open_run(tmp_path / "run", {}, "")
    assert run_lock.machine(run) == ""  # nobody here has held it
    with file_lock.lock(run):
        here = run_lock.machine(run)
    (tmp_path / "other").write_text("")
    monkeypatch.setattr(file_lock, "lock_file", lambda run: tmp_path / "other")
    assert here and run_lock.machine(run) not in ("", here)
