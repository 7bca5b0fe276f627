"""Holding a run while this process works on it: what stops the work, and what status.json says of
its end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from adversa.run import control, status
from adversa.run.folder import RunDir
from adversa.run.run_lock import RunLockLost
from adversa.types import UserError

T = TypeVar("T")


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Gives what another thread calls to raise KeyboardInterrupt in this one.

    In the main thread that is SIGTERM, which then stops work as Ctrl-C does; so does SIGHUP, which
    a terminal that is closed sends. Not SIGINT: a command that a shell has started in the
    background ignores that. Elsewhere no signal handler may be installed, and the exception comes
    between two steps of Python.
    """
    if threading.current_thread() is not threading.main_thread():
        here, error = ctypes.c_ulong(threading.get_ident()), ctypes.py_object(KeyboardInterrupt)
        yield lambda: ctypes.pythonapi.PyThreadState_SetAsyncExc(here, error) and None
        return
    ends = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else it was started by nohup
        ends.append(signal.SIGHUP)
    before = [(number, signal.signal(number, _terminated)) for number in ends]
    try:
        yield lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _terminated(number: int, frame: object) -> None:
    if number == signal.SIGHUP:  # the terminal is gone, and to write to it would be a fault
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in (1, 2):
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(nowhere, output)
        os.close(nowhere)
    raise KeyboardInterrupt("SIGTERM")


def hold(
    command: str,
    run: RunDir,
    work: Callable[[control.HeldRun], T],
    ended: Callable[[], str],
    say: Callable[[str], None],
    seen: dict[str, Any] | None = None,
    /,
    **told: Any,
) -> T:
    """Work done while this process holds the run; status.json says how it ended.

    Args:
        command: Who holds the run, in words for others.
        run: The run.
        work: Done while it is held.
        ended: The state of a run whose work came to its end.
        say: Is told what is waited for.
        seen: As of `control.held`.
        **told: What else status.json is to say.

    Returns:
        What `work(handle)` returns.

    Raises:
        KeyboardInterrupt: It was stopped; its argument is "SIGTERM" where that signal did it.
    """
    with (
        interruptible() as interrupt,
        control.held(run, command, interrupt, say, seen=seen) as handle,
    ):
        try:
            found = work(handle)
        except KeyboardInterrupt as stop:
            handle.ending = True
            if handle.lock.lost is not None:
                raise handle.lock.lost from None
            status.set_status(run, "stopped", **told)
            asked = control.read(run).state == control.STOP
            raise (KeyboardInterrupt() if asked else stop) from None
        except RunLockLost:
            raise
        except Exception as e:
            handle.lock.check_there()
            _note_failure(run, e, **told)
            raise
        status.set_status(run, ended(), **told)
    return found


def _note_failure(run: RunDir, error: Exception, **told: Any) -> None:
    """Leave the reason where `status` finds it; a full disk must not hide the first error behind a
    second.
    """
    try:
        status.set_status(run, "failed", error=" ".join(str(error).split())[:2000], **told)
    except (UserError, OSError) as e:
        error.add_note(f"status.json could not be written either ({e})")
