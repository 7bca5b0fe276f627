"""What a source gives: records of pictures that have not been read, and the rows of the tables
behind them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from adversa.data import files
from adversa.types import UserError

SKIP = "--set data.on_error=skip"
FIX = f"fix it, or leave such pictures out with {SKIP}"
SEPARATORS = {
    ";": "semicolons",
    "\t": "tabs",
    "|": "bars",
}  # of tables that are no CSV, though they may be named so


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """A picture that has not been read. uri: "file:PATH", "zip:ZIP!MEMBER" or "phantom:INDEX"."""

    id: str  # the user's own, or ''
    source: str  # the name shown to people
    uri: str
    label: str
    group: str
    patient: str = ""
    attributes: dict[str, str] = field(default_factory=dict)
    mask_uri: str | None = None


@dataclass(frozen=True)
class Listing:
    """merged: (group, group, why) known to be one lesion; problems: {"source", "problem"} of
    everything left out.
    """

    records: list[ImageRecord]
    classes: list[str]
    merged: list[tuple[str, str, str]]
    problems: list[dict[str, str]]


class Problems(list[dict[str, str]]):
    """What is left out and why. With `fail` the first one stops the run instead."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        self.fail = fail

    def add(self, source: str, problem: str) -> None:
        if self.fail:
            raise UserError(f"{files.printable(source)}: {problem}; {FIX}")
        self.append({"source": source, "problem": problem})


def _separator(text: str) -> str | None:
    """What separates the cells of the header where that is none of its commas; None of a CSV."""
    header = next((line for line in io.StringIO(text) if line.strip()), "")
    return None if "," in header else next((s for s in SEPARATORS if s in header.strip(" ")), None)


def read_csv(
    data: bytes, name: str, needed: Iterable[str], problems: Problems
) -> list[dict[str, str]]:
    """Rows as dicts of stripped text.

    UserError where the table itself is unusable (encoding, no rows, columns missing or twice).
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{name} is not UTF-8 (byte {e.start}); save it as comma-separated text in UTF-8"
        ) from None
    if (found := _separator(text)) is not None:
        raise UserError(
            f"{name} looks separated by {SEPARATORS[found]}, not by commas; save it as "
            "comma-separated text"
        )
    try:
        lines = [
            row
            for row in csv.reader(io.StringIO(text, newline=""), strict=True)
            if any(c.strip() for c in row)
        ]
    except csv.Error as e:
        raise UserError(
            f"{name} is not a valid CSV: {e}; save it again as comma-separated text"
        ) from None
    if len(lines) < 2:
        raise UserError(f"{name} has no rows; it needs a header and a row for each picture")
    header = [c.strip() for c in lines[0]]
    if twice := sorted({c for c in header if c and header.count(c) > 1}):
        raise UserError(f"{name} has two columns named {twice[0]}; rename one")
    if missing := [c for c in needed if c not in header]:
        known = ", ".join(files.printable(c) for c in header)
        raise UserError(
            f"{name} has no column {missing[0]}; it has {known}; set data.columns to the "
            "names in use, null for none"
        )
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            problems.add(
                f"{Path(name).name} row {number}", f"{len(line)} cells, but {len(header)} columns"
            )
            continue
        rows.append({k: v.strip() for k, v in zip(header, line, strict=True) if k})
    return rows
