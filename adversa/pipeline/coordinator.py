"""A command's work on a run, for a process that nobody watches: it keeps no state but the run
folder. No Ray: an actor wraps it.

Whoever started it, or comes later, reads in status.json how it ended. Started again with the same
task it goes on where it was.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from adversa.common.sanitize import load_yaml
from adversa.config import Config, check
from adversa.engine.interface import Engine
from adversa.pipeline import loop
from adversa.pipeline.stage import Page
from adversa.pipeline.stages import plan
from adversa.run import control, status
from adversa.run.folder import RunDir
from adversa.run.run_lock import HeartbeatMonitor, InUse, RunLockLost, Timing
from adversa.storage import files
from adversa.storage.path import storage_path
from adversa.types import UserError

ENDED = ("finished", "stopped", "failed")
LOOK_SECONDS = 0.5
# Without a heartbeat. A coordinator that comes back starts slowly, and has waited for the lock of
# the dead one.
LOST_SECONDS = 120.0
PREDECESSOR_SECONDS = (
    600.0  # that a coordinator which comes back waits for the end of the one before
)


@dataclass(frozen=True)
class CoordinatorTask:
    """All that a coordinator needs. id: of whoever started it; config: YAML; home: the user's
    folder, for relative paths.
    """

    id: str
    config: str
    root: str
    command: str
    home: str
    reopen: bool = False
    verbose: bool = False


class Coordinator:
    """Works on a run in a thread of its own.

    engine: made when there is something to do; page: writes the report; end: ends this process,
    where the work does not end by itself (a training that is to stop). back: this is not the first
    start with this task.
    """

    def __init__(
        self,
        task: CoordinatorTask,
        engine: Callable[[Config, RunDir], Engine],
        page: Page,
        end: Callable[[], None],
        back: bool = False,
        timing: Timing | None = None,
    ) -> None:
        self.task, self.engine, self.page, self.end, self.back, self.timing = (
            task,
            engine,
            page,
            end,
            back,
            timing,
        )
        self.config = check(load_yaml(task.config), "the coordinator's configuration")
        self.run = RunDir(storage_path(task.root))
        self.note = "starting"
        self.refused: str | None = None
        self.taken, self.over = threading.Event(), threading.Event()
        self.handle: control.HeldRun | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def state(self) -> dict[str, Any]:
        """refused: why the run could not be had (one line), else None; over: it has done what it
        can; note: what it waits for.
        """
        return {
            "id": self.task.id,
            "command": self.task.command,
            "taken": self.taken.is_set(),
            "over": self.over.is_set(),
            "refused": self.refused,
            "note": self.note,
        }

    def stop(self) -> None:
        """As `adversa stop`: a coordinator that dies before it has seen it sees it when it comes
        back.
        """
        control.request(self.run, control.STOP)

    # ---- the thread ------------------------------------------------------------------------------

    def _work(self) -> None:
        first, until = "", time.monotonic() + PREDECESSOR_SECONDS
        try:
            while not self.taken.is_set():
                try:
                    with control.held(
                        self.run,
                        "coordinator",
                        self._interrupt,
                        self._tell,
                        not self.back,
                        timing=self.timing,
                    ) as handle:
                        self.handle, self.note = handle, ""
                        self.taken.set()
                        self._carry_out()
                except InUse as e:
                    first = first or e.by.owner
                    if not self.back or e.by.owner != first or time.monotonic() > until:
                        raise
                    self.note = one_line(
                        e
                    )  # the one before still beats: its node lost the head, and not the storage
                    time.sleep(LOOK_SECONDS)
        except (
            UserError
        ) as e:  # somebody else has the run, or has it now: its folder is not ours to write to
            self.refused = one_line(e)
        except Exception as e:  # the folder itself fails
            self.refused = f"{one_line(e)} ({type(e).__name__})"
            traceback.print_exc()
        finally:
            self.over.set()

    def _carry_out(self) -> None:
        try:
            self._note(*self._outcome())
        except RunLockLost:
            raise
        except control.Stop:
            status.set_status(self.run, "stopped", command=self._until)
        except UserError as e:
            status.set_status(
                self.run, "failed", command=self._until, error=one_line(e)[:2000], user=True
            )
        except Exception as e:
            trace = traceback.format_exc()
            status.set_status(
                self.run,
                "failed",
                command=self._until,
                error=one_line(e)[:2000],
                trace=trace[-20000:],
            )

    def _outcome(self) -> tuple[str, str]:
        """(state, title of the last stage that was worked on)"""
        assert self.handle is not None
        control.with_pauses(  # one that comes back may be paused
            self.handle,
            lambda: None,
            partial(status.set_status, self.run, "paused", command=self._until),
        )
        if self._until is None:
            loop.review(
                self.config, self.run, self.task.reopen
            )  # what it sets aside is to be done again
        worked, planned = None, plan(self.config, self.run, self._until)
        if loop.todo(planned, self._until):
            engine = self.engine(self.config, self.run)
            try:
                worked = loop.run(
                    self.config,
                    self.run,
                    engine,
                    self.page,
                    self._until,
                    reopen=self.task.reopen,
                    handle=self.handle,
                    planned=planned,
                )
            finally:
                engine.close()
        return (
            "finished" if self.run.summary.exists() else "stopped",
            worked.title if worked is not None else "",
        )

    def _note(self, state: str, worked: str) -> None:
        assert self.handle is not None
        self.handle.check()
        status.set_status(self.run, state, command=self._until, worked=worked)

    @property
    def _until(self) -> str | None:
        return None if self.task.command == "loop" else self.task.command

    def _tell(self, text: str) -> None:
        self.note = text

    def _interrupt(self) -> None:
        """From the thread that keeps the lock: the work does not poll. What it has on disk is
        what a kill would leave.
        """
        assert self.handle is not None
        try:
            if self.handle.lock.lost is None:
                status.set_status(self.run, "stopped", command=self._until)
                self.handle.lock.release()
            else:
                self.refused = str(self.handle.lock.lost)
        finally:
            self.over.set()
            self.end()


def follow(run: RunDir, patience: float = LOST_SECONDS) -> dict[str, Any]:
    """Wait for the end of a run that a coordinator works on: its status.json.

    Reads the folder alone: neither a head that dies nor a machine that sleeps takes the follower
    with it. UserError where there was no sign of life for so many seconds.
    """
    pulse = HeartbeatMonitor(run)
    while True:
        with contextlib.suppress(
            OSError
        ):  # a storage that cannot be reached gives no sign of life either
            status = files.read_json(run.status) or {}
            if status.get("state") in ENDED:
                return status
            pulse.look()
        if pulse.still() > patience:
            raise UserError(
                f"{run.root}: its coordinator has given no sign of life for {patience:.0f} "
                "s; see whether the cluster is up and "
                "its storage not full, then run the same command again: it goes on with the run"
            )
        time.sleep(LOOK_SECONDS)


def one_line(error: BaseException) -> str:
    return " ".join("; ".join([str(error), *getattr(error, "__notes__", [])]).split())
