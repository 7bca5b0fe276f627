"""Where pictures come from: `list_records` reads metadata and file names, never a pixel.

A fault in one row or file goes to `Problems`: a UserError under data.on_error=fail, a counted,
named skip under skip. A fault of the whole source (no folder, no such column, one class only) is a
UserError always.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path

from adversa.config import Data
from adversa.data import files, phantom
from adversa.data.ham10000 import list_ham10000
from adversa.data.records import ImageRecord, Listing, Problems, read_csv
from adversa.types import UserError

__all__ = ["Listing", "ImageRecord", "list_records"]


def list_records(config: Data, option: str = "data.path", least: int = 2) -> Listing:
    """Every picture of the source that can be used, in an order that depends on the source alone.

    option: what the user gave the path by, for messages. least: classes there must be; none at all
    is a UserError always.
    """
    problems = Problems(config.on_error == "fail")
    merged: list[tuple[str, str, str]] = []
    empty: list[str] = []
    if config.source == "phantom":
        records = _phantom(config)
    else:
        if not config.path:
            raise UserError(
                f"data.path is missing; data.source {config.source} needs one, say --set "
                "data.path=FOLDER"
            )
        path = Path(config.path).expanduser().absolute()  # workers may have another working folder
        if not os.path.exists(path):  # unlike Path.exists, False for a name too long as well
            raise UserError(
                f"{option} {path}: no such file or folder; check the spelling, or mount it"
            )
        if config.source == "ham10000":
            records, merged = list_ham10000(path, problems, option)
        elif config.source == "csv":
            records = _csv(path, config, problems, option)
        else:
            records, empty = _folder(path, config, problems, option)
    records = _unique(records, problems)
    records, classes = _classes(records, config, empty, problems)
    if not classes:
        given = f"{option} {config.path}" if config.path else f"data.source {config.source}"
        check = "check data.source and path" if option == "data.path" else "check what it holds"
        raise UserError(f"{given} has no usable picture ({len(problems)} left out); {check}")
    if len(classes) < least:
        raise UserError(
            f"only one class, {files.printable(classes[0])!r}, has pictures; a classifier "
            "needs two or more"
        )
    present = {r.group for r in records}
    merged = [m for m in merged if m[0] in present and m[1] in present]
    return Listing(records, classes, merged, list(problems))


def _classes(
    records: list[ImageRecord], config: Data, empty: list[str], problems: Problems
) -> tuple[list[ImageRecord], list[str]]:
    """Records of known classes, and the classes: config.labels in its order, or those found,
    sorted.
    """
    wanted = config.labels
    if wanted is not None:
        if len(set(wanted)) < len(wanted):
            raise UserError(f"data.labels {wanted} names a class twice; name each once")
        for r in records:
            if r.label not in wanted:
                problems.add(
                    r.source,
                    f"unknown label {files.printable(r.label)!r}; data.labels has "
                    f"{', '.join(wanted)}",
                )
        records = [r for r in records if r.label in wanted]
    found = {r.label for r in records}
    for label in dict.fromkeys([*(wanted or []), *empty]):
        if label not in found and (wanted is None or label in wanted):
            problems.add(label, "this class has no picture")
    classes = [c for c in wanted if c in found] if wanted is not None else sorted(found)
    return records, classes


def _unique(records: list[ImageRecord], problems: Problems) -> list[ImageRecord]:
    """The first record of each id (or of each file, where there are no ids)."""
    seen: dict[str, str] = {}
    kept = []
    for r in records:
        key = r.id or r.uri
        if key in seen:
            problems.add(
                r.source,
                "duplicate "
                f"{'id ' + files.printable(r.id) if r.id else 'row for this file'}; the "
                f"first is {seen[key]}",
            )
            continue
        seen[key] = r.source
        kept.append(r)
    return kept


def _phantom(config: Data) -> list[ImageRecord]:
    attributes = {
        mode: {"mode": mode} for _, mode in phantom.KINDS
    }  # shared by the records: there may be many
    records = []
    for i, s in enumerate(phantom.slots(config.phantom)):
        group = f"lesion-{s.lesion:05d}"
        records.append(
            ImageRecord(
                "",
                f"phantom-{i:05d}.png",
                f"phantom:{i}",
                s.label,
                group,
                group,
                attributes[s.mode],
            )
        )
    return records


def _csv(path: Path, config: Data, problems: Problems, option: str) -> list[ImageRecord]:
    if not path.is_file():
        raise UserError(
            f"{option} {path} is not a file; data.source csv needs the path of the CSV itself"
        )
    names = config.columns
    used = {
        n for n in (names.path, names.label, names.group, names.patient, names.mask, names.id) if n
    }
    rows = read_csv(files.read(f"file:{path}"), str(path), sorted(used), problems)
    root = path.parent.resolve()
    records = []
    for row in rows:
        source = row[names.path] or f"a row of {path.name}"
        image, fault = _inside(root, row[names.path])
        mask, mask_fault = (
            _inside(root, row[names.mask]) if names.mask and row[names.mask] else (None, "")
        )
        fault = fault or (f"its mask: {mask_fault}" if mask_fault else "")
        for name in (names.label, names.group, names.id):
            if name and not row[name] and not fault:
                fault = f"column {name} is blank in {path.name}"
        if fault:
            problems.add(source, fault)
            continue
        group = row[names.group] if names.group else row[names.path]
        patient = row[names.patient] if names.patient else ""
        attributes = {k: v for k, v in row.items() if k not in used and v}
        own = row[names.id] if names.id else ""
        records.append(
            ImageRecord(
                own,
                source,
                f"file:{image}",
                row[names.label],
                group,
                patient,
                attributes,
                f"file:{mask}" if mask else None,
            )
        )
    return records


def _inside(root: Path, name: str) -> tuple[Path | None, str]:
    """(the file, '') or (None, what is wrong): a name must stay within `root`, links followed."""
    if not name:
        return None, "the path is blank"
    try:
        target = (root / name).resolve()
        exists = target.is_file()
    except (OSError, ValueError, RuntimeError):
        return None, "not a valid path"
    if not target.is_relative_to(root):
        return None, f"leads out of {root}, the folder of the data set"
    return (target, "") if exists else (None, "no such file")


def _strays(root: Path) -> Callable[[str], str]:
    """What tells why a file below a folder is none of the data set ("": it is): it is no file, or
    links lead it out of there.
    """
    real = root.resolve()
    leaves = cache(lambda folder: not (root / folder).resolve().is_relative_to(real))

    def fault(name: str) -> str:
        mode = os.lstat(root / name).st_mode
        if stat.S_ISLNK(mode):
            return _inside(real, name)[1]
        if not stat.S_ISREG(mode):
            return files.IRREGULAR
        return f"leads out of {root}" if leaves(name.rpartition("/")[0]) else ""

    return fault


def _folder(
    path: Path, config: Data, problems: Problems, option: str
) -> tuple[list[ImageRecord], list[str]]:
    """Records, and the classes that have none. A class is a sub-folder of `path`; pictures may lie
    deeper in it.
    """
    if not path.is_dir():
        raise UserError(
            f"{option} {path} is not a folder; data.source folder needs one with a "
            "sub-folder for each class"
        )
    try:
        pattern = re.compile(config.group_regex) if config.group_regex else None
    except re.error as e:
        raise UserError(
            f"data.group_regex {config.group_regex!r} is not a regular expression: {e}"
        ) from None
    if pattern is not None and pattern.groups < 1:
        raise UserError(
            f"data.group_regex {config.group_regex!r} captures nothing; put the group in "
            "parentheses"
        )
    labels = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not labels:
        raise UserError(
            f"{option} {path} has no sub-folder; put each class's pictures in a folder "
            "named after it"
        )
    records: list[ImageRecord] = []
    stray = _strays(path)
    for name in sorted(files.walk(path)):
        label, slash, rest = name.partition("/")
        suffix = Path(name).suffix.lower()
        if any(p.startswith(".") for p in name.split("/")) or suffix in files.OTHERS:
            continue
        if any("\ud800" <= c <= "\udfff" for c in name):
            problems.add(name, "its name is not valid UTF-8; rename it")
        elif suffix not in files.PICTURES:
            problems.add(name, f"{suffix or 'no suffix'}: not a kind of picture adversa reads")
        elif fault := stray(name):
            problems.add(name, fault)
        elif not slash:
            problems.add(name, "lies beside the class folders, so it has no class")
        else:
            match = pattern.search(name) if pattern else None
            group = (match.group(1) or "" if match else "") if pattern else name
            if not group:
                problems.add(
                    name, f"data.group_regex {config.group_regex!r} finds no group in this path"
                )
            else:
                records.append(ImageRecord("", name, f"file:{path / name}", label, group))
    return records, sorted(set(labels) - {r.label for r in records})
