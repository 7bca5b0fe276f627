"""The lock that a process holds on its own machine while it works on a run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from adversa.run.folder import RunDir
from adversa.storage.files import read_json
from adversa.types import UserError, digest

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def lock_file(run: RunDir) -> Path:
    """What a process locks to hold the run: in its folder; of an object store, which knows no
    locks, in this user's temporary folder, where it is seen by this machine alone (of several
    containers on one machine: by this one).
    """
    if isinstance(run.root, Path):
        return run.root / ".lock"
    return (
        Path(tempfile.gettempdir()) / f"adversa-{os.getuid()}-{digest(str(run.root), size=8)}.lock"
    )


@contextlib.contextmanager
def lock(run: RunDir, option: str = "--run-dir") -> Iterator[None]:
    """Hold the run for this process; the kernel lets go when the process dies, however it dies. See
    lock_file; run_lock.py holds it against all others. option: what the user gave the folder by.
    """
    held = FileLock(lock_file(run), fallback_to_soft=False)
    try:
        holding = held.acquire(timeout=0.2)  # `status` holds a shared lock for a moment
    except Timeout:
        pid = (read_json(run.status) or {}).get("pid", "unknown")
        raise UserError(
            f"{run.root} is in use by process {pid}; wait for it, or stop it, "
            f"or use another {option}"
        ) from None
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
        raise UserError(
            f"{run.root}: its file system knows no locks ({e.strerror}); mount it "
            f"with them (Lustre: -o flock), or give another {option}"
        ) from None
    with holding:
        yield


def is_locked(run: RunDir) -> bool:
    """Whether a process of this machine holds the run. Reads only."""
    try:
        with open(lock_file(run)) as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError as e:
        if e.errno not in (errno.ENOENT, *NO_LOCKS):
            raise
        return False
