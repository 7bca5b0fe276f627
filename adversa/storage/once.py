"""Each JSON file is read once a command: on an object store every read is a request.

A command keeps what it has read. What it writes, moves or removes it replaces or drops here; what
another process or thread may write at any time (LIVE) is never kept. That a file is missing is kept
of those alone that nobody but the command writes (HELD).
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adversa.storage.path import StoragePath

# The requested state; the lock with its heartbeat, and the clock; what a run and a step are doing.
LIVE = frozenset(("control.json", "lock.json", "clock.json", "status.json", "progress.json"))
# Written by whoever holds the run; all else may come from a worker process.
HELD = frozenset(("settings.json", "precision.json", "restarts.json"))


class _Kept(dict["StoragePath", "bytes | None"]):
    """What a command has read. drops: how often something was dropped; changing: held while
    something is dropped, or kept.
    """

    def __init__(self) -> None:
        self.drops, self.changing = 0, threading.Lock()


_locks: dict[StoragePath, threading.Lock] = {}
_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def command() -> Iterator[None]:
    """Within it what is read is kept, for this thread and those that run in its context. A command
    within a command shares what the outer one has read.
    """
    if _kept.get() is not None:
        yield
        return
    token = _kept.set(_Kept())
    try:
        yield
    finally:
        _kept.reset(token)


def read_bytes(path: StoragePath) -> bytes:
    """What a small file holds, by a command's first read of it."""
    kept = _kept.get()
    if kept is None or path.name in LIVE:
        return _read(path)
    with _locks.setdefault(path, threading.Lock()):  # of two threads one reads
        drops = kept.drops
        try:
            known = kept[path]
        except KeyError:
            try:
                known = _read(path)
            except FileNotFoundError:
                if path.name not in HELD:
                    raise
                known = None
            with kept.changing:
                if kept.drops == drops:  # or it may be what was removed meanwhile
                    known = kept.setdefault(path, known)  # not over what was written meanwhile
    if known is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return known


def _read(path: StoragePath) -> bytes:
    """On a network file system, a file that another machine replaces while it is read is a stale
    handle, once or twice.
    """
    for _ in range(3):
        try:
            return path.read_bytes()
        except OSError as e:
            if e.errno != errno.ESTALE:
                raise
    return path.read_bytes()


def replace(path: StoragePath, data: bytes | memoryview) -> None:
    """A file was written whole: JSON is kept in place of what was read, of other files nothing."""
    kept = _kept.get()
    if kept is not None and path.suffix == ".json" and path.name not in LIVE:
        kept[path] = bytes(data)


def forget(root: StoragePath) -> None:
    """Drop what is kept of a file, or of a folder and all below it, once that is gone."""
    if (kept := _kept.get()) is None:
        return
    with kept.changing:  # other threads read meanwhile
        kept.drops += 1
        for path in [p for p in list(kept) if p == root or root in p.parents]:
            kept.pop(path, None)
