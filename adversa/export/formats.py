"""Images with their rows as files: an image folder, Parquet, or tar shards as WebDataset reads
them.

Whatever is there and whole is left alone, in every form: that is how an export resumes. The same
rows make the same bytes.
"""

from __future__ import annotations

import contextlib
import csv
import filecmp
import io
import json
import os
import re
import tarfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from adversa.export import dataset_card
from adversa.export.dataset_card import FOLDER, PARQUET, WEBDATASET
from adversa.storage import tables
from adversa.types import digest

FORMATS = (FOLDER, PARQUET, WEBDATASET)
MARK, METADATA, README = "export.json", "metadata.csv", "README.md"
# In metadata.csv. Readers guess a column's type from its first rows, and take empty cells for
# numbers.
ABSENT = "-"
SPLIT_WORDS = (
    "train",
    "training",
    "validation",
    "valid",
    "val",
    "dev",
    "test",
    "testing",
    "eval",
    "evaluation",
)
SHARD = 256_000_000  # bytes a tar shard at most, unless one image alone is larger
_BLOCK, _RECORD = (
    512,
    10_240,
)  # of a tar file: its members are padded to blocks, the whole to records


@dataclass
class Writer:
    """Called with a part's name and its rows; written: files put there so far."""

    put: Callable[[str, pa.Table], int]
    written: int = 0

    def __call__(self, name: str, rows: pa.Table) -> None:
        self.written += self.put(name, rows)


@contextlib.contextmanager
def writer(
    out: Path, form: str, classes: Sequence[str], schema: pa.Schema, shard: int = SHARD
) -> Iterator[Writer]:
    """Writes rows of `schema` (`image` a struct of bytes and path, `label` a class's number,
    `request_id` the images' names).

    `folder`: out/CLASS/REQUEST_ID.png and metadata.csv; `parquet`: out/data/PART, image and row in
    one table; `webdataset`: out/images-00000.tar and so on, of at most `shard` bytes. metadata.csv
    and the last shard take their places at the end, and not where the caller is cut off.
    """
    if form == PARQUET:
        yield Writer(lambda name, rows: _put_part(rows, out / "data" / name, classes))
    elif form == WEBDATASET:
        with contextlib.closing(_Shards(out, shard)) as shards:
            found = Writer(lambda _, rows: shards.add(rows))
            yield found
            found.written += shards.finish()
    else:
        folders = folder_names(classes)
        with _metadata(out / METADATA, folders, schema) as lines:

            def add(_: str, rows: pa.Table) -> int:
                written = _put_images(rows, out, folders)
                lines(rows)
                return written

            yield Writer(add)


def put(path: Path, data: bytes) -> bool:
    """Write a file unless it is there with these very bytes; whether it was written.

    Renamed into place, not flushed: a file that a power cut tears is found by its bytes the next
    time, and ten thousand flushes take longer than the pictures.
    """
    if path.exists() and path.read_bytes() == data:
        return False
    temporary = hidden(path)
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return True


def hidden(path: Path) -> Path:
    """Where a file is made before it takes its place; `remove_partial_files` removes what a killed
    process left there.
    """
    return path.with_name(f".{path.name}.{os.getpid()}")


def settle(temporary: Path, path: Path) -> bool:
    """Let a file made at `temporary` take its place, unless it is there with these very bytes;
    whether it did.
    """
    if path.exists() and filecmp.cmp(path, temporary, shallow=False):
        temporary.unlink()
        return False
    os.replace(temporary, path)
    return True


# ---- folder --------------------------------------------------------------------------------------


def _put_images(rows: pa.Table, out: Path, folders: Sequence[str]) -> int:
    """The rows' pictures that are not there yet; how many."""
    written = 0
    for label in sorted(set(rows["label"].to_pylist())):
        (out / folders[label]).mkdir(exist_ok=True)
    for label, image in zip(rows["label"].to_pylist(), rows["image"], strict=True):
        written += put(out / folders[label] / image["path"].as_py(), image["bytes"].as_py())
    return written


@contextlib.contextmanager
def _metadata(
    path: Path, folders: Sequence[str], schema: pa.Schema
) -> Iterator[Callable[[pa.Table], None]]:
    """Gives a function that adds a part's rows to metadata.csv; the file takes its place at the
    end, where it differs.
    """
    absent = {
        f.name: ABSENT if pa.types.is_string(f.type) else "" for f in schema if f.name != "image"
    }
    temporary = hidden(path)
    try:
        with open(temporary, "w", newline="", encoding="utf-8") as f:
            lines = csv.writer(f, lineterminator="\n")
            lines.writerow(["file_name", *absent])

            def add(rows: pa.Table) -> None:
                pictures = [i["path"].as_py() for i in rows["image"]]
                for picture, row in zip(
                    pictures, rows.select(list(absent)).to_pylist(), strict=True
                ):
                    values = (absent[k] if v is None else v for k, v in row.items())
                    lines.writerow([f"{folders[row['label']]}/{picture}", *values])

            yield add
        settle(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def folder_names(classes: Sequence[str]) -> list[str]:
    """A folder's name for each class, the class's own where any file system takes it; no two are
    equal, capitals apart.

    Letters, digits and marks of any script, space and ().+-_ stay, all else becomes _. A word that
    `datasets` takes for a split (a class `test`) gets `class` after it. Names that would be equal
    get a digest of the class.
    """
    safe = [_safe(c) for c in classes]
    taken = [_same(n) for n in (*safe, MARK, METADATA, README, "data")]
    return [
        f"{n}-{digest(c, size=3)}" if taken.count(_same(n)) > 1 else n
        for c, n in zip(classes, safe, strict=True)
    ]


def _safe(name: str) -> str:
    kept = (
        c if unicodedata.category(c)[0] in "LNM" or c in " ().+-_" else "_"
        for c in unicodedata.normalize("NFC", name)
    )
    text = "".join(kept).lstrip(" ._-").rstrip(" .")
    text = text.encode()[:80].decode(errors="ignore").rstrip(" .") or "class"
    if re.fullmatch(
        r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", text
    ):  # Windows keeps these for devices
        text = f"class {text}"
    return re.sub(rf"(?i)(?<![a-z])({'|'.join(SPLIT_WORDS)})(?![a-z])", r"\1class", text)


def _same(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


# ---- parquet -------------------------------------------------------------------------------------


def _put_part(rows: pa.Table, path: Path, classes: Sequence[str]) -> int:
    """The rows as one part, unless it is there with these very rows; how many files were written.
    No rows make no part.
    """
    if not len(rows) or _holds(path, rows):
        return 0
    features = _features(rows.schema, classes)
    tables.write_part(
        path,
        rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}),
    )
    return 1


def _holds(path: Path, rows: pa.Table) -> bool:
    """Whether a part is there and has these rows. One row group of it is in memory at a time."""
    try:
        with pq.ParquetFile(path) as f:
            if f.metadata.num_rows != len(rows) or not f.schema_arrow.equals(rows.schema):
                return False
            at = 0
            for batch in f.iter_batches(tables.ROW_GROUP):
                if not pa.Table.from_batches([batch]).equals(rows.slice(at, len(batch))):
                    return False
                at += len(batch)
    except (FileNotFoundError, pa.ArrowInvalid, OSError):
        return False  # not there, or torn: it is written again
    return True


def _features(schema: pa.Schema, classes: Sequence[str]) -> dict[str, Any]:
    """The columns as `datasets` describes them: it reads this from the schema of a Parquet file."""
    kinds = {"image": {"_type": "Image"}, "label": {"names": list(classes), "_type": "ClassLabel"}}
    return {
        f.name: kinds.get(f.name, {"dtype": dataset_card.dtype(f.type), "_type": "Value"})
        for f in schema
    }


# ---- webdataset ----------------------------------------------------------------------------------


class _Shards:
    """images-00000.tar and on: of each row REQUEST_ID.cls (the label, as text), .json (all but the
    image) and .png, side by side.

    Readers take what has the same name up to its first dot for one sample, so an id must have none.
    A shard is made under a hidden name; one that is there with the same bytes stays as it is.
    """

    def __init__(self, out: Path, most: int) -> None:
        self.out, self.most, self.number, self.size = out, most, 0, 0
        self.file: tarfile.TarFile | None = None

    @property
    def path(self) -> Path:
        return self.out / f"images-{self.number:05d}.tar"

    def add(self, rows: pa.Table) -> int:
        """How many shards came to their end."""
        written = 0
        others = [n for n in rows.schema.names if n != "image"]
        for image, row in zip(rows["image"], rows.select(others).to_pylist(), strict=True):
            key = row["request_id"]
            assert "." not in key and "/" not in key, key
            text = json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False)
            members = {
                "cls": str(row["label"]).encode(),
                "json": text.encode(),
                "png": image["bytes"].as_py(),
            }
            size = sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for data in members.values())
            if self.size and -(-(self.size + size + 2 * _BLOCK) // _RECORD) * _RECORD > self.most:
                written += self._next()
            if self.file is None:
                self.file = tarfile.TarFile(hidden(self.path), "w", format=tarfile.USTAR_FORMAT)
            self.size += size
            for kind, data in members.items():
                member = tarfile.TarInfo(
                    f"{key}.{kind}"
                )  # mtime, uid and gid 0, no names: the same bytes by anyone at any time
                member.size = len(data)
                self.file.addfile(member, io.BytesIO(data))
        return written

    def _next(self) -> int:
        assert self.file is not None
        self.file.close()
        self.file = None
        written = settle(hidden(self.path), self.path)
        self.number, self.size = self.number + 1, 0
        return int(written)

    def finish(self) -> int:
        return self._next() if self.file is not None else 0

    def close(self) -> None:
        """Drop a shard that was cut off."""
        if self.file is not None:
            with contextlib.suppress(
                OSError
            ):  # its padding, on a disk that is full: the file goes anyway
                self.file.close()
            hidden(self.path).unlink(missing_ok=True)
