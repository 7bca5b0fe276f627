"""What people want of a run that is going on, and how the run finds out: `control.json` in its
folder.

The cycle looks at it between steps and, in the long ones, between parts (`look`). The same look
tells a holder of the run that it has lost its lock. Settings change for rounds that have not
begun; `settings.json` says which values held for which round.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adversa.run import environment, file_lock, run_lock, status
from adversa.run.folder import RunDir
from adversa.run.run_lock import RunLock, RunLockLost, Timing
from adversa.storage import files
from adversa.storage.path import modified
from adversa.types import UserError, digest

CONTROL, SETTINGS, RESTARTS = "control.json", "settings.json", "restarts.json"
GO, PAUSE, STOP = "go", "pause", "stop"
CHANGEABLE = (
    "mix.synthetic_ratio",
    "mine.budget",
)  # what a round is made of, and no round before it hangs on
LOOK_SECONDS = 0.5
STORE_LOOK_SECONDS = 2.0  # on an object store, where a look is two requests
GRACE_SECONDS = 3.0  # for the work to look by itself, before it is interrupted


class Pause(Exception):
    """Somebody wants the run to rest: what is in flight is finished, then the step ends and is
    taken up again later.
    """


class Stop(KeyboardInterrupt):
    """Somebody wants the run to end, as by Ctrl-C."""


# ---- the file ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wishes:
    """wish: go, pause or stop; settings: by dotted name, for rounds that have not begun."""

    wish: str = GO
    settings: dict[str, Any] = field(default_factory=dict)


def read(run: RunDir) -> Wishes:
    found = files.read_json(run.root / CONTROL) or {}
    return Wishes(found.get("wish", GO), found.get("settings", {}))


def wish(run: RunDir, what: str | None = None, settings: dict[str, Any] | None = None) -> None:
    """Write a wish (None: the one that is there) and add settings to those that are there."""
    old = read(run)
    new = {
        "wish": what or old.wish,
        "settings": old.settings | (settings or {}),
        "asked": environment.now(),
    }
    with files.writing(run.root):
        files.write_json(run.root / CONTROL, new)


# ---- settings of rounds --------------------------------------------------------------------------


def enter_round(run: RunDir, number: int, own: dict[str, Any]) -> None:
    """Settle what holds for a round, before its first folder is made; one that has begun keeps what
    it has.

    own: the run's own settings, by dotted name; what is wished and does not differ is no change.
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


def recorded(run: RunDir) -> dict[int, dict[str, Any]]:
    """For each round that has settings of its own: those."""
    return {int(n): values for n, values in (files.read_json(run.root / SETTINGS) or {}).items()}


def setting(run: RunDir, name: str, own: Any, rounds: int) -> list[Any]:
    """A setting of CHANGEABLE in the rounds 1 .. `rounds`: as recorded of those that have begun, of
    others as it is wished now.

    own: the run's own value.
    """
    every, wished = recorded(run), read(run).settings.get(name, own)
    values = {n: every.get(n, {}).get(name, own) for n in range(1, rounds + 1)}
    return [
        value if value == wished or run.round(n).exists() else wished for n, value in values.items()
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


# ---- the look ------------------------------------------------------------------------------------


class Free:
    """Nobody else can want anything of this work: tests, exports, orders."""

    def check(self) -> None:
        """There is no lock to lose."""

    def look(self, force: bool = False) -> None:
        """There is nobody to listen to."""

    def rest(self) -> None:
        """Never asked."""


class Reins:
    """What holds work on a run back: its lock and people's wishes. A thread keeps the lock alive.

    interrupt: called from that thread where the work must end and has not looked for GRACE_SECONDS
    (in a training).
    """

    def __init__(self, run: RunDir, held: RunLock, interrupt: Callable[[], None]) -> None:
        self.run, self.lock, self.interrupt = run, held, interrupt
        self.looked = float("-inf")
        self.between = LOOK_SECONDS if isinstance(run.root, Path) else STORE_LOOK_SECONDS
        self.ending = False  # the work knows
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def check(self) -> None:
        """RunLockLost where another holds the run. Before every commit."""
        try:
            self.lock.check()
        except RunLockLost:
            self.ending = True
            raise

    def look(self, force: bool = False) -> None:
        """RunLockLost, Stop or Pause. Cheap: the files are read twice a second at most, on an
        object store every two seconds.
        """
        if not force and time.monotonic() - self.looked < self.between:
            return
        self.looked = time.monotonic()
        self.check()
        wanted = read(self.run).wish
        if wanted == STOP:
            self.ending = True
            raise Stop("stop")
        if wanted == PAUSE:
            raise Pause

    def rest(self) -> None:
        """Return when nobody wants a pause any more."""
        while True:
            try:
                self.look(force=True)
                return
            except Pause:
                time.sleep(self.between)

    def _beat(self) -> None:
        beat, due = self.lock.timing.heartbeat, float("inf")
        while not self.over.wait(min(beat, 1.0)):
            stops = False
            with contextlib.suppress(
                UserError, OSError
            ):  # a lost lock is said where the work looks, or by `interrupt`
                if run_lock.clock() - self.lock.renewed >= beat:
                    self.lock.renew()
                stops = read(self.run).wish == STOP
            if self.lock.lost is None and not stops:
                due = float("inf")
            elif due == float("inf"):
                due = time.monotonic() + GRACE_SECONDS
            elif time.monotonic() > due and not self.ending:
                self.ending = True
                self.interrupt()

    def __enter__(self) -> Reins:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


FREE = Free()
_reins: ContextVar[Free | Reins] = ContextVar("reins", default=FREE)


def reins() -> Free | Reins:
    """Of the work in this context."""
    return _reins.get()


@contextlib.contextmanager
def held(
    run: RunDir,
    owner: str,
    interrupt: Callable[[], None],
    tell: Callable[[str], None] = lambda text: None,
    afresh: bool = True,
    timing: Timing | None = None,
) -> Iterator[Reins]:
    """Hold a run, by this machine's lock and by the run lock. UserError where somebody else does.

    afresh: whoever starts work wants it to go on, whatever was wished before; not so a coordinator
    that comes back.
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
        if (
            afresh and read(run).wish != GO and files.read_json(run.root / CONTROL) == before
        ):  # not what was wished while it waited
            wish(run, GO)
        note_start(run)
        found_reins = stack.enter_context(Reins(run, mine, interrupt))
        token = _reins.set(found_reins)
        stack.callback(_reins.reset, token)
        yield found_reins


def _release(mine: RunLock) -> None:
    with contextlib.suppress(OSError):  # it is then given up after its expiry
        mine.release()
