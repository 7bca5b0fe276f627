"""Which parts of a step wait, which failed, and which of their rows are to blame: the bookkeeping
of `map_parts`. Ray-free.

Rows that raise are found by the worker, in the same call (worker.py): they are given up, and the
part is written without them. A part that kills its worker `attempts` times is searched from here:
each half of its rows is tried by itself, what fails is halved again, until single rows are left
that fail alone. A step where rows are given up too often is broken, and ends: see `TaskQueue`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NoReturn

from adversa.engine.tasks import Failed, Name, Part

SHARE = 0.01  # of all rows may be given up (one always may); with more the step ends
# times a row must fail by itself before it is blamed: a worker's death may have had another cause
ALONE = 2
BROKEN = 3  # parts that use up their tries while nothing at all succeeds: then it is not the rows
SEARCHES = 3  # of one part: where every row can be done by itself and all together cannot


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is asked: to commit a part; or, as a trial, only whether the rows that are not
    skipped can be done.
    """

    part: Part
    trial: bool = False


@dataclass
class FailedTask:
    """A part that failed: how often what is asked now has failed and how last, groups of rows to be
    tried, the rows to blame. raised: None where the worker died, else the rows that raised.
    """

    part: Part
    tries: int = 0
    reason: str = ""
    trace: str = ""
    raised: Mapping[int, str] | None = None
    searches: int = 0
    groups: list[tuple[int, ...]] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        if not self.groups:
            return Task(self.part.without(self.bad))
        return Task(self.part.only(self.groups[-1]), trial=True)

    def search(self) -> None:
        """Try the rows that are not to blame yet, half by half."""
        self.searches += 1
        self.halve(self.part.without(self.bad).wanted)

    def halve(self, rows: tuple[int, ...]) -> None:
        middle = (len(rows) + 1) // 2
        self.groups += [half for half in (rows[middle:], rows[:middle]) if half]


class StepBroken(RuntimeError):
    """Too much of a step fails: see TaskQueue."""


class TaskQueue:
    """Hands out parts, and is told what came of each.

    StepBroken ends a step that is broken: where parts fail and nothing succeeds, where all rows
    of a part fail, where more than a SHARE of all rows fail, and where a part fails though each of
    its rows can be done.
    """

    def __init__(self, parts: Sequence[Part], rows: int, attempts: int, name: Name) -> None:
        """parts: those to do; rows: of all parts of the step; attempts: tries of a part before it
        is searched.
        """
        self.queue = deque(parts)
        self.left = len(parts)  # not committed
        self.attempts, self.name = attempts, name
        self.allowed, self.rows = max(1, int(SHARE * rows)), rows
        self.cases: dict[int, FailedTask] = {}
        self.again: deque[tuple[FailedTask, int | None]] = (
            deque()
        )  # to be asked again, and the worker that failed
        self.parked: list[FailedTask] = []  # out of tries, and nothing has succeeded yet
        self.begun = False  # something has succeeded
        self.given_up: list[Failed] = []
        self.short: list[Part] = []  # committed without some of their rows

    @property
    def waiting(self) -> int:
        return len(self.queue)

    def take(self, worker: int, most: int, alone: bool) -> tuple[Task, ...]:
        """Tasks for a worker: one that failed elsewhere, by itself; else up to `most` fresh ones.

        alone: there is no other worker, so it gets what failed on itself too.
        """
        if not self.queue and not self.again:
            self._unpark()
        for i, (case, failed_on) in enumerate(self.again):
            if alone or failed_on != worker:
                del self.again[i]
                return (case.task,)
        return self.take_fresh(most)

    def take_fresh(self, most: int) -> tuple[Task, ...]:
        return tuple(Task(self.queue.popleft()) for _ in range(min(most, len(self.queue))))

    def give_back(self, tasks: Sequence[Task]) -> None:
        """Tasks that were not begun."""
        for task in reversed(tasks):
            if (case := self.cases.get(task.part.index)) is not None:
                self.again.appendleft((case, None))
            else:
                self.queue.appendleft(task.part)

    def succeeded(
        self, task: Task, raised: Mapping[int, str] = MappingProxyType({}), trace: str = ""
    ) -> tuple[Failed, ...]:
        """The rows that the part was committed without: those found here, and those that raised."""
        self.begun = True
        self._unpark()
        case = self.cases.get(task.part.index)
        if task.trial:
            assert case is not None, task
            case.groups.pop()
            self._ask(case)
            return ()
        self.left -= 1
        self.cases.pop(task.part.index, None)
        bad = (case.bad if case is not None else {}) | dict(raised)
        failed = tuple(Failed(self.name(task.part, r), why) for r, why in sorted(bad.items()))
        self.given_up += failed
        self.short += [task.part] if failed else []
        if raised:
            self._limit(FailedTask(task.part, reason=failed[-1].reason, trace=trace))
        return failed

    def failed(
        self,
        task: Task,
        worker: int,
        reason: str,
        trace: str = "",
        raised: Mapping[int, str] | None = None,
    ) -> None:
        """reason: one line; trace: where on the worker, if known; raised: as of FailedTask."""
        case = self.cases.setdefault(task.part.index, FailedTask(task.part))
        case.tries, case.reason, case.trace, case.raised = case.tries + 1, reason, trace, raised
        group = len(case.groups[-1]) if case.groups else 0  # 0: the part as a whole
        if case.tries < (self.attempts if group == 0 else ALONE if group == 1 else 1):
            self.again.append((case, worker))
        elif group == 0:
            self._out_of_tries(case)
        elif group == 1:
            self._blame(case, case.groups.pop()[0])
            self._ask(case)
        else:
            case.halve(case.groups.pop())
            self._ask(case)

    def _ask(self, case: FailedTask) -> None:
        case.tries = 0
        self.again.append((case, None))

    def _out_of_tries(self, case: FailedTask) -> None:
        if case.searches == SEARCHES or len(case.bad) == case.part.rows:
            self._stop_part(case, {})
        if self.begun:
            self._search(case)
            return
        self.parked.append(case)
        if len(self.parked) == BROKEN:
            numbers = _list([str(c.part.index) for c in self.parked])
            self._stop(
                case,
                f"parts {numbers} failed, nothing else succeeded (tries of each: {self.attempts})",
            )

    def _unpark(self) -> None:
        parked, self.parked = self.parked, []
        for case in parked:
            self._search(case)

    def _search(self, case: FailedTask) -> None:
        if case.part.rows == 1:  # it has been tried by itself already
            self._blame(case, 0)
        elif case.raised is not None:
            self._stop_part(case, case.raised)
        else:
            case.search()
        self._ask(case)

    def _blame(self, case: FailedTask, row: int) -> None:
        case.bad[row] = case.reason
        if len(case.bad) == case.part.rows > 1:
            self._stop_part(case, case.bad)
        self._limit(case)

    def _limit(self, case: FailedTask) -> None:
        failed = len(self.given_up) + sum(len(c.bad) for c in self.cases.values())
        if failed > self.allowed or failed == self.rows:  # names cost a look into a part each
            names = [f.name for f in self.given_up] + [
                self.name(c.part, r) for c in self.cases.values() for r in c.bad
            ]
            self._stop(
                case,
                f"{failed} of {self.rows} fail ({_list(names)}), more than the "
                f"{self.allowed} that may",
            )

    def _stop_part(self, case: FailedTask, raised: Mapping[int, str]) -> NoReturn:
        """raised: all rows that are left of the part, or none of them."""
        names = _list([self.name(case.part, row) for row in sorted({**case.bad, **raised})])
        if raised:
            self._stop(case, f"every row of part {case.part.index} fails ({names})")
        how = f"without {names} too" if names else "though each of its rows does not"
        self._stop(case, f"part {case.part.index} fails {how}")

    def _stop(self, case: FailedTask, what: str) -> NoReturn:
        error = StepBroken(f"{what}; the last time: {case.reason}")
        if case.trace:
            error.add_note(f"on the worker:\n{case.trace}")
        raise error


def _list(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
