"""The images of a folder of parts, decoded once a machine: a memory-mapped array in a cache folder,
which all processes and runs of the machine share.

An entry of the cache is a folder, named by the digests of the parts that it was made from:

    rows.npy     uint8 [N, H, W, 3], of latents float16 [N, views, C, side, side]
    index.npy    the id of each row, and the CRC-32 of its bytes
    entry.json   the number of rows of each part, and the digest of index.npy

It is made in a temporary folder and renamed, by one process at a time. A row is checked when a
process first reads it, so that nothing damaged is used, and nothing is read only to be checked.
Where the cache has no room, rows are read from Parquet.

ADVERSA_CACHE is the cache's folder (default: `adversa` in XDG_CACHE_HOME or ~/.cache),
ADVERSA_CACHE_GB its limit (default: half of the disk that it lies on).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple
from zlib import crc32

import numpy as np
import pyarrow as pa
from filelock import FileLock

from adversa.storage import files, tables
from adversa.storage.path import StoragePath, modified
from adversa.types import UserError, digest

log = logging.getLogger("adversa.arrays")
Column = Literal["image", "latent"]
FORMAT = 1
ROWS, INDEX, ENTRY = "rows.npy", "index.npy", "entry.json"
RESERVE = 1 << 30  # bytes of the disk that are left free
UNUSED = 30 * 86_400  # seconds after which an entry goes when another is made
DECODED_AT_ONCE = 32  # images a thread takes

# ---- the cache of this machine -------------------------------------------------------------------


def cache_folder() -> Path:
    given, base = os.environ.get("ADVERSA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if not (given or base):
        home = os.path.expanduser("~")  # stays as it is for a user without a name or a home
        base = os.path.join(home if os.path.isabs(home) else "/", ".cache")
    return Path(given or os.path.join(base or "/", "adversa")).absolute() / "arrays"


def _limit(disk: int) -> int:
    """Bytes that the cache may hold on a disk of so many."""
    given = os.environ.get("ADVERSA_CACHE_GB")
    try:
        return int(float(given) * 1e9) if given else disk // 2
    except (ValueError, OverflowError):
        raise UserError(f"ADVERSA_CACHE_GB={given}: give a number of gigabytes") from None


def _room(need: int) -> tuple[str, list[Path]]:
    """Why the cache has no room for so many bytes ("" where it has), and the entries that go for
    them: those UNUSED, and as many as have to, longest unused first. Entries in use stay.
    """
    cache = cache_folder()
    there = next(p for p in (cache, *cache.parents) if p.is_dir())
    if not os.access(there, os.W_OK):
        return f"{there} cannot be written", []
    disk = shutil.disk_usage(there)
    entries = {p: _bytes(p) for p in cache.glob("[!.]*") if p.is_dir()}
    limit = _limit(disk.total)
    short = max(need + sum(entries.values()) - limit, need + RESERVE - disk.free)
    evicted: list[Path] = []
    for entry in sorted(entries, key=_last_used):
        old = time.time() - _last_used(entry) > UNUSED
        if (short > 0 or old) and not _in_use(entry):
            evicted.append(entry)
            short -= entries[entry]
    if short <= 0:
        return "", evicted
    return f"{_gb(disk.free)} are free and the limit is {_gb(limit)}", []


def _bytes(entry: Path) -> int:
    found = 0
    with contextlib.suppress(FileNotFoundError):  # another process has just evicted it
        for path in entry.glob("*"):
            found += path.stat().st_size
    return found


def _last_used(entry: Path) -> float:
    return modified(entry / ENTRY) or 0.0


def _in_use(entry: Path) -> bool:
    """Or another user's, which is not ours to remove."""
    try:
        with open(entry / ENTRY, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _gb(size: int) -> str:
    return f"{max(0, size) / 1e9:.1f} GB"


@functools.cache
def _tell(line: str) -> None:
    """Once a process."""
    log.warning("%s", line)


def _tell_slower(folder: StoragePath, why: str) -> None:
    _tell(
        f"{folder}: its images cannot be kept decoded in {cache_folder()} ({why}); they are read "
        "from Parquet, which is slower: free some space, or set ADVERSA_CACHE to a folder on a "
        "larger disk or ADVERSA_CACHE_GB to a higher limit"
    )


def check_room(folder: StoragePath, row_bytes: int) -> None:
    """Say in one line where this machine's cache has no room for the images of a folder: of its
    workers' lines a command that is on Ray shows none.
    """
    digests = _digests(folder)
    rows = sum(tables.each(tables.count, list(digests)))
    try:
        why = "" if _place(digests, "image").exists() else _room(rows * row_bytes)[0]
    except PermissionError as e:  # not even looked into
        why = os.strerror(e.errno or errno.EACCES)
    if why:
        _tell_slower(folder, why)


# ---- one entry -----------------------------------------------------------------------------------


class Entry(NamedTuple):
    """An entry that is open. It is not evicted before `held` is closed."""

    rows: np.ndarray
    ids: np.ndarray  # bytes [N]
    checksums: np.ndarray  # uint32 [N]
    counts: list[int]  # rows of each part
    held: int


class _Damaged(OSError):
    """Of an entry: it is not what was written."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "the disk gives back other bytes than were written")


def _place(digests: dict[StoragePath, str], column: Column) -> Path:
    """Where the entry of these parts is, or would be."""
    named = (f"{p.name} {known}" for p, known in digests.items())
    return cache_folder() / digest(FORMAT, column, *named, size=16)


def _digests(folder: StoragePath) -> dict[StoragePath, str]:
    """The digest of each part, in order: as the manifest of its step lists it, or, of parts that
    are listed nowhere, as they are.
    """
    paths = tables.parts(folder)
    listed = (files.read_json(folder / files.MANIFEST) or {}).get("files", {})
    if not any(p.name in listed for p in paths):
        above = (files.read_json(folder.parent / files.MANIFEST) or {}).get("files", {})
        listed = {p.name: above.get(f"{folder.name}/{p.name}") for p in paths}
    return {p: (listed.get(p.name) or {}).get("digest") or files.sha256(p) for p in paths}


def _load(place: Path) -> Entry | None:
    """An entry of the cache, from now on in use; None where there is none."""
    try:
        held = os.open(place / ENTRY, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if place.exists():
            raise _Damaged from None
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_SH)
    except OSError:  # a file system without locks
        os.close(held)
        raise
    try:
        meta = json.loads((place / ENTRY).read_bytes())  # once.py is for files of a run alone
        index = np.load(place / INDEX)
        rows = np.asarray(np.load(place / ROWS, mmap_mode="r"))
        same = meta.get("index") == files.sha256(place / INDEX)
        if not same or {len(rows), sum(meta["counts"])} != {len(index)}:
            raise ValueError
        with contextlib.suppress(OSError):  # of a cache that is only read, or another user's
            os.utime(place / ENTRY)
        ids, checksums = (np.ascontiguousarray(index[k]) for k in ("id", "crc"))
        return Entry(rows, ids, checksums, list(meta["counts"]), held)
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError):
        os.close(held)
        raise _Damaged from None


def _build(place: Path, digests: dict[StoragePath, str], column: Column) -> str:
    """Decode the rows of all parts into an entry; "", or why there is no room. The caller holds the
    cache's lock. UserError where a part has another digest: it would pass for the one that has it.
    """
    for left in place.parent.glob(".new-*"):  # of a process that died
        shutil.rmtree(left, ignore_errors=True)
    counts = tables.each(tables.count, list(digests))
    made = place.parent / f".new-{place.name}"
    made.mkdir()
    index: list[tuple[bytes, int]] = []
    shape: tuple[int, ...] = ()
    try:
        with open(made / ROWS, "wb") as file:
            for path, ids, images in _decoded(digests, column):
                if not index:
                    shape = images.shape[1:]
                    why, evicted = _room(sum(counts) * (images[0].nbytes + 64))
                    if why:
                        return why
                    for entry in evicted:
                        shutil.rmtree(entry)
                    kind = {"descr": images.dtype.str, "fortran_order": False}
                    np.lib.format.write_array_header_1_0(
                        file, kind | {"shape": (sum(counts), *shape)}
                    )
                if images.shape[1:] != shape:
                    raise UserError(
                        f"{path} has images of {images.shape[1:]}, others {shape}; prepare "
                        "them anew"
                    )
                index += zip(ids, map(crc32, images), strict=True)
                file.write(images.data.cast("B"))
        widest = max(len(i) for i, _ in index)
        np.save(made / INDEX, np.array(index, [("id", f"S{widest}"), ("crc", "<u4")]))
        about = {"index": files.sha256(made / INDEX), "counts": counts}
        files.write_json(made / ENTRY, about)
        os.rename(made, place)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return ""


def _decoded(
    digests: dict[StoragePath, str], column: Column
) -> Iterator[tuple[StoragePath, list[bytes], np.ndarray]]:
    """(part, ids, rows) of each group of rows, decoded by all CPUs."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if has_affinity else None) as pool:
        for path, known in digests.items():
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != known:
                raise UserError(
                    f"{path} holds other bytes than were written; put the file back as it was, or "
                    "delete its step's folder: the same command makes it again"
                )
            with tables.opened(path, content) as file:
                for group in range(file.num_row_groups):
                    data = file.read_row_group(group, columns=[_id_column(file), column])
                    some = [
                        data[column].slice(i, DECODED_AT_ONCE)
                        for i in range(0, len(data), DECODED_AT_ONCE)
                    ]
                    if some:
                        rows = list(pool.map(functools.partial(_decode, column), some))
                        yield path, _as_bytes(data[0]), np.concatenate(rows)


def _decode(column: Column, data: pa.ChunkedArray) -> np.ndarray:
    return tables.decode_images(data) if column == "image" else tables.decode_latents(data)


def _id_column(file: pa.parquet.ParquetFile) -> str:
    return "id" if "id" in file.schema_arrow.names else "request_id"


def _as_bytes(ids: pa.ChunkedArray) -> list[bytes]:
    return [i.encode() for i in ids.to_pylist()]


# ---- what is read --------------------------------------------------------------------------------


class RoleArray:
    """The images of a role, or of a round's generated images, or latents, by the number of their
    row, parts in order.
    """

    def __init__(self, folder: StoragePath, column: Column = "image", build: bool = True) -> None:
        """build: decode all rows where this machine has not yet; for those who read few, False."""
        self.folder, self.column, self._digests = folder, column, _digests(folder)
        self.paths, self._place = list(self._digests), _place(self._digests, column)
        self._entry: Entry | None = None
        self._repaired = False
        self._open(build)
        if self._entry is None:
            found = tables.each(_ids, self.paths)
            self.ids, counts = np.concatenate([np.zeros(0, "S1"), *found]), list(map(len, found))
        else:
            self.ids, counts = self._entry.ids, self._entry.counts
        self._starts = np.cumsum([0, *counts])

    def part(self, name: str) -> np.ndarray:
        """The rows of one part."""
        at = [p.name for p in self.paths].index(name)
        return self.take(np.arange(self._starts[at], self._starts[at + 1]))

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows, at most tables.ROW_GROUP of a part at a time."""
        for first, end in zip(self._starts[:-1], self._starts[1:], strict=True):
            for i in range(first, end, tables.ROW_GROUP):
                yield self.take(np.arange(i, min(i + tables.ROW_GROUP, end)))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """A copy of the rows with these numbers [B >= 1], in their order."""
        entry = self._entry
        if entry is None:
            return self._from_parquet(rows)
        out = np.empty((len(rows), *entry.rows.shape[1:]), entry.rows.dtype)
        for k in np.argsort(rows, kind="stable"):  # in the order in which they lie
            row = rows[k]
            out[k] = entry.rows[row]
            if not self._sound[row]:
                if crc32(out[k]) != entry.checksums[row]:
                    self._repair()
                    return self.take(rows)
                self._sound[row] = True
        return out

    def _from_parquet(self, rows: np.ndarray) -> np.ndarray:
        """The same from Parquet: nothing but these rows is decoded."""
        wanted, back = np.unique(rows, return_inverse=True)
        found = []
        for path, first, end in zip(self.paths, self._starts[:-1], self._starts[1:], strict=True):
            inside = wanted[(wanted >= first) & (wanted < end)] - first
            if not len(inside):
                continue
            with tables.opened(path) as file:
                sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                edges = np.cumsum([0, *sizes])
                for group in np.unique(np.searchsorted(edges, inside, side="right") - 1).tolist():
                    here = inside[(inside >= edges[group]) & (inside < edges[group + 1])]
                    data = file.read_row_group(group, columns=[self.column]).column(0)
                    found.append(_decode(self.column, data.take(pa.array(here - edges[group]))))
        return np.concatenate(found)[back]

    def _open(self, build: bool) -> None:
        try:
            self._entry = self._loaded(build) if self.paths else None
        except OSError as e:
            if isinstance(e, UserError):
                raise
            self._entry = None
            _tell_slower(self.folder, e.strerror or str(e))
        if self._entry is not None:
            self._sound = np.zeros(len(self._entry.ids), bool)
            self._close = weakref.finalize(self, os.close, self._entry.held)

    def _loaded(self, build: bool) -> Entry | None:
        """The entry, made or made anew where that is called for."""
        with contextlib.suppress(_Damaged):
            if (found := _load(self._place)) or not build:
                return found
        self._place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._place.parent / ".lock", fallback_to_soft=False):
            try:
                if found := _load(self._place):  # made by another process
                    return found
            except _Damaged:
                self._tell_damaged()
                shutil.rmtree(self._place)
            if not sum(tables.each(tables.count, self.paths)):
                return None
            if why := _build(self._place, self._digests, self.column):
                _tell_slower(self.folder, why)
                return None
            return _load(self._place)

    def _repair(self) -> None:
        """After damage in a row: a new entry, unless another process has made one already. Once."""
        assert self._entry is not None
        try:
            with FileLock(self._place.parent / ".lock", fallback_to_soft=False):
                ours = os.fstat(self._entry.held).st_ino
                if (path := self._place / ENTRY).exists() and path.stat().st_ino == ours:
                    self._tell_damaged()
                    shutil.rmtree(self._place)
        except OSError as e:  # the entry stays as it is: a cache that is only read, say
            self._close()
            self._entry = None
            _tell_slower(self.folder, e.strerror or str(e))
            return
        self._close()
        self._open(build=not self._repaired)
        self._repaired = True

    def _tell_damaged(self) -> None:
        log.warning("%s is damaged: made anew from %s", self._place, self.folder)


def _ids(path: StoragePath) -> np.ndarray:
    """The ids of a part, as bytes: a tenth of what a dict of strings takes."""
    with tables.opened(path) as file:
        ids = file.read(columns=[_id_column(file)]).column(0)
    return np.array(_as_bytes(ids), dtype="S")
