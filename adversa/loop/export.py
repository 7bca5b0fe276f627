"""Painted images as a user asked for them: an image folder or Parquet, with a dataset card. Running it again is how it resumes."""

from __future__ import annotations

import contextlib
import csv
import difflib
import filecmp
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from adversa import runs, tables
from adversa.loop import card
from adversa.loop.card import FOLDER, PARQUET, Origin, Tally
from adversa.types import UserError, digest

FORMATS = (PARQUET, FOLDER)
MARK, METADATA, README = "export.json", "metadata.csv", "README.md"
# In metadata.csv. Readers guess a column's type from its first rows, and take empty cells for numbers.
ABSENT = "-"
SPLIT_WORDS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
_OWN = [f for f in tables.SYNTHETIC if f.name in ("finite", "denoiser")]
# `image` as `datasets` keeps it, so that it decodes it without being told.
ROWS = pa.schema(
    [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), *tables.REQUESTS, ("class", pa.string()), *_OWN]
)


@dataclass(frozen=True)
class Exported:
    """images: in the export; written: files put there by this call; not_finite, unpainted: requests that have no image in it."""

    images: int
    by_class: dict[str, int]
    not_finite: int
    unpainted: int
    written: int


def export(
    synthetic: Path,
    requests: Path,
    classes: Sequence[str],
    out: Path,
    form: str,
    origin: Origin,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Exported:
    """Write the images of `synthetic` (tables.SYNTHETIC) with their `requests` (tables.REQUESTS, parts of the same names).

    form `folder`: out/CLASS/REQUEST_ID.png and metadata.csv; `parquet`: out/data/part-*.parquet, image and request in one table.
    Both: README.md, the dataset card. A row that is not finite is black, and is left out. One part is in memory at a time. Files
    that are there and whole are left alone, so that the same call again finishes what was cut off; a card that is there stays, for
    its licence is the user's to fill in. UserError where `out` holds something else or can't be written, or where nothing is there
    to export.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: there is no such format; give {' or '.join(FORMATS)}")
    paths, asked = _asked(synthetic, requests, classes, form)
    folders, tally, written = folder_names(classes), Tally(), 0
    with _held(out, asked):
        written += _put(out / MARK, (json.dumps(asked, indent=2, ensure_ascii=False) + "\n").encode())
        with _metadata(out / METADATA, folders) if form == FOLDER else contextlib.nullcontext(_no_lines) as lines:
            for i, path in enumerate(paths):
                rows = _rows(path, requests / path.name, classes, tally)
                tally.add(rows)
                written += _put_images(rows, out, folders) if form == FOLDER else _put_part(rows, out / "data" / path.name, classes)
                lines(rows)
                if progress is not None:
                    progress({"done": i + 1, "total": len(paths)})
        painted = {p.name for p in paths}
        tally.unpainted += sum(pq.read_metadata(p).num_rows for p in tables.parts(requests) if p.name not in painted)
        if not (out / README).exists():
            date = (runs.read_json(synthetic / runs.MANIFEST) or {}).get("finished") or runs.now()
            tables.replace_bytes(out / README, card.text(origin, tally, classes, folders, date, form, ROWS).encode())
            written += 1
    return Exported(tally.images, dict(tally.classes), tally.not_finite, tally.unpainted, written)


def images_in(out: Path) -> int:
    """Images of an export that are there."""
    pictures = sum(1 for p in out.glob("*/*.png") if not p.parent.name.startswith("."))
    return pictures + sum(pq.read_metadata(p).num_rows for p in tables.parts(out / "data") if (out / "data").is_dir())


def _asked(synthetic: Path, requests: Path, classes: Sequence[str], form: str) -> tuple[list[Path], dict[str, Any]]:
    """(parts of images, what the export is of). UserError where there is nothing to export, or not yet."""
    if (synthetic / runs.RECIPE).exists() and not runs.is_finished(synthetic):
        raise UserError(f"{synthetic} is not finished: not all of its images are painted; run what paints it again, then export")
    paths = tables.parts(synthetic)
    if not paths:
        raise UserError(f"{synthetic} holds no painted images (part-*.parquet); give the folder that `generate` filled")
    ids = [digest(*pq.read_table(p, columns=["request_id"])["request_id"].to_pylist()) for p in paths]
    painters = {d for p in paths for d in pq.read_table(p, columns=["denoiser"])["denoiser"].to_pylist()}
    absent = [p.name for p in paths if not (requests / p.name).exists()]
    if absent:
        raise UserError(
            f"{requests} has no {absent[0]}, the requests of {synthetic / absent[0]}; give the requests of these images"
        )
    asked = {"export": 1, "format": form, "classes": list(classes), "images": digest(*ids), "denoisers": sorted(painters)}
    return paths, asked


def check_out(out: Path, asked: dict[str, Any] | None = None) -> None:
    """UserError where `out` is anything but new, empty, or an export (where `asked` is given: of the same)."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if not out.is_dir() or not any(p for p in out.iterdir() if not p.name.startswith(".")):
        return
    saved = runs.read_json(out / MARK)
    if saved is None:
        raise UserError(f"--out {out} is not empty and not an export; give an empty or new folder")
    if asked is not None and saved != asked:
        changed = "; ".join(runs.differences(saved, asked))
        raise UserError(f"--out {out} holds another export ({changed}); give an empty or new folder")


@contextlib.contextmanager
def _held(out: Path, asked: dict[str, Any]) -> Iterator[None]:
    """Hold `out`, rid of what a killed process left half-written. UserErrors name the option that gave it."""
    try:
        with runs.writing(out):
            check_out(out, asked)
            out.mkdir(parents=True, exist_ok=True)
            with runs.lock(runs.RunDir(out)):
                runs.sweep(runs.RunDir(out))
                yield
    except UserError as e:
        raise UserError(str(e).replace("--run-dir", "--out")) from None


def _rows(path: Path, requests: Path, classes: Sequence[str], tally: Tally) -> pa.Table:
    """The finite images of a part with their requests, as ROWS, in the part's order; the others are counted."""
    painted, asked = pq.read_table(path), pq.read_table(requests)
    place = {r: i for i, r in enumerate(asked["request_id"].to_pylist())}
    ids = painted["request_id"].to_pylist()
    strangers = [i for i in ids if i not in place]
    if strangers:
        raise UserError(f"{requests} has no request {strangers[0]}, which {path} painted; give the requests of these images")
    finite = painted["finite"].to_pylist()
    faults = len(painted) - painted["fault"].null_count if "fault" in painted.schema.names else 0  # such rows are not finite either
    tally.unpainted += len(place) - len(ids) + faults
    tally.not_finite += finite.count(False) - faults
    keep = [i for i, ok in enumerate(finite) if ok]
    table = asked.take(pa.array([place[ids[i]] for i in keep], pa.int64()))
    painted = painted.take(pa.array(keep, pa.int64()))
    names = [f"{i}.png" for i in table["request_id"].to_pylist()]
    assert all(re.fullmatch(r"[\w-]+\.png", n) for n in names), "a request id that is no file name"
    assert table["label"].equals(painted["label"]), f"labels of {path} are not those of {requests}"
    assert all(0 <= k < len(classes) for k in table["label"].to_pylist()), f"{path} has labels that have no class"
    columns = {name: table[name] for name in tables.REQUESTS.names} | {f.name: painted[f.name] for f in _OWN}
    columns["image"] = pa.StructArray.from_arrays(
        [painted["image"].combine_chunks(), pa.array(names, pa.string())], fields=list(ROWS.field("image").type)
    )
    columns["class"] = pa.array([classes[k] for k in table["label"].to_pylist()], pa.string())
    return pa.table([columns[n] for n in ROWS.names], schema=ROWS)


def _put(path: Path, data: bytes) -> bool:
    """Write a file unless it is there with these very bytes; whether it was written.

    Renamed into place, not flushed: a file that a power cut tears is found by its bytes the next time, and ten thousand flushes
    take longer than the pictures.
    """
    if path.exists() and path.read_bytes() == data:
        return False
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return True


# ---- folder ------------------------------------------------------------------------------------------------------------


def _put_images(rows: pa.Table, out: Path, folders: Sequence[str]) -> int:
    """The rows' pictures that are not there yet; how many."""
    written = 0
    for label in sorted(set(rows["label"].to_pylist())):
        (out / folders[label]).mkdir(exist_ok=True)
    for label, image in zip(rows["label"].to_pylist(), rows["image"], strict=True):
        written += _put(out / folders[label] / image["path"].as_py(), image["bytes"].as_py())
    return written


def _no_lines(rows: pa.Table) -> None:
    """Parquet keeps its rows beside the images."""


@contextlib.contextmanager
def _metadata(path: Path, folders: Sequence[str]) -> Iterator[Callable[[pa.Table], None]]:
    """Gives a function that adds a part's rows to metadata.csv; the file takes its place at the end, where it differs."""
    names = [n for n in ROWS.names if n != "image"]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(["file_name", *names])

            def lines(rows: pa.Table) -> None:
                pictures = [i["path"].as_py() for i in rows["image"]]
                for picture, row in zip(pictures, rows.select(names).to_pylist(), strict=True):
                    values = (ABSENT if v is None else v for v in row.values())
                    writer.writerow([f"{folders[row['label']]}/{picture}", *values])

            yield lines
        if not (path.exists() and filecmp.cmp(path, temporary, shallow=False)):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def folder_names(classes: Sequence[str]) -> list[str]:
    """A folder's name for each class, the class's own where any file system takes it; no two are equal, capitals apart.

    Letters, digits and marks of any script, space and ().+-_ stay, all else becomes _. A word that `datasets` takes for a split
    (a class `test`) gets `class` after it. Names that would be equal get a digest of the class.
    """
    safe = [_safe(c) for c in classes]
    taken = [_same(n) for n in (*safe, MARK, METADATA, README, "data")]
    return [f"{n}-{digest(c, size=3)}" if taken.count(_same(n)) > 1 else n for c, n in zip(classes, safe, strict=True)]


def _safe(name: str) -> str:
    kept = (c if unicodedata.category(c)[0] in "LNM" or c in " ().+-_" else "_" for c in unicodedata.normalize("NFC", name))
    text = "".join(kept).lstrip(" ._-").rstrip(" .")
    text = text.encode()[:80].decode(errors="ignore").rstrip(" .") or "class"
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", text):  # Windows keeps these for devices
        text = f"class {text}"
    return re.sub(rf"(?i)(?<![a-z])({'|'.join(SPLIT_WORDS)})(?![a-z])", r"\1class", text)


def _same(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


# ---- parquet -----------------------------------------------------------------------------------------------------------


def _put_part(rows: pa.Table, path: Path, classes: Sequence[str]) -> int:
    """The rows as one part, unless it is there with these very rows; how many files were written. No rows make no part."""
    if not len(rows) or _holds(path, rows):
        return 0
    tables.write_part(path, rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": _features(classes)}})}))
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


def _features(classes: Sequence[str]) -> dict[str, Any]:
    """The columns as `datasets` describes them: it reads this from the schema of a Parquet file."""
    kinds = {"image": {"_type": "Image"}, "label": {"names": list(classes), "_type": "ClassLabel"}}
    return {f.name: kinds.get(f.name, {"dtype": card.dtype(f.type), "_type": "Value"}) for f in ROWS}


# ---- --labels ----------------------------------------------------------------------------------------------------------


def parse_labels(text: str, classes: Sequence[str]) -> dict[int, int]:
    """ "mel=500,df=200" to images wanted by class number, in the order of the numbers.

    A class's name may hold commas and =. UserError for an unknown class (naming the nearest), one given twice, a count that is not
    a whole number above 0, or nothing at all.
    """
    example = f"write CLASS=NUMBER, with commas between, for example {classes[0]}=100"
    wanted: dict[int, int] = {}
    for item in _items(text, classes):
        name, equals, count = (s.strip() for s in item.rpartition("="))
        if not equals or not name:
            raise UserError(f"--labels {text}: {item.strip() or 'an empty entry'} is not a class and a number; {example}")
        if name not in classes:
            raise UserError(f"--labels {text}: there is no class {name}; {_nearest(name, classes)}")
        if not re.fullmatch("[0-9]{1,12}", count) or int(count) == 0:
            raise UserError(f"--labels {text}: {name}={count}: not a whole number above 0; {example}")
        if (label := list(classes).index(name)) in wanted:
            raise UserError(f"--labels {text}: {name} is given twice; give each class once")
        wanted[label] = int(count)
    return dict(sorted(wanted.items()))


def _items(text: str, classes: Sequence[str]) -> Iterator[str]:
    """The entries between commas; a comma that belongs to a class's name parts nothing."""
    pieces = text.split(",")
    while pieces:
        item = pieces.pop(0)
        while pieces and any(c.startswith(f"{item.lstrip()},") for c in classes):
            item += f",{pieces.pop(0)}"
        yield item


def _nearest(name: str, classes: Sequence[str]) -> str:
    plain = {c.casefold(): c for c in classes}
    near = difflib.get_close_matches(name.casefold(), list(plain), n=1, cutoff=0.5)
    return f"did you mean {plain[near[0]]}?" if near else f"the classes are {', '.join(classes)}"
