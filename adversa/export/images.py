"""Generated images as a user requested them: an image folder or Parquet, with a dataset card.

Running the export again resumes it.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from adversa.export import dataset_card
from adversa.export.dataset_card import FOLDER, PARQUET, Origin, Tally
from adversa.export.formats import MARK, README, folder_names, put, writer
from adversa.run import differences, environment, file_lock, step_folder
from adversa.run.folder import RunDir, remove_partial_files
from adversa.storage import files, tables
from adversa.storage.path import StoragePath
from adversa.types import UserError, digest

FORMATS = (PARQUET, FOLDER)
_OWN = [f for f in tables.SYNTHETIC if f.name in ("finite", "denoiser")]
# `image` as `datasets` keeps it, so that it decodes it without being told.
ROWS = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        *tables.REQUESTS,
        ("class", pa.string()),
        *_OWN,
    ]
)


@dataclass(frozen=True)
class Exported:
    """What an export holds.

    Attributes:
        images: Images in it.
        by_class: How many of each class.
        not_finite: Requests without an image because it was not finite.
        not_generated: Requests without an image because none was generated.
        written: Files put there by this call.
    """

    images: int
    by_class: dict[str, int]
    not_finite: int
    not_generated: int
    written: int


def export(
    synthetic: StoragePath,
    requests: StoragePath,
    classes: Sequence[str],
    out: Path,
    form: str,
    origin: Origin,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Exported:
    """Write the images of `synthetic` (tables.SYNTHETIC) with their `requests` (tables.REQUESTS,
    parts of the same names).

    form `folder`: out/CLASS/REQUEST_ID.png and metadata.csv; `parquet`: out/data/part-*.parquet,
    image and request in one table. Both: README.md, the dataset card. A row that is not finite is
    black, and is left out. One part is in memory at a time. Files that are there and whole are left
    alone, so that the same call again finishes what was cut off; a card that is there stays, for
    its licence is the user's to fill in. UserError where `out` holds something else or can't be
    written, or where nothing is there to export.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: there is no such format; give {' or '.join(FORMATS)}")
    paths, requested = _requested(synthetic, requests, classes, form)
    tally = Tally()
    with held(out, requested) as written:
        with writer(out, form, classes, ROWS) as write:
            for i, path in enumerate(paths):
                found = rows(path, requests / path.name, classes, tally)
                tally.add(found)
                write(path.name, found)
                if progress is not None:
                    progress({"done": i + 1, "total": len(paths)})
        generated = {p.name for p in paths}
        tally.not_generated += sum(
            tables.count(p) for p in tables.parts(requests) if p.name not in generated
        )
        date = (files.read_json(synthetic / step_folder.MANIFEST) or {}).get(
            "finished"
        ) or environment.now()
        written += write.written + put_card(
            out,
            lambda: dataset_card.text(
                origin, tally, classes, folder_names(classes), date, form, ROWS
            ),
        )
    return Exported(
        tally.images, dict(tally.classes), tally.not_finite, tally.not_generated, written
    )


def put_card(out: Path, text: Callable[[], str]) -> int:
    """Write README.md unless it is there: its licence is the user's to fill in. How many files were
    written.
    """
    if (out / README).exists():
        return 0
    files.replace_bytes(out / README, text().encode())
    return 1


def images_in(out: Path) -> int:
    """Images of an export that are there."""
    pictures = sum(1 for p in out.glob("*/*.png") if not p.parent.name.startswith("."))
    return pictures + sum(
        tables.count(p) for p in tables.parts(out / "data") if (out / "data").is_dir()
    )


def _requested(
    synthetic: StoragePath, requests: StoragePath, classes: Sequence[str], form: str
) -> tuple[list[StoragePath], dict[str, Any]]:
    """(parts of images, what the export is of). UserError where there is nothing to export, or not
    yet.
    """
    if (synthetic / step_folder.RECIPE).exists() and not step_folder.is_finished(synthetic):
        raise UserError(
            f"{synthetic} is not finished: not all of its images are generated; run what "
            "generates it again, then export"
        )
    paths = tables.parts(synthetic)
    if not paths:
        raise UserError(
            f"{synthetic} holds no generated images (part-*.parquet); give the folder that "
            "`generate` filled"
        )
    ids = [digest(*tables.read_part(p, ["request_id"])["request_id"].to_pylist()) for p in paths]
    denoisers = {
        d for p in paths for d in tables.read_part(p, ["denoiser"])["denoiser"].to_pylist()
    }
    absent = [p.name for p in paths if not (requests / p.name).exists()]
    if absent:
        raise UserError(
            f"{requests} has no {absent[0]}, the requests of {synthetic / absent[0]}; give "
            "the requests of these images"
        )
    requested = {
        "export": 1,
        "format": form,
        "classes": list(classes),
        "images": digest(*ids),
        "denoisers": sorted(denoisers),
    }
    return paths, requested


def check_out(out: Path, requested: dict[str, Any] | None = None) -> None:
    """UserError unless `out` is new, empty, or an export; where `requested` is given, of the same
    selection.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if not out.is_dir() or not any(p for p in out.iterdir() if not p.name.startswith(".")):
        return
    saved = files.read_json(out / MARK)
    if saved is None:
        raise UserError(f"--out {out} is not empty and not an export; give an empty or new folder")
    if requested is not None and saved != requested:
        changed = "; ".join(differences.differences(saved, requested))
        raise UserError(
            f"--out {out} holds another export ({changed}); give an empty or new folder"
        )


@contextlib.contextmanager
def held(out: Path, requested: dict[str, Any]) -> Iterator[int]:
    """Hold `out`, rid of what a killed process left half-written and marked with what is asked;
    gives how many files that wrote.
    """
    with files.writing(out, "--out"):
        check_out(out, requested)
        out.mkdir(parents=True, exist_ok=True)
        with file_lock.lock(RunDir(out), "--out"):
            remove_partial_files(RunDir(out))
            yield int(
                put(
                    out / MARK,
                    (json.dumps(requested, indent=2, ensure_ascii=False) + "\n").encode(),
                )
            )


def rows(
    path: StoragePath, requests: StoragePath, classes: Sequence[str], tally: Tally
) -> pa.Table:
    """The finite images of a part with their requests, as ROWS, in the part's order; the others are
    counted.
    """
    generated, requested = tables.read_part(path), tables.read_part(requests)
    place = {r: i for i, r in enumerate(requested["request_id"].to_pylist())}
    ids = generated["request_id"].to_pylist()
    unknown = [i for i in ids if i not in place]
    if unknown:
        raise UserError(
            f"{requests} has no request {unknown[0]}, which {path} generated; give the "
            "requests of these images"
        )
    finite = generated["finite"].to_pylist()
    faults = len(generated) - generated["fault"].null_count  # such rows are not finite either
    tally.not_generated += len(place) - len(ids) + faults
    tally.not_finite += finite.count(False) - faults
    keep = [i for i, ok in enumerate(finite) if ok]
    table = requested.take(pa.array([place[ids[i]] for i in keep], pa.int64()))
    generated = generated.take(pa.array(keep, pa.int64()))
    names = [f"{i}.png" for i in table["request_id"].to_pylist()]
    assert all(re.fullmatch(r"[\w-]+\.png", n) for n in names), "a request id that is no file name"
    assert table["label"].equals(generated["label"]), (
        f"labels of {path} are not those of {requests}"
    )
    assert all(0 <= k < len(classes) for k in table["label"].to_pylist()), (
        f"{path} has labels that have no class"
    )
    columns = {f.name: table[f.name] for f in tables.REQUESTS}
    columns |= {f.name: generated[f.name] for f in _OWN}
    columns["image"] = pa.StructArray.from_arrays(
        [generated["image"].combine_chunks(), pa.array(names, pa.string())],
        fields=list(ROWS.field("image").type),
    )
    columns["class"] = pa.array([classes[k] for k in table["label"].to_pylist()], pa.string())
    return pa.table([columns[n] for n in ROWS.names], schema=ROWS)


# ---- --labels ------------------------------------------------------------------------------------


def parse_labels(text: str, classes: Sequence[str]) -> dict[int, int]:
    """ "mel=500,df=200" to images wanted by class number, in the order of the numbers.

    A class's name may hold commas and =. UserError for an unknown class (naming the nearest), one
    given twice, a count that is not a whole number above 0, or nothing at all.
    """
    example = f"write CLASS=NUMBER, with commas between, for example {classes[0]}=100"
    wanted: dict[int, int] = {}
    for item in _items(text, classes):
        name, equals, count = (s.strip() for s in item.rpartition("="))
        if not equals or not name:
            raise UserError(
                f"--labels {text}: {item.strip() or 'an empty entry'} is not a class and a "
                f"number; {example}"
            )
        if name not in classes:
            raise UserError(f"--labels {text}: there is no class {name}; {_nearest(name, classes)}")
        if not re.fullmatch("[0-9]{1,12}", count) or int(count) == 0:
            raise UserError(
                f"--labels {text}: {name}={count}: not a whole number above 0; {example}"
            )
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
