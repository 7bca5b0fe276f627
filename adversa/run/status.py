"""What a run is doing now, and how long its commands have taken."""

from __future__ import annotations

import os
import socket
import threading
import time

from adversa.run import run_lock
from adversa.run.folder import RunDir
from adversa.storage.files import read_json, write_json, writing
from adversa.storage.path import BucketPath, StoreError
from adversa.types import Json

# ---- what the run is doing -----------------------------------------------------------------------


def set_status(run: RunDir, state: str, stage: str = "", **more: object) -> None:
    """state: running, finished, stopped (by the user) or failed; stage: a step folder's name."""
    with writing(run.root):
        write_json(
            run.status,
            {
                "state": state,
                "stage": stage,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "updated": time.time(),
            }
            | more,
        )


def state_of(run: RunDir) -> tuple[str, Json]:
    """("running" | "paused" | "finished" | "stopped" | "failed" | "killed" | "not started",
    status.json).
    """
    status = read_json(run.status) or {}
    state = status.get("state", "not started")
    if state in ("running", "paused") and not run_lock.is_worked_on(run):
        state = "killed"
    return state, status


class Clock:
    """Adds this command's wall time to clock.json every other second, so that time lost to a kill
    is counted too.

    On an object store every five seconds.

    since: time.monotonic() at the start of the command; its start-up counts.
    """

    def __init__(self, run: RunDir, since: float | None = None) -> None:
        self.run, self.path, self.has_recipe = run, run.root / "clock.json", run_lock.is_there(run)
        self.since = time.monotonic() if since is None else since
        self.before = wall_seconds(run)
        self.writing = threading.Lock()  # two threads must not share the temporary name
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def tick(self) -> None:
        with self.writing:
            if self.has_recipe and not run_lock.is_there(self.run):
                return  # its folder is gone; whoever holds the run says so
            write_json(self.path, {"wall_seconds": self.before + time.monotonic() - self.since})

    def _beat(self) -> None:
        stopped = False
        while not stopped:
            stopped = self.stopped.wait(5 if isinstance(self.path, BucketPath) else 2)
            try:
                self.tick()
            except StoreError:
                continue  # a store that cannot be reached now may be in a moment
            except OSError:
                return  # the disk is full or gone: the step that is running says so itself

    def __enter__(self) -> Clock:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()


def wall_seconds(run: RunDir) -> float:
    """Wall time of all commands on this run so far."""
    return float((read_json(run.root / "clock.json") or {}).get("wall_seconds", 0.0))
