"""An external cohort as records that have not been read: where it lies, whose columns it has,
what its content is.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adversa import config as cfg
from adversa.data import files, sources
from adversa.data.ham10000 import HAM_METADATA
from adversa.data.records import ImageRecord
from adversa.external.labels import Translation
from adversa.run.folder import RunDir
from adversa.storage.path import StoragePath
from adversa.types import UserError, digest

FOLDER = "external"  # in the run's
FREE = (
    "cluster",
    "data.columns",
    "data.group_regex",
    "data.max_pixels",
    "data.on_error",
    "evaluate.bootstrap",
    "evaluate.subgroups",
)
PATIENT, LESION, IMAGE = "patient", "lesion", "image"


@dataclass(frozen=True)
class Outside:
    """A set whose labels are scored classes already.

    listed: its pictures; omitted: by label, those the map leaves out; unused: labels of the map
    that the set has not; unit: what is resampled (PATIENT, LESION or IMAGE); problems: rows and
    files that were skipped; pairs: clusters known to be one.
    """

    records: list[ImageRecord]
    listed: int
    omitted: dict[str, int]
    unused: list[str]
    unit: str
    problems: list[dict[str, str]]
    pairs: list[tuple[str, str]]


@dataclass(frozen=True)
class ExternalCohort:
    """What is asked: a run, its configuration, the section that reads the set, the meaning of its
    labels, a name.
    """

    run: RunDir
    config: cfg.Config
    data: cfg.Data
    translation: Translation
    name: str
    outside: Outside = field(repr=False)

    @property
    def folder(self) -> StoragePath:
        return self.run.root / FOLDER / self.name

    @property
    def pictures(self) -> StoragePath:
        return self.folder / "pictures"

    @property
    def scores(self) -> StoragePath:
        return self.folder / "scores"

    def settings(self) -> dict[str, Any]:
        """What the pictures hang on, beside the set's content."""
        d = self.data
        return {
            "resolution": d.resolution,
            "crop": d.crop,
            "on_error": d.on_error,
            "max_pixels": d.max_pixels,
            "columns": d.columns.model_dump() if d.source == "csv" else {},
            "group_regex": d.group_regex,
            "source": d.source,
            "near_duplicate_bits": d.near_duplicate_bits,
            "labels": _said(self.translation.labels),
            "classes": _said(self.translation.classes),
            "unit": self.outside.unit,
        }


def _said(entries: Mapping[str, str | None]) -> str:
    return (
        ", ".join(f"{k}: {'null' if v is None else v}" for k, v in sorted(entries.items()))
        or "none"
    )


def check_overrides(overrides: Sequence[str]) -> None:
    """UserError for a --set that would make it another run's evaluation, or do nothing."""
    for text in overrides:
        key = text.partition("=")[0]
        if not any(key == f or key.startswith(f"{f}.") for f in FREE):
            raise UserError(
                f"--set {text}: that is the run's own; with --on only {', '.join(FREE)} can be set"
            )


def section(config: cfg.Config, path: Path, overrides: Sequence[str], crop: str | None) -> cfg.Data:
    """The section `data` that the set is read by: the run's resolution and limits, the set's place
    and columns.

    config: the run's, with the overrides in it.
    """
    wanted = "a CSV, a folder with a sub-folder for each class, or a .zip laid out as HAM10000"
    if not os.path.exists(path):
        raise UserError(f"--on {path}: no such file or folder; give {wanted}")
    if path.suffix.lower() in files.PICTURES and path.is_file():
        raise UserError(
            f"--on {path} is a picture; give {wanted}. For pictures without labels there "
            f"is `adversa predict RUN {path}`"
        )
    keys = {text.partition("=")[0] for text in overrides}
    source = _source(path)
    data = config.data
    update: dict[str, object] = {
        "source": source,
        "path": str(path.absolute()),
        "labels": None,
        "crop": crop or data.crop,
        "group_regex": data.group_regex if "data.group_regex" in keys else None,
    }
    if source == "csv":
        update["columns"] = _columns(data.columns, path, keys)
    return data.model_copy(update=update)


def _source(path: Path) -> str:
    if path.is_dir():
        return "ham10000" if any((path / name).is_file() for name in HAM_METADATA) else "folder"
    return "ham10000" if path.suffix.lower() == ".zip" else "csv"


def _columns(wanted: cfg.Columns, path: Path, keys: set[str]) -> cfg.Columns:
    """Each column under the name that was set, else the run's where the set has it, else its usual
    name; optional ones may lack.
    """
    header = _header(path)
    usual = cfg.Columns().model_dump() | {"patient": "patient"}
    found: dict[str, str | None] = {}
    for name, value in wanted.model_dump().items():
        if "data.columns" in keys or f"data.columns.{name}" in keys:
            found[name] = value
            continue
        there = next((c for c in (value, usual[name]) if c in header), None)
        found[name] = there or (usual[name] if name in ("path", "label") else None)
    return cfg.Columns(**{**found, "mask": None})  # pictures alone are scored


def _header(path: Path) -> list[str]:
    """Column names of a CSV; none where it is no CSV: whoever reads it whole says so."""
    text = files.read(f"file:{path.absolute()}").decode("utf-8-sig", "replace")
    try:
        return [c.strip() for c in next(csv.reader(io.StringIO(text, newline="")), [])]
    except csv.Error:
        return []


def listing(data: cfg.Data, translation: Translation) -> Outside:
    """The set's pictures under the classes they mean. UserError for labels that mean none, and
    where fewer than two are left.
    """
    found = sources.list_records(data, "--on", least=1)
    labels = Counter(r.label for r in found.records)
    translation.check(labels.elements())
    meant = {label: translation.meaning(label) for label in labels}
    records = [
        replace(r, label=name) for r in found.records if (name := meant[r.label]) is not None
    ]
    classes = {r.label for r in records}
    if len(classes) < 2:
        raise UserError(f"--on {data.path}: {_too_few(classes, labels, data.source, translation)}")
    omitted = {label: labels[label] for label in sorted(labels) if meant[label] is None}
    records, unit = _clustered(records, data)
    unused = sorted(set(translation.labels) - set(labels))
    pairs = [
        (cluster("", a, unit), cluster("", b, unit)) for a, b, _ in found.merged
    ]  # of HAM10000, which names no patients
    return Outside(records, len(found.records), omitted, unused, unit, found.problems, pairs)


def _too_few(
    classes: Collection[str], labels: Mapping[str, int], source: str, translation: Translation
) -> str:
    """Why fewer than two classes are left, and what to do: it is the set, or the labels map."""
    names = ", ".join(files.printable(label) for label in labels)
    if len(labels) == 1 and classes:
        column = (
            ", or name the column that tells them apart with --set data.columns.label=NAME"
            if source == "csv"
            else ""
        )
        return (
            f"every picture has the label {names}, and figures need two classes or more; add "
            f"pictures of another{column}"
        )
    left = f"only {next(iter(classes))} is" if classes else "nothing is"
    given = "; change the --labels-map" if translation.labels or translation.classes else ""
    return (
        f"{left} left to score of its labels {names}, and figures need two classes or more{given}"
    )


def _clustered(records: list[ImageRecord], data: cfg.Data) -> tuple[list[ImageRecord], str]:
    """Groups renamed so that each is one lesion of the set (numbers of lesions may start anew with
    each patient), and the unit.
    """
    named = any(r.patient for r in records)
    lesions = data.source == "ham10000" or bool(
        data.columns.group if data.source == "csv" else data.group_regex
    )
    if named and lesions:
        records = [
            replace(r, group=f"{r.patient}/{r.group}" if r.patient else r.group) for r in records
        ]
    return records, PATIENT if named else LESION if lesions else IMAGE


def cluster(record_patient: str, group: str, unit: str) -> str:
    """The name of what an image is resampled with."""
    return (
        f"{PATIENT} {record_patient}" if unit == PATIENT and record_patient else f"{LESION} {group}"
    )


def described(records: Iterable[ImageRecord]) -> Iterator[str]:
    """What a picture's entry says, without where it lies: a set that was moved is the same set."""
    for r in records:
        yield digest(
            r.id,
            r.source,
            r.label,
            r.group,
            r.patient,
            *(f"{k}={v}" for k, v in sorted(r.attributes.items())),
        )


def looks_unchanged(records: Sequence[ImageRecord]) -> str:
    """A digest of entries, sizes and times: equal, the set is taken to be the same without reading
    a picture.
    """
    return digest(*described(records), *(_stat(p) for p in _paths(records)))


def content(records: Sequence[ImageRecord]) -> str:
    """A digest of entries and of every byte of the files."""
    found: dict[str, str] = {}
    for path in _paths(records):
        try:
            with open(path, "rb") as f:
                found[path] = hashlib.file_digest(
                    f, lambda: hashlib.blake2b(digest_size=16)
                ).hexdigest()
        except OSError as e:
            found[path] = (
                f"unreadable: {e.strerror}"  # decoding says so for the picture, by data.on_error
            )
    return digest(*described(records), *(found[_path(r)] for r in records))


def _path(record: ImageRecord) -> str:
    kind, _, rest = record.uri.partition(":")
    return rest if kind == "file" else rest.partition(".zip!")[0] + ".zip"


def _paths(records: Sequence[ImageRecord]) -> list[str]:
    return list(dict.fromkeys(_path(r) for r in records))


def _stat(path: str) -> str:
    try:
        s = os.stat(path)
    except OSError as e:
        return f"unreadable: {e.strerror}"
    return f"{s.st_size} {s.st_mtime_ns}"
