"""What people want of a run that is going on, and how the run finds out: `control.json` in its
folder.

The loop polls it between steps and, in the long ones, between parts. The same poll tells a holder
of the run that it has lost its lock. Settings change for rounds that have not begun;
`settings.json` says which values held for which round.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from adversa.run import environment, file_lock, run_lock, status
from adversa.run.folder import RunDir
from adversa.run.run_lock import RunLock, RunLockLost, Timing
from adversa.storage import files, once
from adversa.storage.path import modified
from adversa.types import Json, UserError, digest

T = TypeVar("T")

CONTROL, SETTINGS, RESTARTS = "control.json", "settings.json", "restarts.json"
GO, PAUSE, STOP = "go", "pause", "stop"
CHANGEABLE = (
    "mix.synthetic_ratio",
    "mine.budget",
)  # what a round is made of, and no round before it hangs on
POLL_SECONDS = 0.5
STORE_POLL_SECONDS = 2.0  # on an object store, where it is two requests
GRACE_SECONDS = 3.0  # for the work to poll by itself, before it is interrupted


class Pause(Exception):
    """Somebody wants the run to pause: what is in flight is finished, then the step ends and is
    taken up again later.
    """


class Stop(KeyboardInterrupt):
    """Somebody wants the run to end, as by Ctrl-C."""


# ---- the file ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Requested:
    """state: go, pause or stop; settings: by dotted name, for rounds that have not begun."""

    state: str = GO
    settings: Json = field(default_factory=dict)


def read(run: RunDir) -> Requested:
    found = files.read_json(run.root / CONTROL) or {}
    return Requested(found.get("state", GO), found.get("settings", {}))


def request(run: RunDir, state: str | None = None, settings: Json | None = None) -> None:
    """Ask for a state (None: the one that is asked for), and for settings beside those that are."""
    old = read(run)
    new = {
        "state": state or old.state,
        "settings": old.settings | (settings or {}),
        "asked": environment.now(),
    }
    with files.writing(run.root):
        files.write_json(run.root / CONTROL, new)


# ---- settings of rounds --------------------------------------------------------------------------


def enter_round(run: RunDir, number: int, own: Json) -> None:
    """Settle what holds for a round, before its first folder is made; one that has begun keeps what
    it has.

    own: the run's own settings, by dotted name; what is asked and does not differ is no change.
    """
    if run.round(number).exists():
        return
    every = recorded(run)
    wanted = {
        name: value
        for name, value in read(run).settings.items()
        if name in CHANGEABLE and own[name] != value
    }
    if wanted != every.get(number, {}):
        every[number] = wanted
        files.write_json(
            run.root / SETTINGS, {str(n): values for n, values in sorted(every.items()) if values}
        )


def recorded(run: RunDir) -> dict[int, Json]:
    """For each round that has settings of its own: those."""
    return {int(n): values for n, values in (files.read_json(run.root / SETTINGS) or {}).items()}


def setting(run: RunDir, name: str, own: Any, rounds: Sequence[int]) -> list[Any]:
    """A setting of CHANGEABLE in some rounds: as recorded of those that have begun, of others as it
    is asked for now.

    own: the run's own value.
    """
    every, asked = recorded(run), read(run).settings.get(name, own)
    values = {n: every.get(n, {}).get(name, own) for n in rounds}
    return [
        value if value == asked or run.round(n).exists() else asked for n, value in values.items()
    ]


def run_id(name: str, run: RunDir, number: int) -> str:
    """What a round's request ids are made of: the run's id, and the settings that were changed for
    this round or one before.
    """
    changed = {n: sorted(values.items()) for n, values in recorded(run).items() if n <= number}
    return digest(name, sorted(changed.items()), size=8) if changed else name


def notes(run: RunDir) -> list[str]:
    """A line for each round whose settings are not those of config.yaml."""
    every = recorded(run)
    return [
        f"round {n} was made with {', '.join(f'{k} {v}' for k, v in every[n].items())}, set by hand"
        for n in sorted(every)
    ]


# ---- restarts ------------------------------------------------------------------------------------


def restarts(run: RunDir) -> tuple[int, float]:
    """How often work on the run was taken up after a death, and the seconds between the deaths and
    that.
    """
    found = files.read_json(run.root / RESTARTS) or {}
    return int(found.get("restarts", 0)), float(found.get("seconds", 0.0))


def note_start(run: RunDir) -> None:
    """Count a restart, where whoever worked on the run last did not end. By the file system's clock
    alone.
    """
    before, clock = (files.read_json(run.status) or {}).get("state"), run.root / "clock.json"
    last = modified(clock)
    status.set_status(run, "running", "starting")
    if before in ("running", "paused") and last is not None:
        count, seconds = restarts(run)
        seconds += max(0.0, (modified(run.status) or last) - last)
        files.write_json(run.root / RESTARTS, {"restarts": count + 1, "seconds": round(seconds, 1)})


# ---- the handle ----------------------------------------------------------------------------------


class RunHandle(Protocol):
    """What holds work on a run back: whether the run is still ours, and what people ask of it."""

    def check(self) -> None:
        """RunLockLost where another holds the run. Before every commit."""
        ...

    def poll(self, force: bool = False) -> None:
        """RunLockLost, Stop or Pause. Cheap: the files are read twice a second at most, on an
        object store every two seconds.
        """
        ...

    def wait(self) -> None:
        """Return when nobody asks for a pause any more."""
        ...


class NullHandle:
    """Of work that nobody else can ask anything of: tests, exports, images on demand."""

    def check(self) -> None:
        """There is no run lock to lose."""

    def poll(self, force: bool = False) -> None:
        """There is nobody to listen to."""

    def wait(self) -> None:
        """Never paused."""


NULL_HANDLE = NullHandle()


def with_pauses(handle: RunHandle, work: Callable[[], T], paused: Callable[[], None]) -> T:
    """What `work()` returns, begun again after each pause. paused: told of each."""
    while True:
        try:
            handle.poll(force=True)
            return work()
        except Pause:
            paused()
            handle.wait()


class HeldRun:
    """The RunHandle of a run that this process holds. A thread keeps its run lock alive.

    interrupt: called from that thread where the work must end and has not polled for GRACE_SECONDS
    (in a training).
    """

    def __init__(self, run: RunDir, held: RunLock, interrupt: Callable[[], None]) -> None:
        self.run, self.lock, self.interrupt = run, held, interrupt
        self.polled = float("-inf")
        self.between = POLL_SECONDS if isinstance(run.root, Path) else STORE_POLL_SECONDS
        self.ending = False  # the work knows
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def check(self) -> None:
        try:
            self.lock.check()
        except RunLockLost:
            self.ending = True
            raise

    def poll(self, force: bool = False) -> None:
        if not force and time.monotonic() - self.polled < self.between:
            return
        self.polled = time.monotonic()
        self.check()
        requested = read(self.run).state
        if requested == STOP:
            self.ending = True
            raise Stop("stop")
        if requested == PAUSE:
            raise Pause

    def wait(self) -> None:
        while True:
            try:
                self.poll(force=True)
                return
            except Pause:
                time.sleep(self.between)

    def _beat(self) -> None:
        beat, due = self.lock.timing.heartbeat, float("inf")
        while not self.over.wait(min(beat, 1.0)):
            stops = False
            with contextlib.suppress(
                UserError, OSError
            ):  # a lost lock is said where the work polls, or by `interrupt`
                if run_lock.clock() - self.lock.renewed >= beat:
                    self.lock.renew()
                stops = read(self.run).state == STOP
            if self.lock.lost is None and not stops:
                due = float("inf")
            elif due == float("inf"):
                due = time.monotonic() + GRACE_SECONDS
            elif time.monotonic() > due and not self.ending:
                self.ending = True
                self.interrupt()

    def __enter__(self) -> HeldRun:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


@contextlib.contextmanager
def held(
    run: RunDir,
    owner: str,
    interrupt: Callable[[], None],
    tell: Callable[[str], None] = lambda text: None,
    afresh: bool = True,
    timing: Timing | None = None,
    seen: dict[str, Any] | None = None,
) -> Iterator[HeldRun]:
    """Hold a run, by this machine's lock and by the run lock. UserError where somebody else does.

    afresh: whoever starts work wants it to go on, whatever was asked before; not so a coordinator
    that comes back. seen: status.json before the command read anything else of the run: where it is
    another one now, somebody has held the run meanwhile, and all is read again.
    """
    before = files.read_json(run.root / CONTROL)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock.lock(run))
        except UserError as e:
            found = run_lock.holder(run)
            raise run_lock.InUse(run, found) if found is not None else e from None
        mine = RunLock(run, owner, timing)
        mine.take(alone_here=True, tell=tell)
        stack.callback(_release, mine)
        stack.enter_context(once.command())
        if seen is None or seen != files.read_json(run.status):
            once.forget(run.root)
        if (
            afresh and read(run).state != GO and files.read_json(run.root / CONTROL) == before
        ):  # not what was asked while it waited
            request(run, GO)
        note_start(run)
        yield stack.enter_context(HeldRun(run, mine, interrupt))


def _release(mine: RunLock) -> None:
    with contextlib.suppress(OSError):  # it is then given up after its expiry
        mine.release()
