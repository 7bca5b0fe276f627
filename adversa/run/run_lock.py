"""Who may work on a run: `lock.json` in its folder. Right for machines that share nothing but the
folder.

The file is made only where there is none, in one go. Its holder raises a counter in it with every
heartbeat. Whoever wants the run watches that counter: the run counts as abandoned when it stood
still for `expiry` seconds of the watcher's own clock. Two machines' clocks are never compared.

An abandoned run is taken over by writing the file, and reading it again `settle` seconds later: the
last writer wins, and whoever reads another name than its own steps back. A holder reads the file at
every heartbeat and before every commit, and `settle` is longer than a heartbeat: it has seen a
takeover before the other begins. So two never commit at the same time as long as a write is seen by
others within settle - heartbeat seconds. A holder that slept finds out at its next look.
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
from typing import NoReturn

from adversa.run import file_lock
from adversa.run.folder import RunDir
from adversa.storage.files import create_json, read_json, write_json
from adversa.storage.path import StoragePath
from adversa.types import UserError

LOCK = "lock.json"
POLL_SECONDS = 0.5  # between two looks at somebody else's counter


class RunLockLost(UserError):
    """Somebody else works on the run now: nothing more may be written to it."""


@dataclass(frozen=True)
class Timing:
    """Seconds. heartbeat: between two; expiry: without one, after which a run counts as abandoned;
    settle: from a takeover to its confirmation.
    """

    heartbeat: float = 2.0
    expiry: float = 20.0
    settle: float = 5.0

    def __post_init__(self) -> None:
        assert self.heartbeat * 2 < self.settle < self.expiry, self


TIMING = Timing()
# on an object store: requests cost, and take their time
STORE_TIMING = Timing(heartbeat=4.0, expiry=40.0, settle=12.0)


@dataclass(frozen=True)
class Holder:
    """machine: until its next start; beat: the counter; held: seconds of the holder's own clock."""

    owner: str
    host: str
    machine: str
    pid: int
    beat: int
    held: float

    def line(self) -> str:
        return f"{self.owner} on {self.host} (process {self.pid}) for {self.held:.0f} s"


def holder(run: RunDir) -> Holder | None:
    """Who holds a run, by its LOCK; None where nobody does, or nobody that can be read."""
    found = read_json(run.root / LOCK)
    try:
        return None if found is None else Holder(**found)
    except TypeError:
        raise UserError(
            f"{run.root / LOCK} is no lock that this version of adversa can read; use the "
            "version that wrote it"
        ) from None


def timing_of(run: RunDir) -> Timing:
    return TIMING if isinstance(run.root, Path) else STORE_TIMING


def machine(run: RunDir) -> str:
    """The same for all processes that see the run's lock (`file_lock.lock_file`), until the
    machine's next start, and for no others'.
    """
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        name = f"{socket.gethostname()}-{uuid.getnode():x}"
    try:  # two containers of one machine may have a mount, or a temporary folder, each
        found = os.stat(file_lock.lock_file(run))
    except FileNotFoundError:
        return ""  # nobody here has held the run
    return f"{name}-{found.st_dev:x}-{found.st_ino:x}"


def clock() -> float:
    """Seconds that pass while the machine sleeps too (Linux: time.monotonic stands still then)."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class InUse(UserError):
    """Somebody else works on the run."""

    def __init__(self, run: RunDir, by: Holder) -> None:
        super().__init__(
            f"{run.root} is being worked on by {by.line()}; `adversa stop` ends that, or use "
            "another --run-dir"
        )
        self.by = by


class HeartbeatMonitor:
    """What a reader has seen of a run's lock: for how long its counter has stood still, by the
    reader's own clock.
    """

    def __init__(self, run: RunDir, clock: Callable[[], float] = clock) -> None:
        self.run, self.clock = run, clock
        self.mark: tuple[str, int] | None = None
        self.since = clock()
        self.changes = 0

    def look(self) -> Holder | None:
        found = holder(self.run)
        if (mark := _mark(found)) != self.mark:
            self.changes += self.mark is not None and found is not None
            self.mark, self.since = mark, self.clock()
        return found

    def still(self) -> float:
        """Seconds without a change, as of the last look."""
        return self.clock() - self.since


def _mark(found: Holder | None) -> tuple[str, int] | None:
    return None if found is None else (found.owner, found.beat)


_watched: dict[StoragePath, HeartbeatMonitor] = {}


def is_worked_on(run: RunDir) -> bool:
    """Whether a process of this machine holds the run, or one of another machine gives signs of
    life.

    For the latter the first call waits until it has seen one, some seconds at most.
    """
    if file_lock.is_locked(run):
        return True
    found, timing = holder(run), timing_of(run)
    if found is None or found.machine == machine(run):
        _watched.pop(run.root, None)
        return False
    if (watch := _watched.get(run.root)) is None:
        watch = _watched[run.root] = HeartbeatMonitor(run)
        until = time.monotonic() + 2 * timing.heartbeat + 1
        while not watch.changes and time.monotonic() < until:
            watch.look()
            time.sleep(POLL_SECONDS)
    watch.look()
    return watch.changes > 0 and watch.still() < timing.expiry


def is_there(run: RunDir) -> bool:
    """Whether the run's folder is there still, and not the empty place where it was mounted. An
    object store is not unmounted, and is not asked.
    """
    return not isinstance(run.root, Path) or run.recipe.exists()


class RunLock:
    """One holder's side of it. owner: a name for people, made unique."""

    def __init__(
        self,
        run: RunDir,
        owner: str,
        timing: Timing | None = None,
        clock: Callable[[], float] = clock,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.run, self.path, self.clock, self.sleep = run, run.root / LOCK, clock, sleep
        self.timing = timing or timing_of(run)
        name, host = f"{owner}-{uuid.uuid4().hex[:8]}", socket.gethostname()
        self.record = Holder(name, host, machine(run), os.getpid(), 0, 0.0)
        self.since = self.renewed = clock()
        self.held = False
        self.has_recipe = is_there(run)
        self.lost: RunLockLost | None = None
        self.writing = threading.RLock()  # the thread that renews, and the one that works

    # ---- taking ----------------------------------------------------------------------------------

    def take(
        self, alone_here: bool = False, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        """UserError where somebody else works on the run.

        alone_here: the caller holds the run's lock on this machine, so that a LOCK of this machine
        has outlived its holder. tell: is given a line before a wait of `expiry` seconds.
        """
        started = self.clock()
        while not self.held:
            found = holder(self.run)
            if found is None:
                self.held = self._create()
                if not self.held and self.clock() - started >= self.timing.expiry:  # unreadable
                    self._take_over()
                elif not self.held:  # another was faster
                    self.sleep(POLL_SECONDS)
            elif found.owner == self.record.owner:  # the answer to `create` had been lost
                self.held = True
            elif alone_here and found.machine == self.record.machine:
                self._write()
                self.held = True
            elif self._is_abandoned(found, tell):
                self._take_over()
        self.renewed = self.clock()

    def _is_abandoned(self, found: Holder, tell: Callable[[str], None]) -> bool:
        """False where it was released while we watched."""
        tell(
            f"{self.run.root} was left by {found.line()}, or is still worked on: watching its "
            f"heartbeat for {self.timing.expiry:.0f} s"
        )
        until = self.clock() + self.timing.expiry
        while self.clock() < until:
            self.sleep(min(POLL_SECONDS, self.timing.heartbeat / 2))
            if (again := holder(self.run)) is None:
                return False
            if _mark(again) != _mark(found):
                raise InUse(self.run, again)
        return True

    def _take_over(self) -> None:
        self._write()
        self.sleep(self.timing.settle)
        if (after := holder(self.run)) is None:
            raise UserError(f"{self.run.root}: its {LOCK} was removed; try again")
        if after.owner != self.record.owner:
            raise InUse(self.run, after)
        self.held = True

    def _next(self) -> dict[str, object]:
        """The record with the next heartbeat."""
        held = self.clock() - self.since
        self.record = replace(self.record, beat=self.record.beat + 1, held=held)
        return asdict(self.record)

    def _write(self) -> None:
        write_json(self.path, self._next())

    def _create(self) -> bool:
        return create_json(self.path, self._next())

    # ---- holding ---------------------------------------------------------------------------------

    def renew(self) -> None:
        """To be called every `heartbeat` seconds. RunLockLost where another has the run, or may
        think that this one has died.
        """
        with self.writing:
            self._check_held()
            started = self.clock()
            slept = started - self.renewed
            try:
                found = holder(self.run)
                if found is None and slept >= self.timing.expiry:  # another may have come and gone
                    self._lose(f"it stood still for {slept:.0f} s, and its {LOCK} is gone")
                if found is None and not self._create():
                    found = holder(self.run)
                self._check_owner(found)
                self._write()
                self.renewed = started
            except OSError as e:
                if slept > self.timing.expiry / 2:
                    self._lose(f"its {LOCK} could not be written for {slept:.0f} s ({e})")

    def check(self) -> None:
        """To be called before every commit."""
        with self.writing:
            self._check_held()
            if self.clock() - self.renewed > 2 * self.timing.heartbeat:
                self.renew()  # it slept, or was held up: somebody may be about to take over
            else:
                self._check_owner(holder(self.run))

    def release(self) -> None:
        with self.writing:
            if self.held and self.lost is None:
                found = holder(self.run)
                if found is not None and found.owner == self.record.owner:
                    self.path.unlink(missing_ok=True)
            self.held = False

    def _check_held(self) -> None:
        if self.lost is not None:
            raise self.lost
        assert self.held, "a lock that was not taken"
        self.check_there()

    def check_there(self) -> None:
        """RunLockLost where the run's folder is gone: what is written then is lost."""
        if self.has_recipe and not is_there(self.run):
            self._lose(
                f"its {self.run.recipe.name} is gone, with the folder that was deleted, moved or "
                "unmounted; put it back, then run the same command again"
            )

    def _check_owner(self, found: Holder | None) -> None:
        if found is not None and found.owner != self.record.owner:
            self._lose(f"{found.line()} has taken it over")

    def _lose(self, why: str) -> NoReturn:
        self.lost = RunLockLost(f"{self.run.root}: {why}; this process has stopped working on it")
        raise self.lost
