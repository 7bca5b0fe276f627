"""Where a run lies: a local folder as a `pathlib.Path`, or a folder of an object store as a
`Remote`, which is used like one.

An object store has no renaming and no appending. It has puts: a reader sees the old object or the
new one, never a part. So a file of a run is written whole, by one put, and what marks a step as
finished is put last (docs/storage.md).

Credentials come from the environment's own chain alone (variables, profiles, roles: what the AWS
and Google clients look at). A URI that carries some is refused, and no error shows any.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from adversa.types import UserError

# What a URI's query may say: where the store is and how it is spoken to, nothing that proves who
# asks.
OPTIONS = frozenset(
    [
        "endpoint_override",
        "scheme",
        "region",
        "force_virtual_addressing",
        "project_id",
        "retry_limit_seconds",
        "enable_tls",
        "blob_storage_authority",
        "dfs_storage_authority",
    ]
)
# Stores whose puts are whole. Others that pyarrow knows (hdfs) show a file while it is written.
SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss")
# pyarrow gives a request 3 seconds, which a long listing does not keep; and tries again for a
# minute where there is no network.
TIMEOUTS = {"connect_timeout": 10, "request_timeout": 60}
ATTEMPTS = 4
SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_KEY",
    "AZURE_CLIENT_SECRET",
)


class StoreError(UserError, OSError):
    """What an object store said against a request, in one line: a UserError, and an OSError to
    those who can wait and try again.
    """


@dataclass(frozen=True, order=True)
class Remote:
    """A file or folder of an object store: the part of pathlib's interface that adversa uses, with
    its exceptions.

    StoreError where the store refuses or cannot be reached. Pickled as the names it is made of:
    whoever unpickles it uses the credentials of its own environment. query: how the store is spoken
    to (OPTIONS).
    """

    scheme: str
    authority: str  # the bucket, or what else stands for it
    key: PurePosixPath
    query: str = ""

    def __str__(self) -> str:
        path = "" if self.key == PurePosixPath() else f"/{self.key}"
        return f"{self.scheme}://{self.authority}{path}" + (f"?{self.query}" if self.query else "")

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    # ---- names: no request -----------------------------------------------------------------------

    def __truediv__(self, name: str | PurePosixPath) -> Remote:
        return replace(self, key=self.key / name)

    @property
    def name(self) -> str:
        return self.key.name or self.authority

    @property
    def stem(self) -> str:
        return self.key.stem

    @property
    def suffix(self) -> str:
        return self.key.suffix

    @property
    def parts(self) -> tuple[str, ...]:
        return (f"{self.scheme}://{self.authority}", *self.key.parts)

    @property
    def parent(self) -> Remote:
        return replace(self, key=self.key.parent)

    @property
    def parents(self) -> tuple[Remote, ...]:
        return tuple(replace(self, key=p) for p in self.key.parents)

    def with_name(self, name: str) -> Remote:
        return replace(self, key=self.key.with_name(name))

    def with_suffix(self, suffix: str) -> Remote:
        return replace(self, key=self.key.with_suffix(suffix))

    def as_posix(self) -> str:
        return str(self)

    def absolute(self) -> Remote:
        return self

    resolve = absolute

    def relative_to(self, other: Place) -> PurePosixPath:
        if not isinstance(other, Remote) or replace(other, key=self.key) != self:
            raise ValueError(f"{self} is not in the subpath of {other}")
        return self.key.relative_to(other.key)

    def is_relative_to(self, other: Place) -> bool:
        return (
            isinstance(other, Remote)
            and replace(other, key=self.key) == self
            and self.key.is_relative_to(other.key)
        )

    # ---- what is there ---------------------------------------------------------------------------

    @property
    def store(self) -> tuple[pafs.FileSystem, str]:
        """The filesystem, and what it calls this place."""
        with asking(self):
            filesystem, base = _store(self.scheme, self.authority, self.query)
        return filesystem, str(PurePosixPath(base) / self.key)

    def _kind(self) -> pafs.FileType:
        filesystem, path = self.store
        with asking(self):
            return filesystem.get_file_info(path).type

    def exists(self) -> bool:
        return self._kind() != pafs.FileType.NotFound

    def is_file(self) -> bool:
        return self._kind() == pafs.FileType.File

    def is_dir(self) -> bool:
        return self._kind() == pafs.FileType.Directory

    def _list(self, deep: bool, missing_ok: bool) -> list[tuple[Remote, bool]]:
        """(what lies in the folder, whether it is a folder itself), by name."""
        filesystem, path = self.store
        with asking(self):
            found = filesystem.get_file_info(
                pafs.FileSelector(path, recursive=deep, allow_not_found=missing_ok)
            )
        inside = [
            (PurePosixPath(i.path).relative_to(path), i.type == pafs.FileType.Directory)
            for i in found
        ]
        return [(replace(self, key=self.key / name), folder) for name, folder in sorted(inside)]

    def iterdir(self) -> Iterator[Remote]:
        return iter([p for p, _ in self._list(deep=False, missing_ok=False)])

    def glob(self, pattern: str) -> Iterator[Remote]:
        """Level by level: one listing for each folder that a wild card stands for."""
        head, _, rest = pattern.partition("/")
        if not re.search(r"[*?\[]", head):
            below = self / head
            yield from below.glob(rest) if rest else [below] * below.exists()
            return
        for path, folder in self._list(deep=False, missing_ok=True):
            if fnmatchcase(path.name, head) and (folder or not rest):
                yield from path.glob(rest) if rest else [path]

    def rglob(self, pattern: str) -> Iterator[Remote]:
        """One listing, however deep. pattern: of a name, without a slash."""
        assert "/" not in pattern, pattern
        yield from (
            p for p, _ in self._list(deep=True, missing_ok=True) if fnmatchcase(p.name, pattern)
        )

    # ---- whole files -----------------------------------------------------------------------------

    def open(self) -> pa.NativeFile:
        """To read from anywhere in it. FileNotFoundError where it is not. What it reads is to be
        wrapped in `asking`.
        """
        filesystem, path = self.store
        with asking(self):
            return filesystem.open_input_file(path)

    def read_bytes(self) -> bytes:
        with asking(self), self.open() as file:
            return file.readall()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes | memoryview) -> None:
        """One put: afterwards the object is there whole; where this raises, it is as it was before.

        In a thread of its own, which no signal reaches: a stream that Ctrl-C drops between its
        opening and its writing is closed by pyarrow, and an empty object lies there. What is
        interrupted waits for it: what comes next may be put in the same place.
        """
        failure: list[BaseException] = []
        ended = (
            threading.Event()
        )  # Thread.join, once interrupted, takes a thread for ended that is not

        def send() -> None:
            try:
                with asking(self):
                    filesystem, path = self.store
                    stream = filesystem.open_output_stream(path)
                    stream.write(data)
                    stream.close()
            except BaseException as e:  # raised below, whatever it is
                failure.append(e)
            finally:
                ended.set()

        threading.Thread(target=send).start()
        try:
            ended.wait()
        except BaseException:
            ended.wait()
            raise
        if failure:
            raise failure[0]

    def touch(self) -> None:
        """An empty file."""
        self.write_bytes(b"")

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there as long as something lies in it."""

    def rmdir(self) -> None:
        """Nothing: a folder has gone with the last that lay in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        filesystem, path = self.store
        with asking(self), contextlib.suppress(*[FileNotFoundError] * missing_ok):
            filesystem.delete_file(path)


Place = (
    Path | Remote
)  # where a signature says Path and means a place in a run, a Remote does as well


# ---- from text -----------------------------------------------------------------------------------


def place(where: str | Place) -> Place:
    """A path, or a URI of an object store (SCHEMES); UserError where it can't be used."""
    if isinstance(where, Path | Remote):
        return where
    if not (found := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", where)):
        return Path(where)
    scheme, rest = found[1].lower(), where[found.end() :]
    if scheme == "file":
        return Path(unquote("/" + rest.partition("/")[2]))
    bare, _, query = rest.partition("?")
    authority, _, key = bare.partition("/")
    shown = f"{scheme}://{authority.rpartition('@')[2]}/{key}".rstrip("/")
    if scheme not in SCHEMES:
        raise UserError(
            f"{shown}: a run lies in a local folder or an object store "
            f"({', '.join(f'{s}://' for s in SCHEMES)})"
        )
    if "@" in authority and (
        scheme not in ("abfs", "abfss") or ":" in authority
    ):  # there container@account is a name
        raise UserError(
            f"{shown}: an address must not carry credentials; take out what stands before "
            "the @, and put it where the store's own "
            "tools look for it (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, a role)"
        )
    options = parse_qsl(query, keep_blank_values=True)
    if other := sorted({name for name, _ in options} - OPTIONS):
        raise UserError(
            f"{shown}: unknown option {_plain(other[0])}; known: "
            f"{', '.join(sorted(OPTIONS))}; credentials never"
        )
    if any("@" in value for _, value in options):
        raise UserError(
            f"{shown}: an option has an @ in it; give an endpoint as HOST:PORT, credentials never"
        )
    if not authority:
        raise UserError(f"{shown}: it names no bucket; write {scheme}://BUCKET/FOLDER")
    return Remote(
        scheme, authority, PurePosixPath(key.strip("/")), urlencode(sorted(options), safe=":/")
    )


def _plain(name: str) -> str:
    """An option's name, unless it may be a key that lost its name."""
    return name if re.fullmatch(r"[a-z_]{1,40}", name) else "(not a name)"


@cache
def _store(scheme: str, authority: str, query: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a bucket, one a process, and what it calls the bucket."""
    if scheme == "s3":
        return _s3(authority, dict(parse_qsl(query))), authority
    try:
        return pafs.FileSystem.from_uri(f"{scheme}://{authority}/" + (f"?{query}" if query else ""))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
        raise StoreError(
            f"{scheme}://{authority}: pyarrow cannot use it ({scrubbed(str(e))[:200]}); "
            "mend the address"
        ) from None


def _s3(bucket: str, options: dict[str, str]) -> pafs.S3FileSystem:
    """pyarrow reads the chain of credentials by itself, and neither AWS_ENDPOINT_URL nor where a
    bucket is.
    """
    override = options.get("endpoint_override")
    if not override and (
        url := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    ):
        split = urlsplit(url)
        override = split.netloc.rpartition("@")[2] + split.path.rstrip("/")
        options = {"scheme": split.scheme} | options
    region = (
        options.get("region")
        or os.environ.get("AWS_REGION")
        or os.environ.get("AWS_DEFAULT_REGION")
    )
    if not region:
        region = "us-east-1" if override else pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        endpoint_override=override,
        scheme=options.get("scheme", "https"),
        region=region,
        force_virtual_addressing=options.get("force_virtual_addressing", "").lower() == "true",
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        # one put for what is small, where an upload in parts would take three requests
        allow_delayed_open=True,
        **TIMEOUTS,
    )


# ---- what a store says ---------------------------------------------------------------------------

AGAIN = "run the same command again, finished parts are kept"
_KEYS = "the credentials of the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, a role)"
FIXES = {
    "NO_SUCH_BUCKET": ("there is no such bucket", "make it, or correct the name"),
    "ACCESS_DENIED": ("access denied", f"{_KEYS} must allow to read, put, list and delete there"),
    "INVALID_ACCESS_KEY_ID": ("the store does not know the key", f"mend {_KEYS}"),
    "SIGNATURE_DOES_NOT_MATCH": ("the store refuses the key", f"mend {_KEYS}"),
    "EXPIRED_TOKEN": ("the credentials have expired", f"renew {_KEYS}, then {AGAIN}"),
    "NETWORK_CONNECTION": (
        "the store cannot be reached",
        f"look at the network and at the endpoint, then {AGAIN}",
    ),
    "SLOW_DOWN": ("the store asks to slow down", AGAIN),
}


@contextlib.contextmanager
def asking(path: Place) -> Iterator[None]:
    """Turn what pyarrow raises about a remote place into FileNotFoundError or StoreError. Of a
    local one nothing is touched.
    """
    try:
        yield
    except StoreError:
        raise
    except FileNotFoundError:
        if not isinstance(path, Remote):
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except OSError as e:
        if not isinstance(path, Remote):
            raise
        raise StoreError(f"{path}: {_why(e)}") from None


def _why(e: OSError) -> str:
    found = re.search(r"AWS Error (\w+)(.*?) during (\w+) operation", str(e))
    if found is None:
        return f"the store failed ({scrubbed(str(e))[:300]}); {AGAIN}"
    code, status, operation = found.groups()
    if code == "UNKNOWN" and "403" in status:
        code = "ACCESS_DENIED"
    cause, fix = FIXES.get(code, (f"the store failed ({code}{status})", AGAIN))
    return f"{cause} in {operation}; {fix}"


def scrubbed(text: str) -> str:
    """In one line, and without the environment's credentials, or what looks like an AWS key."""
    for value in (os.environ.get(name) for name in SECRETS):
        if value:
            text = text.replace(value, "***")
    return " ".join(re.sub(r"\b(AKIA|ASIA)[A-Z0-9]{12,}\b", "***", text).split())


# ---- what pathlib and shutil do for a local folder -----------------------------------------------


def source(path: Place) -> Any:
    """What pyarrow.parquet reads from: of a remote file only the asked parts are fetched."""
    return path.open() if isinstance(path, Remote) else path


def names(folder: Place) -> set[str]:
    """What lies in a folder, by one listing; nothing where there is none."""
    if isinstance(folder, Remote):
        return {p.name for p, _ in folder._list(deep=False, missing_ok=True)}
    return set(os.listdir(folder)) if folder.exists() else set()


def modified(path: Place) -> float | None:
    """When a file was last written, in Unix seconds by its storage's clock; None where it is
    not.
    """
    if isinstance(path, Remote):
        filesystem, name = path.store
        with asking(path):
            found = filesystem.get_file_info(name)
        return None if found.mtime is None else found.mtime.timestamp()
    return path.stat().st_mtime if path.exists() else None


def append(path: Place, text: str) -> None:
    """Add to a file that one process alone writes, and that is small: on an object store it is put
    anew.
    """
    if isinstance(path, Remote):
        try:
            before = path.read_bytes()
        except FileNotFoundError:
            before = b""
        path.write_bytes(before + text.encode())
        return
    with open(path, "a") as f:
        f.write(text)


def rmtree(folder: Place, missing_ok: bool = False) -> None:
    """Remove a folder with all in it. missing_ok: no fault is told, as of what is only in the
    way.
    """
    if not isinstance(folder, Remote):
        shutil.rmtree(folder, ignore_errors=missing_ok)
        return
    filesystem, path = folder.store
    with contextlib.suppress(*[OSError] * missing_ok), asking(folder):
        filesystem.delete_dir(path)


def move(old: Place, new: Place, last: str = "") -> None:
    """Rename a file or a folder of one run. On an object store file by file, each copied before it
    is removed; `last` (a file's name) comes after all others: done again after a cut, with the same
    names, it goes on.
    """
    if not isinstance(old, Remote) or not isinstance(new, Remote):
        shutil.move(old, new)
        return
    inside = [p for p, folder in old._list(deep=True, missing_ok=True) if not folder]
    for path in sorted(inside, key=lambda p: (p.name == last, p)) or [old]:
        target = new / path.relative_to(old) if inside else new
        (filesystem, source), (_, destination) = path.store, target.store
        with asking(path):
            filesystem.copy_file(source, destination)
            filesystem.delete_file(source)
    if inside:
        rmtree(old, missing_ok=True)


@contextlib.contextmanager
def scratch(folder: Place) -> Iterator[Path]:
    """A local folder for files that are read and written in pieces: the folder itself, or a
    temporary one where it is remote.
    """
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="adversa-") as temporary:
        yield Path(temporary)
