"""Files and zip members behind one kind of name, a uri: "file:PATH" or "zip:ZIP!MEMBER". Nothing is
ever extracted.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from pathlib import Path

from adversa.types import UserError

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
# Companions of pictures that no one expects to be read as one.
OTHERS = (
    ".txt",
    ".md",
    ".csv",
    ".tsv",
    ".json",
    ".yaml",
    ".yml",
    ".xml",
    ".html",
    ".pdf",
    ".db",
    ".ini",
    ".log",
)

IRREGULAR = "no regular file (a pipe, a device or a folder)"


def printable(text: str, most: int = 200) -> str:
    """A name from a file or a table on one line: control characters escaped, long ones cut."""
    clean = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text
    )
    return clean if len(clean) <= most else clean[: most - 3] + "..."


def _stop(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename}: {error.strerror}; check its permissions")


def walk(root: Path) -> set[str]:
    """Names (relative, with /) of the files below `root`, links to folders followed once, hidden
    folders left out.
    """
    found: set[str] = set()
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=_stop, followlinks=True):
        inside = Path(folder).relative_to(root)
        real = os.path.realpath(folder)
        if real in seen:
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found.update((inside / n).as_posix() for n in names)
    return found


class Reader:
    """Reads uris; keeps each zip open (in the process that opened it: a forked child opens its
    own).
    """

    def __init__(self, most_bytes: int = 1 << 31) -> None:
        self.most_bytes = most_bytes
        self._open: dict[tuple[int, str], zipfile.ZipFile] = {}

    def __call__(self, uri: str) -> bytes:
        """The bytes. OSError (with one line of text) where they cannot be read or are more than
        `most_bytes`.
        """
        kind, _, rest = uri.partition(":")
        if kind == "file":
            found = os.stat(rest)
            if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
                raise OSError(IRREGULAR)
            if found.st_size > self.most_bytes:
                raise OSError(f"{found.st_size} bytes, more than {self.most_bytes}")
            return Path(rest).read_bytes()
        assert kind == "zip", uri
        path, _, member = rest.partition(".zip!") if ".zip!" in rest else rest.partition("!")
        path = path + ".zip" if ".zip!" in rest else path
        try:
            key = (os.getpid(), path)
            if key not in self._open:
                self._open[key] = zipfile.ZipFile(path)
            info = self._open[key].getinfo(member)
            if (
                info.file_size > self.most_bytes
            ):  # zipfile stops at the stated size, so the statement can be trusted
                raise OSError(f"{info.file_size} bytes, more than {self.most_bytes}")
            return self._open[key].read(info)
        except KeyError:
            raise FileNotFoundError(f"{member} is not in {path}") from None
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as e:
            raise OSError(f"damaged or encrypted in the archive: {e}") from None


def read(uri: str) -> bytes:
    """One file of metadata; UserError where it cannot be read."""
    try:
        return Reader()(uri)
    except OSError as e:
        raise UserError(
            f"cannot read {uri.partition(':')[2]}: {e.strerror or e}; check the file and "
            "its permissions"
        ) from None
