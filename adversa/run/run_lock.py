"""Who may work on a run: `lease.json` in its folder. Right for machines that share nothing but the
folder.

The holder raises a counter in the file every `beat` seconds. Whoever wants the run watches that
counter: it counts as given up when it stood still for `expiry` seconds of the watcher's own clock.
Two machines' clocks are never compared.

Where a storage can write a file only if there is none, that decides. Everywhere else a claim is
written, and read again `settle` seconds later: the last writer wins, and whoever reads another name
than its own steps back. A holder reads the file at every beat and before every commit, and `settle`
is longer than a beat: it has seen a claim before the claimant begins. So two never commit at the
same time as long as a write is seen by others within settle - beat seconds. A holder that slept
finds out at its next look.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn, Protocol

from adversa.run import file_lock
from adversa.run.environment import now
from adversa.run.folder import RunDir
from adversa.storage import path as storage_path
from adversa.storage.files import read_json, write_json
from adversa.types import UserError

LEASE = "lease.json"
LOOK_SECONDS = 0.5  # between two looks at somebody else's counter


class LeaseLost(UserError):
    """Somebody else works on the run now: nothing more may be written to it."""


@dataclass(frozen=True)
class Times:
    """Seconds. expiry: without a heartbeat, after which a lease counts as given up; settle: from a
    claim to its confirmation.
    """

    beat: float = 2.0
    expiry: float = 20.0
    settle: float = 5.0

    def __post_init__(self) -> None:
        assert self.beat * 2 < self.settle < self.expiry, self


TIMES = Times()
STORE_TIMES = Times(
    beat=4.0, expiry=40.0, settle=12.0
)  # on an object store: requests cost, and take their time


@dataclass(frozen=True)
class Record:
    """machine: until its next start; beat: the counter; taken, held: when, and for how many seconds
    of the holder's own clock.
    """

    owner: str
    host: str
    machine: str
    pid: int
    taken: str
    beat: int
    held: float
    heartbeat: str  # wall time, for people: nothing is decided by it

    def line(self) -> str:
        return f"{self.owner} on {self.host} (process {self.pid}) for {self.held:.0f} s"


class Place(Protocol):
    """Where the record lies. OSError where the storage fails."""

    def read(self) -> Record | None: ...

    def write(self, record: Record) -> None: ...

    def create(self, record: Record) -> bool | None:
        """Write it only where there is none, in one go: whether it was. None where the storage has
        no such thing.
        """
        ...

    def remove(self) -> None: ...


@dataclass(frozen=True)
class File:
    """A place on a file system that replaces a file in one go, or on an object store. The first may
    know hard links.
    """

    path: storage_path.Place

    def read(self) -> Record | None:
        found = read_json(self.path)
        try:
            return None if found is None else Record(**found)
        except TypeError:
            raise UserError(
                f"{self.path} is no lease that this version of adversa can read; use the "
                "version that wrote it"
            ) from None

    def write(self, record: Record) -> None:
        write_json(self.path, asdict(record))

    def create(self, record: Record) -> bool | None:
        if not isinstance(self.path, Path):
            return None  # pyarrow cannot ask a store to put an object only where there is none
        ready = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        write_json(ready, asdict(record))
        try:
            os.link(ready, self.path)  # with its content, or not at all
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return None
        finally:
            ready.unlink(missing_ok=True)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def place_of(run: RunDir) -> Place:
    return File(run.root / LEASE)


def times_of(run: RunDir) -> Times:
    return TIMES if isinstance(run.root, Path) else STORE_TIMES


def machine(run: RunDir) -> str:
    """The same for all processes that see the run's lock (`file_lock.lock_file`), until the
    machine's next start, and for no others'.
    """
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        name = f"{socket.gethostname()}-{uuid.getnode():x}"
    try:
        found = os.stat(
            file_lock.lock_file(run)
        )  # two containers of one machine may have a mount, or a temporary folder, each
    except FileNotFoundError:
        return ""  # nobody here has held the run
    return f"{name}-{found.st_dev:x}-{found.st_ino:x}"


def clock() -> float:
    """Seconds that pass while the machine sleeps too (Linux: time.monotonic stands still then)."""
    return (
        time.clock_gettime(time.CLOCK_BOOTTIME)
        if hasattr(time, "CLOCK_BOOTTIME")
        else time.monotonic()
    )


class InUse(UserError):
    """Somebody else works on the run. by: its lease."""

    def __init__(self, what: str, by: Record) -> None:
        super().__init__(
            f"{what} is being worked on by {by.line()}; `adversa stop` ends that, or use "
            "another --run-dir"
        )
        self.by = by


_pulses: dict[storage_path.Place, Pulse] = {}


def is_worked_on(run: RunDir) -> bool:
    """Whether a process of this machine holds the run, or one of another machine gives signs of
    life.

    For the latter the first call waits until it has seen one, some seconds at most.
    """
    if file_lock.is_locked(run):
        return True
    found, times = place_of(run).read(), times_of(run)
    if found is None or found.machine == machine(run):
        _pulses.pop(run.root, None)
        return False
    if run.root not in _pulses:
        _pulses[run.root] = Pulse(place_of(run))
        until = time.monotonic() + 2 * times.beat + 1
        while not _pulses[run.root].changes and time.monotonic() < until:
            _pulses[run.root].look()
            time.sleep(LOOK_SECONDS)
    pulse = _pulses[run.root]
    pulse.look()
    return pulse.changes > 0 and pulse.still() < times.expiry


class Lease:
    """One holder's side of it. what: the run, for messages; owner: a name for people, made unique;
    machine: as `machine` says.
    """

    def __init__(
        self,
        place: Place,
        what: str,
        owner: str,
        machine: str,
        times: Times = TIMES,
        clock: Callable[[], float] = clock,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.place, self.what, self.times, self.clock, self.sleep = place, what, times, clock, sleep
        name = f"{owner}-{uuid.uuid4().hex[:8]}"
        self.record = Record(name, socket.gethostname(), machine, os.getpid(), now(), 0, 0.0, now())
        self.since = self.renewed = clock()
        self.held = False
        self.lost: LeaseLost | None = None
        self.writing = threading.RLock()  # the thread that renews, and the one that works

    # ---- taking ----------------------------------------------------------------------------------

    def take(
        self, alone_here: bool = False, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        """UserError where somebody else works on the run.

        alone_here: the caller holds the run's lock on this machine, so that a lease of this machine
        has outlived its holder. tell: is given a line before a wait of `expiry` seconds.
        """
        started = self.clock()
        while True:
            found = self.place.read()
            if found is None:
                created = self.place.create(self._next())
                if (
                    created is False and self.clock() - started < self.times.expiry
                ):  # another was faster, or it is unreadable
                    self.sleep(LOOK_SECONDS)
                    continue
                if not created:
                    self._claim(None)
                self._hold()
                return
            if alone_here and found.machine == self.record.machine:
                self.place.write(self._next())
                self._hold()
                return
            if self._is_given_up(found, tell):
                self._claim(found)
                self._hold()
                return

    def _is_given_up(self, found: Record, tell: Callable[[str], None]) -> bool:
        """False where it was released while we watched."""
        tell(
            f"{self.what} was left by {found.line()}, or is still worked on: watching its "
            f"heartbeat for {self.times.expiry:.0f} s"
        )
        until = self.clock() + self.times.expiry
        while self.clock() < until:
            self.sleep(min(LOOK_SECONDS, self.times.beat / 2))
            again = self.place.read()
            if again is None:
                return False
            if _mark(again) != _mark(found):
                raise InUse(self.what, again)
        return True

    def _claim(self, seen: Record | None) -> None:
        again = self.place.read()
        if again is not None and _mark(again) != _mark(seen):
            raise InUse(self.what, again)
        self.place.write(self._next())
        self.sleep(self.times.settle)
        after = self.place.read()
        if after is None or after.owner != self.record.owner:
            raise (
                InUse(self.what, after)
                if after is not None
                else UserError(f"{self.what}: its {LEASE} was removed; try again")
            )

    def _hold(self) -> None:
        self.held, self.renewed = True, self.clock()

    def _next(self) -> Record:
        self.record = replace(
            self.record, beat=self.record.beat + 1, held=self.clock() - self.since, heartbeat=now()
        )
        return self.record

    # ---- holding ---------------------------------------------------------------------------------

    def renew(self) -> None:
        """To be called every `beat` seconds. LeaseLost where another has the run, or may think that
        this one has died.
        """
        with self.writing:
            self._still()
            started = self.clock()
            try:
                found = self.place.read()
                if found is not None and found.owner != self.record.owner:
                    self._lose(found)
                if (
                    found is None and started - self.renewed >= self.times.expiry
                ):  # another may have come, and gone, meanwhile
                    self._lose(
                        None,
                        f"it stood still for {started - self.renewed:.0f} s, and its "
                        f"{LEASE} is gone",
                    )
                if found is None and self.place.create(self._next()) is False:
                    self._lose(self.place.read())
                self.place.write(self._next())
                self.renewed = started
            except OSError as e:
                if started - self.renewed > self.times.expiry / 2:
                    self._lose(
                        None,
                        f"its {LEASE} could not be written for "
                        f"{started - self.renewed:.0f} s ({e})",
                    )

    def check(self) -> None:
        """To be called before every commit."""
        with self.writing:
            self._still()
            if (
                self.clock() - self.renewed > 2 * self.times.beat
            ):  # it slept, or was held up: somebody may be about to take over
                self.renew()
                return
            found = self.place.read()
            if found is not None and found.owner != self.record.owner:
                self._lose(found)

    def release(self) -> None:
        with self.writing:
            if self.held and self.lost is None:
                found = self.place.read()
                if found is not None and found.owner == self.record.owner:
                    self.place.remove()
            self.held = False

    def _still(self) -> None:
        if self.lost is not None:
            raise self.lost
        assert self.held, "a lease that was not taken"

    def _lose(self, by: Record | None, why: str = "") -> NoReturn:
        why = (
            f"{by.line()} has taken it over"
            if by is not None
            else why or f"its {LEASE} was removed"
        )
        self.lost = LeaseLost(f"{self.what}: {why}; this process has stopped working on it")
        raise self.lost


def _mark(record: Record | None) -> tuple[str, int] | None:
    return None if record is None else (record.owner, record.beat)


class Pulse:
    """What a reader has seen of a lease: for how long its counter has stood still, by the reader's
    own clock.
    """

    def __init__(self, place: Place, clock: Callable[[], float] = clock) -> None:
        self.place, self.clock = place, clock
        self.mark: tuple[str, int] | None = None
        self.since = clock()
        self.changes = 0

    def look(self) -> Record | None:
        found = self.place.read()
        if (mark := _mark(found)) != self.mark:
            self.changes += self.mark is not None and found is not None
            self.mark, self.since = mark, self.clock()
        return found

    def still(self) -> float:
        """Seconds without a change, as of the last look."""
        return self.clock() - self.since
