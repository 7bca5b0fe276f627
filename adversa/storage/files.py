"""Small files: JSON, whole replacement of a file, and file-system errors as errors of the user."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from adversa.storage import once
from adversa.storage.path import BucketPath, StoragePath
from adversa.types import Json, UserError

MANIFEST = "manifest.json"  # of a finished step's folder (run/step_folder.py)


def read_json(path: StoragePath) -> Json | None:
    """The JSON object of a file, or None where there is none (or it is being replaced on a file
    system without atomic rename).
    """
    try:
        value = json.loads(once.read_bytes(path).decode())
    except (
        FileNotFoundError,
        IsADirectoryError,
        NotADirectoryError,
        ValueError,
        RecursionError,
    ):  # ValueError: no JSON, no UTF-8
        return None
    return value if isinstance(value, dict) else None


def write_json(path: StoragePath, value: Json | list[Json]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, _encode(value))


def sha256(path: StoragePath) -> str:
    """The digest of a file."""
    if isinstance(path, BucketPath):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def create_json(path: StoragePath, value: Json) -> bool:
    """Whether the file was written: only where there is none. Of several who try at the same time
    one succeeds, on whatever machines (S3 needs conditional puts: AWS, MinIO, R2 and Ceph do).
    """
    try:
        if isinstance(path, BucketPath):
            path.write_bytes(_encode(value), exclusive=True)
            return True
        with open(path, "xb") as f:
            try:
                f.write(_encode(value))
                f.flush()
            except BaseException:
                path.unlink()
                raise
        return True
    except FileExistsError:
        return False


def _encode(value: Json | list[Json]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


# {option}: what says where to write; {kept}: that the same command goes on where it was.
FIXES = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again{kept}",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again{kept}",
    errno.EIO: "the disk fails (input/output error); check it, then run the same command "
    "again{kept}",
    errno.ESTALE: "the network file system has lost it; mount it again, then run the same command "
    "again{kept}",
    errno.EBUSY: "something else holds it; wait for that to end and run the same command again, or "
    "give another {option}",
    errno.EROFS: "the file system is read-only; give a {option} that can be written",
    errno.EACCES: "permission denied; give a {option} that can be written",
    errno.EPERM: "permission denied; give a {option} that can be written",
    errno.ENOTDIR: "a file is in the way; give another {option}",
    errno.EEXIST: "a file is in the way; give another {option}",
    errno.EISDIR: "a folder is in the way; give another {option}",
    errno.ELOOP: "symbolic links lead in a circle; give another {option}",
    errno.ENAMETOOLONG: "the name is too long; give another {option}, a shorter one",
    errno.EFBIG: "the file system takes no file so large; give another {option}",
    errno.ENOENT: "the folder cannot be made, or is gone; see whether it was deleted or unmounted, "
    "or give another {option}",
}


@contextlib.contextmanager
def writing(
    folder: StoragePath, option: str = "--run-dir", kept: bool | None = None
) -> Iterator[None]:
    """Turn the faults of a file system that are fixable by the user into a UserError.

    option: what the user gave the folder by. kept: whether the same command goes on where it was
    (default: with --run-dir).
    """
    try:
        yield
    except OSError as e:
        if e.errno not in FIXES or _is_ours(folder, e):
            raise
        goes_on = option == "--run-dir" if kept is None else kept
        promise = ", finished parts are kept" if goes_on else ""
        where = (
            e.filename2 or e.filename or folder
        )  # of two names (a rename) the second is where it was to go
        raise UserError(
            f"cannot write to {where}: {FIXES[e.errno].format(option=option, kept=promise)}"
        ) from None


def _is_ours(folder: StoragePath, error: OSError) -> bool:
    """Whether it is a fault of ours: a file missing in a folder that is there, or something in the
    way elsewhere.
    """
    if isinstance(folder, BucketPath):
        return True  # what a store refuses is told by it
    named = Path(error.filename) if isinstance(error.filename, str) else folder
    near = named == folder or folder in named.parents or named in folder.parents
    if error.errno == errno.ENOENT:
        return os.path.exists(folder) or not near
    return error.errno in (errno.EEXIST, errno.EISDIR) and not near


def replace_bytes(path: StoragePath, data: bytes | memoryview) -> None:
    """Write a whole file, or leave the old one: to a temporary name beside it, flushed, then
    renamed; or by one put.
    """
    if isinstance(path, BucketPath):
        path.write_bytes(data)
    else:
        _replace_local(path, data)
    once.replace(path, data)


def _replace_local(path: Path, data: bytes | memoryview) -> None:
    temporary = _beside(path)
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    """Where a file is made before it takes its place. Nothing lies there: a link of that name, in a
    stranger's folder, would be written through.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    return temporary
