"""The lock that a process holds on its own machine while it works on a run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

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
    with open(lock_file(run), "a", opener=no_link) as f:
        for tries_left in (4, 3, 2, 1, 0):  # `status` holds a shared lock for a moment
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if tries_left == 0:
                    pid = (read_json(run.status) or {}).get("pid", "unknown")
                    raise UserError(
                        f"{run.root} is in use by process {pid}; wait for it, or stop it, "
                        f"or use another {option}"
                    ) from None
                time.sleep(0.05)
            except OSError as e:
                if e.errno not in NO_LOCKS:
                    raise
                raise UserError(
                    f"{run.root}: its file system knows no locks ({e.strerror}); mount it "
                    "with them (Lustre: -o flock), or give "
                    f"another {option}"
                ) from None
        yield


def no_link(path: str, flags: int) -> int:
    """Not through a link: in a temporary folder, or a folder from a stranger, it may lead to a file
    of this user's.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)


def is_locked(run: RunDir) -> bool:
    """Whether a process of this machine holds the run. Reads only."""
    try:
        with open(lock_file(run)) as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
        return False
