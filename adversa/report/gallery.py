"""The pictures of the page: hard cases beside what was painted from them, as data URIs."""

from __future__ import annotations

import base64
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from adversa import tables
from adversa.report.gather import Facts

CASES, OFFSPRING, SAMPLES = 24, 8, 6
LARGEST, LARGEST_SHEET = 96, 512  # pixels: a larger picture is made smaller, so that the page stays within a few megabytes


@dataclass(frozen=True)
class Picture:
    """uri is None where the run folder no longer holds the picture; coarse: shown enlarged, with visible pixels."""

    uri: str | None
    coarse: bool


@dataclass(frozen=True)
class Painted:
    picture: Picture
    reason: str
    agreement: float | None
    similarity: float | None


@dataclass(frozen=True)
class Case:
    number: int
    label: str
    predicted: str
    reason: str
    loss: float
    picture: Picture
    offspring: list[Painted]
    painted: int  # all there are
    kept: int


def cases(facts: Facts, number: int) -> tuple[list[Case], int]:
    """The first cases of round `number`, in the order they were taken, and how many there are in all.

    Offspring are the first by request id, which is a hash: nobody chose them by their looks.
    """
    run = facts.run
    hard = tables.read(run.round(number, "hard"), schema=tables.HARD_CASES).sort_by("rank").to_pylist()
    shown = hard[:CASES]
    wanted = {h["example"] for h in shown}
    requests: dict[str, list[str]] = {example: [] for example in wanted}
    for row in tables.read(run.round(number, "requests"), ["request_id", "example", "arm"], tables.REQUESTS).to_pylist():
        if row["example"] in wanted and row["arm"] == facts.after:
            requests[row["example"]].append(row["request_id"])
    requests = {example: sorted(ids) for example, ids in requests.items()}
    verdicts = _verdicts(facts, number)
    real = _pictures(run.data / "mine", "id", wanted)
    painted = _pictures(run.round(number, "synthetic"), "request_id", {r for ids in requests.values() for r in ids[:OFFSPRING]})
    return [
        Case(
            number=i + 1,
            label=facts.classes[h["label"]],
            predicted=facts.classes[h["predicted"]],
            reason=h["reason"],
            loss=h["loss"],
            picture=real.get(h["example"], Picture(None, False)),
            offspring=[_painted(r, painted, verdicts) for r in requests[h["example"]][:OFFSPRING]],
            painted=len(requests[h["example"]]),
            kept=sum(verdicts.get(r, {}).get("keep", False) for r in requests[h["example"]]),
        )
        for i, h in enumerate(shown)
    ], len(hard)


def samples(facts: Facts, number: int, arm: str) -> dict[str, list[Painted]]:
    """class name -> the first images by request id that `arm` painted of it in a round; only classes with any."""
    columns = ["request_id", "label", "arm"]
    rows = tables.read(facts.run.round(number, "requests"), columns, tables.REQUESTS).to_pylist()
    ids = {
        name: sorted(r["request_id"] for r in rows if r["arm"] == arm and r["label"] == c)[:SAMPLES]
        for c, name in enumerate(facts.classes)
    }
    verdicts = _verdicts(facts, number)
    pictures = _pictures(facts.run.round(number, "synthetic"), "request_id", {r for names in ids.values() for r in names})
    return {name: [_painted(r, pictures, verdicts) for r in found] for name, found in ids.items() if found}


def _painted(request: str, pictures: dict[str, Picture], verdicts: dict[str, dict[str, Any]]) -> Painted:
    verdict = verdicts.get(request, {})
    return Painted(
        picture=pictures.get(request, Picture(None, False)),
        reason=verdict.get("reason", "no verdict"),
        agreement=verdict.get("agreement"),
        similarity=verdict.get("similarity"),
    )


def _verdicts(facts: Facts, number: int) -> dict[str, dict[str, Any]]:
    rows = tables.read(facts.run.round(number, "verdicts"), schema=tables.VERDICTS).to_pylist()
    return {row["request_id"]: row for row in rows}


def _pictures(folder: Path, key: str, ids: Collection[str]) -> dict[str, Picture]:
    """Pictures of the rows whose `key` is in ids; parts without one of them are not read beyond that column."""
    found: dict[str, Picture] = {}
    for part in tables.parts(folder):
        if here := set(pq.read_table(part, columns=[key])[key].to_pylist()) & set(ids):
            rows = pq.read_table(part, columns=[key, "image"], filters=[(key, "in", sorted(here))])
            found |= {row[key]: picture(row["image"]) for row in rows.to_pylist()}
    return found


def sheet(path: Path) -> Picture:
    """A grid of many pictures; none where the file is gone."""
    return picture(path.read_bytes() if path.exists() else b"", LARGEST_SHEET)


def picture(data: bytes, largest: int = LARGEST) -> Picture:
    """PNG bytes to a data URI, made smaller where it is large. No bytes: there is no picture."""
    if not data:
        return Picture(None, False)
    image = Image.fromarray(tables.decode_png(data)).convert("RGB")
    coarse = max(image.size) < largest
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    png = tables.encode_png(np.asarray(image))
    return Picture("data:image/png;base64," + base64.b64encode(png).decode(), coarse)
