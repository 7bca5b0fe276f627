"""The scheduling of workers, on simulated ones in simulated time: slow, dying, late, poisoned. No
Ray, no process.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from adversa.engine import worker_pool
from adversa.engine.task_queue import TaskQueue
from adversa.engine.tasks import Failed, Part, row_name
from adversa.engine.worker import Failure, Returned
from adversa.engine.worker_pool import Lost, WorkerPool
from adversa.run import control
from adversa.types import UserError


class World:
    """A Backend whose workers take `seconds(number, part)` for a part, in a time that passes only
    in `wait`.

    room(t): how many workers there is room for. dies: {number: when}. work(number, part): raises
    what is to happen, Lost kills the worker. latency: seconds between an answer and the next call
    on a worker that has no other.
    """

    def __init__(
        self,
        seconds=lambda number, part: 1.0,
        room=lambda t: 99,
        dies=(),
        work=lambda number, part: None,
        load=2.0,
    ):
        self.seconds, self.room, self.dies, self.work, self.load_seconds = (
            seconds,
            room,
            dict(dies),
            work,
            load,
        )
        self.now, self.numbers, self.calls = 0.0, itertools.count(), itertools.count()
        self.free: dict[
            int, float
        ] = {}  # workers that are placed: when they have done what they were asked
        self.pending: dict[int, tuple[int, int]] = {}  # call to place -> (worker, call)
        self.events: dict[
            int, tuple[float, object]
        ] = {}  # call -> when it is answered, and with what
        self.dead: set[int] = set()
        self.stopped: list[int] = []
        self.log: list[tuple[int, int, float]] = []  # (worker, part, when committed)
        self.leases: list[tuple[int, int]] = []  # (worker, parts in the call)

    def start(self):
        return next(self.numbers)

    def place(self, worker):
        call = next(self.calls)
        self.pending[worker] = (worker, call)
        self._placed()
        return call

    def _placed(self):
        for worker, (_, call) in list(self.pending.items()):
            if sum(w not in self.dead for w in self.free) < self.room(self.now):
                del self.pending[worker]
                self.free[worker] = self.now
                self.events[call] = (self.now, "machine")

    def load(self, worker, place):
        return self._busy(worker, self.load_seconds, None)

    def do(self, worker, tasks):
        self.leases.append((worker, len(tasks)))
        begin, spent, failures = max(self.now, self.free[worker]), 0.0, []
        for i, task in enumerate(tasks):
            spent += self.seconds(worker, task.part)
            try:
                if begin + spent > self.dies.get(worker, 1e9):
                    raise Lost(f"worker {worker} died")
                self.work(worker, task.part)
            except Lost as e:
                self.dies[worker] = min(self.dies.get(worker, 1e9), begin + spent)
                return self._busy(worker, spent, e)
            except UserError as e:
                return self._busy(worker, spent, e)
            except Exception as e:
                raised = {r: str(e) for r in task.part.wanted if self._raises(worker, task.part, r)}
                left_out = len(raised) < len(task.part.wanted)
                failures.append(Failure(i, str(e), "", raised, left_out))
                if not left_out:
                    continue
            if not task.trial:
                self.log.append((worker, task.part.index, begin + spent))
        return self._busy(worker, spent, Returned(spent, 10 * len(tasks), tuple(failures)))

    def _raises(self, worker, part, row):
        try:
            self.work(worker, part.only([row]))
        except ValueError:
            return True
        return False

    def _busy(self, worker, seconds, answer):
        call = next(self.calls)
        at = max(self.now, self.free[worker]) + seconds
        if at > self.dies.get(worker, 1e9) and not isinstance(answer, Lost):
            at, answer = max(self.now, self.dies[worker]), Lost(f"worker {worker} died")
        self.free[worker] = at
        self.events[call] = (at, answer)
        return call

    def wait(self, calls, seconds):
        known = [self.events[c][0] for c in calls if c in self.events]
        self.now = max(self.now, min([self.now + seconds, *known]))
        self._placed()
        return [c for c in calls if c in self.events and self.events[c][0] <= self.now]

    def answer(self, call):
        _, found = self.events.pop(call)
        if isinstance(found, Exception):
            raise found
        return found

    def stop(self, worker):
        self.stopped.append(worker)
        self.dead.add(worker)
        self.pending.pop(worker, None)

    def committed(self, part):
        return any(index == part.index and at <= self.now for _, index, at in self.log)


def parts_of(n, rows=4):
    return [Part(i, rows) for i in range(n)]


def go(world, parts, size=lambda: 4, attempts=3, tell=lambda state: None):
    c = WorkerPool(
        world,
        TaskQueue(parts, sum(p.rows for p in parts), attempts, row_name),
        size,
        world.committed,
        lambda: world.now,
    )
    shares = c.run(tell)
    assert sorted(world.stopped) == list(range(next(world.numbers)))  # nothing is left running
    return shares


def committed(world):
    return Counter(index for _, index, _ in world.log)


def test_every_part_is_done_once_and_the_shares_add_up():
    world = World()
    shares = go(world, parts_of(100))
    assert committed(world) == dict.fromkeys(range(100), 1)
    assert (
        sum(s.parts for s in shares),
        sum(s.rows for s in shares),
        sum(s.seconds for s in shares),
    ) == (100, 400, 100.0)
    assert sum(s.evaluations for s in shares) == 1000 and len(shares) == 4
    assert world.now == pytest.approx(2 + 25)


def test_a_pause_brings_home_what_is_out_and_hands_out_nothing_more():
    world, told = World(seconds=lambda number, part: 10.0), []

    def tell(state):
        told.append(world.now)
        if world.now > 5:
            raise control.Pause

    with pytest.raises(control.Pause):
        go(world, parts_of(100), tell=tell)
    out = sum(parts for _, parts in world.leases)
    assert (
        sorted(committed(world).values()) == [1] * out and out <= 8
    )  # of four workers two leases each, of one part
    assert len(world.stopped) == 4 and world.now >= 10


def test_a_worker_that_dies_while_it_is_brought_home_keeps_nobody_waiting():
    world = World(seconds=lambda number, part: 10.0, dies={0: 7.0})

    def tell(state):
        if world.now > 5:
            raise control.Pause

    with pytest.raises(control.Pause):
        go(world, parts_of(100), tell=tell)
    assert {worker for worker, _, at in world.log if at <= world.now} == {1, 2, 3}


def test_nothing_to_do_starts_nobody():
    world = World()
    assert go(world, []) == [] and next(world.numbers) == 1


def test_no_more_workers_than_parts():
    world = World()
    go(world, parts_of(2), size=lambda: 64)
    assert len(world.stopped) == 2


def test_short_parts_are_handed_out_together_and_the_last_one_by_one():
    world = World(seconds=lambda number, part: 0.01)
    go(world, parts_of(10_000), size=lambda: 8)
    sizes = [n for _, n in world.leases]
    assert max(sizes) == 100 and sizes[-8:] == [1] * 8 and len(sizes) < 400
    assert world.now - 2 < 1.01 * 10_000 * 0.01 / 8


def test_long_parts_are_handed_out_when_a_worker_is_free_for_them():
    world = World(seconds=lambda number, part: 30.0)
    go(world, parts_of(9))
    assert [n for _, n in world.leases] == [1] * 9
    assert world.now == 2 + 90  # the ninth did not wait behind another worker's


def test_at_most_two_calls_are_open_with_a_worker():
    world, open_calls = World(seconds=lambda number, part: 0.05), []
    do = world.do

    def counting(worker, tasks):
        call = do(worker, tasks)
        open_calls.append(
            sum(m.worker == worker for m, lease in running.calls.values() if lease) + 1
        )
        return call

    world.do = counting
    running = WorkerPool(
        world,
        TaskQueue(parts_of(500), 2000, 3, row_name),
        lambda: 3,
        world.committed,
        lambda: world.now,
    )
    running.run(lambda state: None)
    assert max(open_calls) == 2 and open_calls.count(2) > 10


def test_a_fast_worker_does_more_and_both_end_together():
    world = World(seconds=lambda number, part: (0.02, 0.2)[number])
    shares = go(world, parts_of(2000), size=lambda: 2)
    fast, slow = (s.parts for s in shares)
    assert fast / slow == pytest.approx(10, rel=0.15)
    ends = [max(at for worker, _, at in world.log if worker == w) for w in (0, 1)]
    assert abs(ends[0] - ends[1]) < 0.45


def test_a_dead_worker_is_replaced_and_loses_only_what_it_had_not_committed():
    world = World(seconds=lambda number, part: 0.1, dies={1: 10.05})
    shares = go(world, parts_of(1000), size=lambda: 2)
    assert committed(world) == dict.fromkeys(range(1000), 1)
    assert sum(s.rows for s in shares) == 4000 and len(world.stopped) == 3


def test_the_part_a_worker_was_at_is_charged_and_no_other():
    charged = []

    class Noting(TaskQueue):
        def failed(self, task, worker, reason, trace=""):
            charged.append(task.part.index)
            super().failed(task, worker, reason, trace)

    def work(number, part):
        if part.index == 333 and not charged:
            raise Lost("worker died")

    world = World(seconds=lambda number, part: 0.01, work=work)
    WorkerPool(
        world,
        Noting(parts_of(1000), 4000, 3, row_name),
        lambda: 2,
        world.committed,
        lambda: world.now,
    ).run(lambda s: None)
    assert charged == [333] and committed(world) == dict.fromkeys(range(1000), 1)


def test_a_worker_killed_every_five_seconds_costs_time_only():
    world = World(
        seconds=lambda number, part: 1.0, dies={n: 7 + 5 * n for n in range(200)}, load=1.0
    )
    shares = go(world, parts_of(125, rows=16))
    assert committed(world) == dict.fromkeys(range(125), 1) and not [
        f for s in shares for f in s.failed
    ]
    assert len(world.stopped) >= 9  # of them four at the end


@pytest.mark.parametrize("fault", [ValueError, Lost])
def test_a_poisonous_row_is_left_out_and_everything_else_done(fault):
    def work(number, part):
        if part.index == 17 and 5 not in part.skip:
            raise fault("row 5 is poison")

    world, states = World(work=work, seconds=lambda number, part: 0.5), []
    shares = go(world, parts_of(60, rows=8), tell=states.append)
    assert committed(world) == dict.fromkeys(range(60), 1)
    assert [f for s in shares for f in s.failed] == [Failed("row 5 of part 17", "row 5 is poison")]
    assert (
        states[-1]["failed"] == 1
        and states[-1]["last_failed"] == "row 5 of part 17: row 5 is poison"
    )


def test_a_worker_on_which_everything_fails_stops_nobody():
    def work(number, part):
        if number == 2:
            raise ValueError("CUDA error: uncorrectable ECC error")

    world = World(work=work)
    shares = go(world, parts_of(200))
    assert committed(world) == dict.fromkeys(range(200), 1) and not [
        f for s in shares for f in s.failed
    ]


def test_what_the_user_can_mend_ends_the_step_at_once():
    def work(number, part):
        if part.index == 30:
            raise UserError("sigma is out of range; take less")

    world = World(work=work)
    with pytest.raises(UserError, match="^sigma is out of range; take less$"):
        go(world, parts_of(100))
    assert max(committed(world)) < 40 and world.stopped == [0, 1, 2, 3]


def test_a_broken_model_ends_the_step_early():
    def work(number, part):
        raise Lost("segmentation fault")

    world = World(work=work)
    with pytest.raises(RuntimeError, match="nothing else succeeded .* segmentation fault"):
        go(world, parts_of(10_000))
    assert len(world.leases) < 40


def test_workers_without_room_join_when_there_is():
    world = World(room=lambda t: 1 if t < 20 else 4)
    shares = go(world, parts_of(100))
    first = {worker: min(at for w, _, at in world.log if w == worker) for worker, _, _ in world.log}
    assert first[0] == 3 and all(20 < first[w] <= 24 for w in (1, 2, 3))
    assert [s.parts for s in shares][0] > 20 and world.now < 50


def test_new_nodes_get_new_workers_and_a_lost_one_takes_none_along():
    """Two at first, six from t = 30; the first two die with their node at t = 60, and there is no
    room for others.
    """
    world = World(room=lambda t: 2 if t < 30 else 6 if t < 60 else 4, dies={0: 60.5, 1: 60.5})
    states = []
    go(
        world,
        parts_of(400),
        size=lambda: world.room(world.now),
        tell=lambda s: states.append((world.now, s["workers"])),
    )
    assert committed(world) == dict.fromkeys(range(400), 1)
    assert (
        max(n for t, n in states if t < 30) == 2
        and max(n for t, n in states if t < 60) == 6
        and states[-2][1] == 4
    )
    assert world.now < 110  # the first two alone would take 202


def test_fewer_that_are_wanted_give_up_their_place_in_the_queue():
    wanted = iter([4, 2])
    world = World(room=lambda t: 2)
    last = [4]

    def size():
        last[0] = next(wanted, last[0])
        return last[0]

    go(world, parts_of(60), size=size)
    assert sorted(world.stopped[:2]) == [2, 3] and len(world.stopped) == 4


def test_where_none_finds_room_that_is_said():
    world, notes = World(room=lambda t: 0 if t < 50 else 1), {}
    go(world, parts_of(3), tell=lambda s: notes.setdefault(s.get("note", "")[:24], world.now))
    assert notes[""] == 0 and 30 < notes["no room for a worker for "[:24]] < 33


def test_a_worker_that_dies_while_it_loads_charges_no_part_and_comes_again():
    world = World(dies={0: 1.0, 1: 4.0})
    go(world, parts_of(20), size=lambda: 1)
    assert committed(world) == dict.fromkeys(range(20), 1) and len(world.stopped) == 3


def test_where_none_comes_up_the_step_ends():
    world = World(dies={n: 0.0 for n in range(99)})
    with pytest.raises(
        RuntimeError,
        match="no worker comes up, each died 5 times while it started; the last: worker . died",
    ):
        go(world, parts_of(20), size=lambda: 2)
    assert len(world.stopped) <= 10 and world.now < 15


def test_workers_that_are_killed_while_they_start_are_replaced_for_longer_once_one_was_up():
    world = World(dies={0: 6.0} | {n: 0.0 for n in range(1, 12)})
    go(world, parts_of(20), size=lambda: 1)
    assert committed(world) == dict.fromkeys(range(20), 1) and len(world.stopped) == 13
    world = World(dies={0: 6.0} | {n: 0.0 for n in range(1, 99)})
    with pytest.raises(RuntimeError, match="each died 20 times while it started"):
        go(world, parts_of(20), size=lambda: 1)


def test_one_that_never_comes_up_does_not_stop_the_others():
    world = World(dies={n: 0.0 for n in range(1, 99)})
    go(world, parts_of(100), size=lambda: 2)
    assert committed(world) == dict.fromkeys(range(100), 1)
    assert len(world.stopped) < 12  # it rests longer and longer in between


def test_progress_has_rates_and_shares():
    world, states = World(seconds=lambda number, part: 0.5), []
    go(world, parts_of(400), tell=states.append)
    assert (
        states[0]["rows"] == 0 and states[0]["workers"] == 0 and states[0]["images_per_second"] == 0
    )
    middle = states[len(states) // 2]
    assert middle["images_per_second"] == pytest.approx(4 * 4 / 0.5, rel=0.1)
    assert (
        middle["evaluations_per_second"] == pytest.approx(4 * 10 / 0.5, rel=0.1)
        and middle["workers"] == 4
    )
    assert sum(middle["shares"].values()) == middle["rows"] and set(middle["shares"]) == {
        0,
        1,
        2,
        3,
    }
    assert states[-1]["rows"] == 1600 and states[-1]["evaluations"] == 4000
    assert [s["rows"] for s in states] == sorted(s["rows"] for s in states)


def test_rates_are_of_the_last_half_minute():
    """Ten times as fast from t = 100 on."""
    world, states = World(seconds=lambda number, part: 1.0 if world.now < 100 else 0.1), []
    go(
        world,
        parts_of(2000),
        size=lambda: 1,
        tell=lambda s: states.append((world.now, s["images_per_second"])),
    )
    assert dict(states)[max(t for t, _ in states if t < 100)] == pytest.approx(4, rel=0.1)
    assert dict(states)[max(t for t, _ in states if t < 150)] == pytest.approx(40, rel=0.1)


def test_a_cut_stops_every_worker():
    class Cut(BaseException):
        pass

    world, wait = World(), World.wait

    def cut(calls, seconds):
        if world.now > 5:
            raise Cut
        return wait(world, calls, seconds)

    world.wait = cut
    with pytest.raises(Cut):
        go(world, parts_of(100))
    assert world.stopped == [0, 1, 2, 3]


def test_what_the_driver_keeps_does_not_grow_with_the_parts_done():
    world = World(seconds=lambda number, part: 0.01)
    c = WorkerPool(
        world,
        TaskQueue(parts_of(20_000), 80_000, 3, row_name),
        lambda: 8,
        lambda part: False,
        lambda: world.now,
    )
    kept = []

    def tell(state):
        kept.append(
            (
                len(c.calls),
                sum(len(m.leases) for m in c.handles.values()),
                len(c.samples),
                len(c.queue.cases),
            )
        )

    c.run(tell)
    calls, leases, samples, cases = (max(column) for column in zip(*kept, strict=True))
    assert calls <= 16 and leases <= 16 and samples <= worker_pool.RATE_SECONDS + 2 and cases == 0
