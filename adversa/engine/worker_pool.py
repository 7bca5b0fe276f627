"""The workers of `map_parts`: kept at the number asked for, kept busy, replaced when they die. No
Ray: a Backend stands for it.

A worker gets several parts in one call when parts are short, so that a call takes about a second,
and its next call before it has ended this one. It commits each part itself; what comes back is a
sum. So the driver does the same work a second for any number of parts, and a worker that dies loses
the parts it had not committed: they are handed out again.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from adversa.engine.task_queue import StepBroken, Task, TaskQueue
from adversa.engine.tasks import Name, Part, Report, Share, missing, row_name
from adversa.engine.worker import Failure, Returned
from adversa.run import control
from adversa.storage import tables
from adversa.storage.path import StoragePath
from adversa.types import Json

LEASE_SECONDS = 1.0  # of work in a call
MOST = 1000  # parts in a call
LOOK_SECONDS = 5.0  # between two questions how many workers there should be
WAIT_SECONDS = 1.0  # for news, before the progress is told again
NO_ROOM_SECONDS = 30.0  # without any worker placed, before that is said
RATE_SECONDS = 30.0  # rates are over so long
# of a worker that dies each time while it starts; four times as many where one has come up: then
# somebody kills them
STARTS = 5


class Lost(Exception):
    """A worker died, or cannot be used any more; the message is one line, the trace a note."""


class Backend(Protocol):
    """Where workers (worker.Sampler) run."""

    def start(self) -> Any:
        """A new worker. It may take any time until there is room for it: it answers `place`
        then.
        """
        ...

    def place(self, worker: Any) -> Any: ...

    def load(self, worker: Any, place: int) -> Any: ...

    def do(self, worker: Any, tasks: Sequence[Task]) -> Any:
        """These three return at once, with what stands for the answer. A worker answers its calls
        in order.
        """
        ...

    def wait(self, calls: Sequence[Any], seconds: float) -> Sequence[Any]:
        """Those of the calls that are answered, in the order of `calls`; none, if none is after so
        many seconds.
        """
        ...

    def answer(self, call: Any) -> Any:
        """Of an answered call. Lost where the worker is; UserError of the work as itself."""
        ...

    def stop(self, worker: Any) -> None:
        """At once, whatever it does."""
        ...


@dataclass
class WorkerHandle:
    """A worker in its slot. machine: once there is room for it, place: its number there; up: takes
    leases; pace: seconds a part.
    """

    slot: int
    worker: Any
    machine: str | None = None
    place: int = -1
    up: bool = False
    pace: float | None = None
    leases: deque[tuple[Task, ...]] = field(default_factory=deque)


class WorkerPool:
    """size: how many workers there should be at this time; committed: whether a part's file is
    there.
    """

    def __init__(
        self,
        backend: Backend,
        queue: TaskQueue,
        size: Callable[[], int],
        committed: Callable[[Part], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend, self.queue, self.size = backend, queue, size
        self.committed, self.clock = committed, clock
        self.handles: dict[int, WorkerHandle] = {}
        self.calls: dict[
            Any, tuple[WorkerHandle, bool]
        ] = {}  # not answered, oldest first; and whether it is a lease
        self.shares: dict[int, Share] = {}  # by slot
        self.came_up = False  # any worker, ever
        self.failed_starts: dict[int, int] = {}  # of a slot, since it last had a worker that was up
        self.rest_until: dict[int, float] = {}
        self.wanted, self.look_at, self.placed_at = 1, float("-inf"), clock()
        self.pace: float | None = None
        self.samples: deque[tuple[float, int, int]] = deque()

    def run(self, tell: Callable[[Json], None]) -> list[Share]:
        """Until every part is committed. tell: is given `state()` after all news, and each
        WAIT_SECONDS without.

        Where it raises control.Pause, the parts that workers have are brought home before that is
        passed on.
        """
        try:
            while self.queue.left:
                self._staff()
                self._hand_out()
                tell(self.state())
                for call in self.backend.wait(list(self.calls), WAIT_SECONDS):
                    if call in self.calls:  # its worker may have been lost a moment ago
                        self._answered(call)
            tell(self.state())
        except control.Pause:
            self._bring_home()
            raise
        finally:
            for handle in self.handles.values():
                self.backend.stop(handle.worker)
        return [share for _, share in sorted(self.shares.items())]

    def unanswered(self) -> list[Part]:
        """The parts that workers were asked for and have not been heard of since."""
        leases = (lease for handle in self.handles.values() for lease in handle.leases)
        return [task.part for lease in leases for task in lease if not task.trial]

    def _bring_home(self) -> None:
        """Wait for the leases that are out; no more are handed out."""
        while any(handle.leases for handle in self.handles.values()):
            for call in self.backend.wait(list(self.calls), WAIT_SECONDS):
                if call in self.calls:
                    self._answered(call)

    # ---- how many workers ------------------------------------------------------------------------

    def _staff(self) -> None:
        now = self.clock()
        if now >= self.look_at:
            self.wanted, self.look_at = max(1, self.size()), now + LOOK_SECONDS
            self.failed_starts = {
                slot: n for slot, n in self.failed_starts.items() if slot < self.wanted
            }
        wanted = min(self.wanted, self.queue.left)
        resting = {slot for slot, until in self.rest_until.items() if until > now}
        while len(self.handles) + len(resting) < wanted:
            slot = next(i for i in itertools.count() if i not in self.handles and i not in resting)
            handle = self.handles[slot] = WorkerHandle(slot, self.backend.start())
            self.calls[self.backend.place(handle.worker)] = (handle, False)
        waiting = [m for m in self.handles.values() if m.machine is None]
        if len(waiting) < len(self.handles):
            self.placed_at = now
        for handle in waiting[
            : max(0, len(self.handles) - wanted)
        ]:  # fewer are wanted, and these found no room yet
            self._forget(handle)

    def _forget(self, handle: WorkerHandle) -> None:
        del self.handles[handle.slot]
        self.calls = {
            call: (m, lease) for call, (m, lease) in self.calls.items() if m is not handle
        }
        self.backend.stop(handle.worker)

    # ---- leases ----------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        up = [m for m in self.handles.values() if m.up]
        speeds = {m.slot: 1 / pace for m in up if (pace := m.pace or self.pace) is not None}
        speed = sum(speeds.values())
        for handle in up:
            if not handle.leases:
                self._lease(
                    handle,
                    self.queue.take(
                        handle.slot, self._count(handle, speeds, speed), alone=len(up) == 1
                    ),
                )
        for handle in up:  # a second lease, while there is plenty for all and the first is short
            if len(handle.leases) == 1 and self.queue.waiting > len(up) and self._is_short(handle):
                self._lease(handle, self.queue.take_fresh(self._count(handle, speeds, speed)))

    def _lease(self, handle: WorkerHandle, tasks: tuple[Task, ...]) -> None:
        if tasks:
            handle.leases.append(tasks)
            self.calls[self.backend.do(handle.worker, tasks)] = (handle, True)

    def _count(self, handle: WorkerHandle, speeds: dict[int, float], speed: float) -> int:
        """As many parts as take LEASE_SECONDS, but at most half the worker's share of what is left,
        by its speed.

        So leases shrink towards the end and the last are single parts: the workers end at about the
        same time.
        """
        if handle.slot not in speeds:
            return 1
        mine = speeds[handle.slot]
        return max(
            1, min(int(LEASE_SECONDS * mine), int(self.queue.waiting * mine / speed / 2), MOST)
        )

    def _is_short(self, handle: WorkerHandle) -> bool:
        pace = handle.pace or self.pace
        return pace is not None and pace * len(handle.leases[0]) <= 2 * LEASE_SECONDS

    # ---- answers ---------------------------------------------------------------------------------

    def _answered(self, call: Any) -> None:
        handle, lease = self.calls.pop(call)
        try:
            found = self.backend.answer(call)
        except Lost as e:
            self._lost(handle, e)
            return
        if lease:
            self._returned(handle, found)
        elif handle.machine is None:
            handle.machine = found
            taken = {m.place for m in self.handles.values() if m.machine == found}
            handle.place = next(i for i in range(len(self.handles) + 1) if i not in taken)
            self.calls[self.backend.load(handle.worker, handle.place)] = (handle, False)
        else:
            handle.up = self.came_up = True
            self.failed_starts.pop(handle.slot, None)

    def _returned(self, handle: WorkerHandle, found: Returned) -> None:
        tasks, stats = handle.leases[0], self.shares.setdefault(handle.slot, Share())
        stats.seconds += found.seconds
        stats.evaluations += found.evaluations
        failures = {f.position: f for f in found.failures}
        for i, task in enumerate(tasks):
            failure = failures.get(i)
            if failure is None or failure.committed:
                self._credit(stats, task, failure)
            else:
                self.queue.failed(task, handle.slot, failure.reason, failure.trace, failure.rows)
        handle.leases.popleft()
        if not failures and not tasks[0].trial:
            pace = max(found.seconds / len(tasks), 1e-6)
            handle.pace = pace if handle.pace is None else (handle.pace + pace) / 2
            self.pace = pace if self.pace is None else (self.pace + pace) / 2

    def _credit(self, stats: Share, task: Task, failure: Failure | None = None) -> None:
        found = (failure.rows, failure.trace) if failure is not None else ()
        failed = self.queue.succeeded(task, *found)
        if not task.trial:
            stats.parts += 1
            stats.rows += task.part.rows
            stats.failed += failed

    def _lost(self, handle: WorkerHandle, error: Lost) -> None:
        """The first part that it has not committed is the one it was at: that part is charged, the
        others were not begun.
        """
        self._forget(handle)
        if not handle.up:
            self._start_failed(handle.slot, error)
            return
        stats, charged, left = self.shares.setdefault(handle.slot, Share()), False, []
        for task in (task for tasks in handle.leases for task in tasks):
            if not task.trial and self.committed(task.part):
                self._credit(stats, task)
            elif charged:
                left.append(task)
            else:
                charged = True
                self.queue.failed(
                    task, handle.slot, str(error), "".join(getattr(error, "__notes__", []))
                )
        self.queue.give_back(left)

    def _start_failed(self, slot: int, error: Lost) -> None:
        """Tried again after a rest. An error where no worker is up, and every one that there was
        room for died too often.
        """
        failed = self.failed_starts[slot] = self.failed_starts.get(slot, 0) + 1
        self.rest_until[slot] = self.clock() + min(60.0, 2.0 ** (failed - 2))
        hopeful = any(
            m.up or (m.machine is not None and m.slot not in self.failed_starts)
            for m in self.handles.values()
        )
        most = STARTS * (4 if self.came_up else 1)
        if not hopeful and min(self.failed_starts.values()) >= most:
            raise RuntimeError(
                f"no worker comes up, each died {most} times while it started; the last: {error}"
            ) from error

    # ---- what is told ----------------------------------------------------------------------------

    def state(self) -> Json:
        """Of this call: rows, evaluations, both a second, workers that are up, rows by slot, how
        many rows were given up.
        """
        now, up = self.clock(), sum(m.up for m in self.handles.values())
        rows = sum(share.rows for share in self.shares.values())
        evaluations = sum(share.evaluations for share in self.shares.values())
        found: Json = {
            "rows": rows,
            "evaluations": evaluations,
            "workers": up,
            "failed": len(self.queue.given_up),
            "shares": {slot: share.rows for slot, share in sorted(self.shares.items())},
        }
        found |= self._rates(now, up, rows, evaluations)
        if self.queue.given_up:
            last = self.queue.given_up[-1]
            found["last_failed"] = f"{last.name}: {last.reason}"
        if now - self.placed_at > NO_ROOM_SECONDS:
            found["note"] = f"no room for a worker for {now - self.placed_at:.0f} s"
        return found

    def _rates(self, now: float, up: int, rows: int, evaluations: int) -> dict[str, float]:
        if up and (not self.samples or now - self.samples[-1][0] >= WAIT_SECONDS):
            self.samples.append((now, rows, evaluations))
            while now - self.samples[1 if len(self.samples) > 1 else 0][0] > RATE_SECONDS:
                self.samples.popleft()
        if not self.samples or now == self.samples[0][0]:
            return {"images_per_second": 0.0, "evaluations_per_second": 0.0}
        then, rows_then, evaluations_then = self.samples[0]
        return {
            "images_per_second": (rows - rows_then) / (now - then),
            "evaluations_per_second": (evaluations - evaluations_then) / (now - then),
        }


def work_off(
    backend: Backend,
    parts: Sequence[Part],
    out: StoragePath,
    report: Report,
    size: Callable[[], int],
    attempts: int,
    name: Name = row_name,
) -> list[Share]:
    """Do every missing part of a step with the workers of a backend.

    UserError of the work as itself; RuntimeError where no worker comes up; StepBroken where too
    much fails: then the parts that lack rows, or may, are removed, so that whoever mends the cause
    and begins again gets those rows.
    """
    todo, total = missing(parts, out), sum(p.rows for p in parts)
    before = total - sum(p.rows for p in todo)
    queue = TaskQueue(todo, total, attempts, name)

    def committed(part: Part) -> bool:
        return (out / tables.part_name(part.index)).exists()

    def tell(state: Json) -> None:
        report({"done": before + state.pop("rows"), "total": total, "unit": "image"} | state)

    pool = WorkerPool(backend, queue, size, committed)
    try:
        return pool.run(tell)
    except StepBroken:
        for part in [*queue.short, *pool.unanswered()]:
            (out / tables.part_name(part.index)).unlink(missing_ok=True)
        raise
