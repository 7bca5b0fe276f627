"""Storage paths: a local folder as a `pathlib.Path`, a folder of an object store as a `BucketPath`
(a `UPath` over fsspec), which is used like one.

An object store has no renaming and no appending. It has puts: a reader sees the old object or the
new one, never a part. So a file of a run is written whole, by one put, and what marks a step as
finished is put last (docs/storage.md).

Credentials come from the environment's own chain alone (variables, profiles, roles: what the AWS,
Google and Azure clients look at). A URI that carries some is refused, and no error shows any.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlencode

from upath.implementations.cloud import CloudPath

from adversa.storage import once
from adversa.storage.hub import unreachable
from adversa.types import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# What a URI's query may say: where the store is and how it is spoken to, nothing that proves who
# asks.
OPTIONS = frozenset(
    [
        "endpoint_override",
        "scheme",
        "region",
        "force_virtual_addressing",
        "project_id",
        "account_name",
    ]
)
# Stores whose puts are whole, and the extra of this package that each needs.
SCHEMES = {"s3": "s3", "gs": "gcs", "gcs": "gcs"} | dict.fromkeys(("az", "abfs", "abfss"), "azure")
# The hosts that a user's token is for, and what of the environment binds it to another.
TOKEN_HOSTS = {
    "gcs": (r"googleapis\.com", "STORAGE_EMULATOR_HOST"),
    "azure": (
        r"core\.(?:windows\.net|usgovcloudapi\.net|chinacloudapi\.cn)",
        "AZURE_STORAGE_CONNECTION_STRING",
    ),
}
LOOPBACK = r"localhost|127\.0\.0\.1|\[::1\]"
# s3fs gives a request 15 seconds, which a long listing does not keep, and tries five times what
# botocore has tried five times.
TIMEOUTS = {"connect_timeout": 10, "read_timeout": 60}
ATTEMPTS = 4
SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_CLIENT_SECRET",
)


class StoreError(UserError, OSError):
    """What an object store said against a request, in one line: a UserError, and an OSError to
    those who can wait and try again.
    """


class BucketPath(CloudPath):
    """A file or folder of an object store, with pathlib's interface and exceptions.

    Its one storage option is `query`: how the store is spoken to (OPTIONS), as its URI says it.
    Pickled as its names: whoever unpickles it uses the credentials of its own environment.

    Raises:
        StoreError: where the store refuses or cannot be reached.
    """

    __slots__ = ()

    def __new__(cls, *_: object, **__: object) -> BucketPath:
        return object.__new__(cls)  # UPath would choose a class by the scheme

    @classmethod
    def _parse_storage_options(
        cls, urlpath: str, protocol: str, storage_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        return dict(storage_options)  # UPath would import the store's client, to name a path

    def __str__(self) -> str:
        if self._relative_base is not None:
            return super().__str__()
        query = self.storage_options["query"]
        return f"{self.protocol}://{self.path.rstrip('/')}" + (f"?{query}" if query else "")

    @property
    def fs(self) -> AbstractFileSystem:
        """The filesystem, one a process, whose faults are told as `asking` says."""
        return _Asked(self)

    # ---- what is there: as few requests as it takes ----------------------------------------------

    def iterdir(self) -> Iterator[BucketPath]:
        found = self.fs.ls(self.path, detail=False)
        return iter(sorted(self / name.rpartition("/")[2] for name in found if name != self.path))

    def glob(self, pattern: str) -> Iterator[BucketPath]:  # type: ignore[override]  # fewer options
        """Level by level: one listing for each folder that a wild card stands for."""
        head, _, rest = pattern.partition("/")
        if not re.search(r"[*?\[]", head):
            below = self / head
            yield from below.glob(rest) if rest else [below] * below.exists()
            return
        try:
            found = self.fs.ls(self.path, detail=True)
        except FileNotFoundError:
            return
        for info in sorted(found, key=lambda info: info["name"]):
            name = info["name"].rpartition("/")[2]
            if fnmatchcase(name, head) and (info["type"] == "directory" or not rest):
                yield from (self / name).glob(rest) if rest else [self / name]

    def rglob(self, pattern: str) -> Iterator[BucketPath]:  # type: ignore[override]  # fewer options
        """Files only; one listing, however deep. pattern: of a name, without a slash."""
        assert "/" not in pattern, pattern
        inside = (name.removeprefix(self.path + "/") for name in sorted(self.fs.find(self.path)))
        return (self / name for name in inside if fnmatchcase(name.rpartition("/")[2], pattern))

    # ---- whole files -----------------------------------------------------------------------------

    def read_bytes(self) -> bytes:
        # one GET: to fetch ranges at the same time, s3fs would ask for the size first
        data: bytes = self.fs.cat_file(self.path, max_concurrency=1)
        return data

    def read_text(self, encoding: str = "utf-8") -> str:  # type: ignore[override]  # fewer options
        return self.read_bytes().decode(encoding)

    def write_bytes(  # type: ignore[override]  # an option of its own
        self, data: bytes | memoryview, exclusive: bool = False
    ) -> None:
        """One put: afterwards the object is there whole; where this raises, it is as it was before.

        What is interrupted (Ctrl-C) waits for it: what comes next may be put in the same place.
        exclusive: FileExistsError where there is one already.
        """
        with asking(self):
            fs, mode = filesystem(self), "create" if exclusive else "overwrite"
            put = asyncio.run_coroutine_threadsafe(
                fs._pipe_file(self.path, bytes(data), mode=mode), fs.loop
            )
            try:
                put.result()
            except BaseException:
                concurrent.futures.wait([put])
                raise

    def touch(self) -> None:  # type: ignore[override]  # fewer options
        """An empty file."""
        self.write_bytes(b"")

    def mkdir(self, mode: int = 0, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there as long as something lies in it."""

    def rmdir(self) -> None:  # type: ignore[override]  # fewer options
        """Nothing: a folder has gone with the last that lay in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok:
            self.stat()  # to delete what is not there is no fault to a store
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path)


StoragePath = Path | BucketPath


# ---- from text -----------------------------------------------------------------------------------


def storage_path(where: str | StoragePath) -> StoragePath:
    """A path, or a URI of an object store (SCHEMES); UserError where it can't be used."""
    if isinstance(where, Path | BucketPath):
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
    options = parse_qsl(query, keep_blank_values=True)
    if "@" in authority and SCHEMES[scheme] == "azure" and ":" not in authority:
        authority, _, account = authority.partition("@")  # container@account is a name
        options.append(("account_name", account.partition(".")[0]))
    if "@" in authority:
        raise UserError(
            f"{shown}: an address must not carry credentials; take out what stands before "
            "the @, and put it where the store's own "
            "tools look for it (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, a role)"
        )
    if other := sorted({name for name, _ in options} - OPTIONS):
        plain = re.fullmatch(r"[a-z_]{1,40}", other[0])  # or it may be a key that lost its name
        raise UserError(
            f"{shown}: unknown option {other[0] if plain else '(not a name)'}; known: "
            f"{', '.join(sorted(OPTIONS))}; credentials never"
        )
    if any("@" in value for _, value in options):
        raise UserError(
            f"{shown}: an option has an @ in it; give an endpoint as HOST:PORT, credentials never"
        )
    _check_endpoint(SCHEMES[scheme], shown, dict(options))
    if not authority:
        raise UserError(f"{shown}: it names no bucket; write {scheme}://BUCKET/FOLDER")
    key = "/".join(part for part in key.split("/") if part not in ("", "."))
    return BucketPath(
        f"{scheme}://{authority}/{key}",
        protocol=scheme,
        query=urlencode(sorted(options), safe=":/"),
    )


def _check_endpoint(kind: str, shown: str, options: Mapping[str, str]) -> None:
    """UserError where the user's Google or Azure token would go to another host than those it is
    for, or unencrypted. An S3 client signs its requests, and sends no secret.
    """
    host, account = options.get("endpoint_override", ""), options.get("account_name", "a")
    if not re.fullmatch(r"[A-Za-z0-9-]+", account):  # it is a part of a host's name
        raise UserError(f"{shown}: account_name must be letters and digits")
    if not host or kind == "s3" or re.fullmatch(rf"({LOOPBACK})(:\d+)?", host):
        return
    domains, variable = TOKEN_HOSTS[kind]
    if options.get("scheme", "https") != "https" or not re.fullmatch(
        rf"([a-z0-9-]+\.)*({domains})(:\d+)?", host
    ):
        raise UserError(
            f"{shown}: your token is not sent to what endpoint_override and scheme name; take "
            f"them out, and name an endpoint of your own in {variable}"
        )


def filesystem(path: BucketPath) -> AbstractFileSystem:
    """The fsspec filesystem of a store, one a process. Its clients read the chain of credentials,
    and AWS_ENDPOINT_URL, by themselves.
    """
    import fsspec

    asked = dict(parse_qsl(path.storage_options["query"]))
    host, kind = asked.get("endpoint_override"), SCHEMES[path.protocol]
    url = f"{asked.get('scheme', 'https')}://{host}" if host else None
    options: dict[str, Any]
    if kind == "s3":
        retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
        style = "virtual" if asked.get("force_virtual_addressing", "").lower() == "true" else "auto"
        config = TIMEOUTS | {"retries": retries, "s3": {"addressing_style": style}}
        region = asked.get("region") or os.environ.get("AWS_REGION")
        client = {"region_name": region} if region else {}
        options = {"endpoint_url": url, "config_kwargs": config, "client_kwargs": client}
    elif kind == "gcs":
        options = {"endpoint_url": url, "project": asked.get("project_id")}
    else:
        options = {"account_host": host, "account_name": asked.get("account_name")}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        found = fsspec.filesystem(path.protocol, use_listings_cache=False, **given)
    except ImportError:
        raise StoreError(
            f"{path}: the store's client is not installed; pip install 'adversa[{kind}]'"
        ) from None
    if kind == "s3":
        found.retries = 1  # botocore tries again
    return found


class _Asked:
    """A filesystem whose methods tell their faults of `path` as `asking` says."""

    def __init__(self, path: BucketPath) -> None:
        self.path, self.filesystem = path, filesystem(path)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.filesystem, name)

        def ask(*args: object, **options: object) -> object:
            with asking(self.path):
                return method(*args, **options)

        return ask


# ---- what a store says ---------------------------------------------------------------------------

AGAIN = "run the same command again, finished parts are kept"
_KEYS = "the credentials of the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, a role)"
_DENIED = ("access denied", f"{_KEYS} must allow to read, put, list and delete there")
_BUSY = ("the store asks to slow down", AGAIN)
_NO_KEY = ("there are no credentials", f"set {_KEYS}")
FIXES = {
    "NoSuchBucket": ("there is no such bucket", "make it, or correct the name"),
    "AccessDenied": _DENIED,
    "PermissionError": _DENIED,
    "403": _DENIED,
    "InvalidAccessKeyId": ("the store does not know the key", f"fix {_KEYS}"),
    "SignatureDoesNotMatch": ("the store refuses the key", f"fix {_KEYS}"),
    "ExpiredToken": ("the credentials have expired", f"renew {_KEYS}, then {AGAIN}"),
    "SlowDown": _BUSY,
    "503": _BUSY,
    "429": _BUSY,
    "NoCredentialsError": _NO_KEY,
    "DefaultCredentialsError": _NO_KEY,
    "ClientAuthenticationError": _NO_KEY,
}
# Whose exceptions are a store's, where they are no OSError.
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "adlfs", "azure")


@contextlib.contextmanager
def asking(path: StoragePath) -> Iterator[None]:
    """Turn what a store's client raises into FileNotFoundError, FileExistsError or StoreError. Of a
    local path nothing is touched.
    """
    try:
        yield
    except Exception as e:
        theirs = isinstance(e, OSError) or type(e).__module__.partition(".")[0] in CLIENTS
        if isinstance(path, Path) or isinstance(e, StoreError) or not theirs:
            raise
        code, request = _code(e)
        if isinstance(e, FileNotFoundError) and code != "NoSuchBucket":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        if isinstance(e, FileExistsError) or code == "ConditionalRequestConflict":
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        if unreachable(e) or re.search("Connect|Timeout|Disconnect", type(e).__name__):
            found = (
                "the store cannot be reached",
                f"look at the network and the endpoint; {AGAIN}",
            )
        else:
            said = f"the store failed ({code}: {scrubbed(str(e))[:300]})"
            found = FIXES.get(code, (said, AGAIN))
        raise StoreError(f"{path}: {found[0]}{request}; {found[1]}") from None


def _code(e: Exception) -> tuple[str, str]:
    """What the store, or its client, calls a fault; and " in " the request that met with it."""
    told = e.__cause__ or e  # s3fs makes an OSError of what botocore raised
    answer = getattr(told, "response", None)
    if isinstance(answer, dict):
        return answer.get("Error", {}).get("Code", ""), f" in {getattr(told, 'operation_name', '')}"
    return str(getattr(told, "status_code", getattr(told, "code", type(told).__name__))), ""


def scrubbed(text: str) -> str:
    """In one line, and without the environment's credentials, or what looks like some."""
    for value in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(value, "***")
    text = re.sub(r"\b(AKIA|ASIA)[A-Z0-9]{12,}\b", "***", text)
    return " ".join(re.sub(r"//[^/@\s]+@", "//***@", text).split())


# ---- what pathlib and shutil do for a local folder -----------------------------------------------


def source(path: StoragePath) -> Path | IO[bytes]:
    """What pyarrow.parquet reads from: of a remote file only the asked parts are fetched."""
    return path if isinstance(path, Path) else path.open("rb", cache_type="none")


def names(folder: StoragePath) -> set[str]:
    """What lies in a folder, by one listing; nothing where there is none."""
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()


def matching(folder: StoragePath, pattern: str) -> list[StoragePath]:
    """What a pattern of names ("round-*/hard") finds in a folder, sorted."""
    found: Iterator[StoragePath] = folder.glob(pattern)
    return sorted(found)


def relative(path: StoragePath, folder: StoragePath) -> str:
    """The name of a path in a folder that it lies in: "train/part-00000.parquet"."""
    if isinstance(path, Path):
        assert isinstance(folder, Path), (path, folder)
        return path.relative_to(folder).as_posix()
    assert isinstance(folder, BucketPath), (path, folder)
    return path.relative_to(folder).as_posix()


def sizes(folder: StoragePath) -> dict[str, int]:
    """Bytes of every file below a folder, by its name in it ("train/part-00000.parquet"); one
    listing of an object store. Empty where there is none.
    """
    if isinstance(folder, BucketPath):
        found = folder.fs.find(folder.path, detail=True)
        return {name.removeprefix(f"{folder.path}/"): i["size"] for name, i in found.items()}
    inside = (p for p in folder.rglob("*") if p.is_file())
    return {relative(p, folder): p.stat().st_size for p in inside}


def modified(path: StoragePath) -> float | None:
    """When a file was last written, in Unix seconds by its storage's clock; None where it is
    not.
    """
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def append(path: StoragePath, text: str) -> None:
    """Add to a file that one process alone writes, and that is small: on an object store it is put
    anew.
    """
    if isinstance(path, Path):
        with open(path, "a") as f:
            f.write(text)
        return
    before = b""
    with contextlib.suppress(FileNotFoundError):
        before = path.read_bytes()
    path.write_bytes(before + text.encode())


def rmtree(folder: StoragePath, missing_ok: bool = False) -> None:
    """Remove a folder with all in it. missing_ok: no fault is told, as of what is only in the
    way.
    """
    with contextlib.suppress(*[OSError] * missing_ok):
        if isinstance(folder, Path):
            shutil.rmtree(folder, ignore_errors=missing_ok)
        else:
            folder.fs.rm(folder.path, recursive=True)
    once.forget(folder)


def move(old: StoragePath, new: StoragePath, last: str = "") -> None:
    """Rename a file or a folder of one run. On an object store file by file, each copied before it
    is removed; `last` (a file's name) comes after all others: done again after a cut, with the same
    names, it goes on.
    """
    if isinstance(old, Path):
        assert isinstance(new, Path), (old, new)
        shutil.move(old, new)
    else:
        assert isinstance(new, BucketPath), (old, new)
        inside = sorted(old.rglob("*"), key=lambda path: (path.name == last, path))
        for path in inside or [old]:
            target = new / path.relative_to(old) if inside else new
            path.fs.cp_file(path.path, target.path)
            path.unlink(missing_ok=True)
    once.forget(old)


@contextlib.contextmanager
def scratch(folder: StoragePath) -> Iterator[Path]:
    """A local folder for files that are read and written in pieces: the folder itself, or a
    temporary one where it is remote.
    """
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="adversa-") as temporary:
        yield Path(temporary)
