"""The pictures of the page, as data URIs: hard cases, what was generated from them, and the real
image nearest to each of those.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
from PIL import Image

from adversa.curate.checks import CHECKS, FIRST, Check
from adversa.curate.filter import KEPT, NOT_FINITE, NOT_GENERATED
from adversa.report.gather import Facts, number
from adversa.report.words import fixed
from adversa.storage import tables
from adversa.storage.arrays import RoleArray
from adversa.storage.path import StoragePath
from adversa.types import ROLES, Json

CASES, OFFSPRING, SAMPLES = 24, 6, 6
# pixels: a larger picture is made smaller, for a page of a few megabytes
LARGEST, LARGEST_NEAREST, LARGEST_SHEET = 96, 64, 512
# bytes: up to here a picture is shown as it is; above, JPEG says the same in a fraction of it
LARGEST_PNG = 4096
MARKS = {c.reason: c.mark for c in CHECKS} | {KEPT: "kept"}
MARKS |= dict.fromkeys((NOT_GENERATED, NOT_FINITE), "broken")


@dataclass(frozen=True)
class Picture:
    """uri is None where the run folder no longer holds the picture; coarse: shown enlarged, with
    visible pixels.
    """

    uri: str | None
    coarse: bool


NONE = Picture(None, False)


@dataclass(frozen=True)
class Number:
    """A number of a verdict beside what it is held to ("" where the check is off); failed: it is
    why the image was not kept.
    """

    name: str
    value: str
    limit: str
    failed: bool


@dataclass(frozen=True)
class Nearest:
    """The real image that a generated one is most like. picture is None for an image of test: those
    are not shown to anyone.
    """

    role: str
    picture: Picture | None
    itself: bool  # it is the hard case that was generated from


@dataclass(frozen=True)
class Generated:
    picture: Picture
    reason: str
    keep: bool
    numbers: list[Number]
    nearest: Nearest | None

    @property
    def mark(self) -> str:
        return MARKS.get(self.reason, "none")


@dataclass(frozen=True)
class Case:
    number: int
    label: int
    predicted: int
    reason: str
    loss: float
    picture: Picture
    offspring: list[Generated]
    generated: int  # all there are
    kept: int


@dataclass(frozen=True)
class Gallery:
    """total: hard cases there are, shown or not. samples: label -> images of another arm,
    generated without a hard case.
    """

    round: int
    cases: list[Case]
    total: int
    samples: dict[int, list[Generated]]

    @property
    def labels(self) -> dict[int, int]:
        """label -> generated images shown."""
        found = Counter({c.label: 0 for c in self.cases})
        for label, images in self._shown():
            found[label] += len(images)
        return dict(sorted(found.items()))

    @property
    def reasons(self) -> dict[str, int]:
        """reason -> generated images shown, kept first."""
        found = Counter(p.reason for _, images in self._shown() for p in images)
        return dict(sorted(found.items(), key=lambda r: (r[0] != KEPT, r[0])))

    @property
    def refused(self) -> int:
        """Generated images shown that were not kept, whatever the reason."""
        return sum(not p.keep for _, images in self._shown() for p in images)

    @property
    def marks(self) -> dict[str, str]:
        """id of a filter -> the class name, in the page, of the images it leaves."""
        return {str(i): f"r{i}" for i in range(len(self.reasons))} | {"refused": "refused"}

    def _shown(self) -> list[tuple[int, list[Generated]]]:
        return [(c.label, c.offspring) for c in self.cases] + list(self.samples.items())


def gallery(facts: Facts, round_number: int) -> Gallery:
    """The first cases of a round, in the order they were taken (which goes round the classes), and
    their first images by id.

    An id is a hash: nobody chose an image by its looks.
    """
    run = facts.run
    hard = (
        tables.read(run.round(round_number, "hard"), schema=tables.HARD_CASES)
        .sort_by("rank")
        .to_pylist()
    )
    shown = hard[:CASES]
    offspring, samples = _asked(facts, round_number, {h["example"] for h in shown})
    wanted = [r for ids in offspring.values() for r in ids[:OFFSPRING]] + [
        r for ids in samples.values() for r in ids
    ]
    verdicts = _verdicts(
        run.round(round_number, "verdicts"),
        {r for ids in offspring.values() for r in ids} | set(wanted),
    )
    neighbours = {n for r in wanted if (n := _neighbour(verdicts.get(r)))}
    real = _real(run.data, {h["example"] for h in shown}, neighbours)
    pictures = _pictures(run.round(round_number, "synthetic"), set(wanted))

    def generated(request: str, example: str | None) -> Generated:
        v = verdicts.get(request) or {}
        reason, nearest = v.get("reason") or "no verdict", _nearest(_neighbour(v), real, example)
        return Generated(
            pictures.get(request, NONE), reason, bool(v.get("keep")), numbers(v), nearest
        )

    found = []
    for i, h in enumerate(shown):
        ids = offspring[h["example"]]
        found.append(
            Case(
                number=i + 1,
                label=h["label"],
                predicted=h["predicted"],
                reason=h["reason"],
                loss=h["loss"],
                picture=real.get(h["example"], ("mine", NONE))[1] or NONE,
                offspring=[generated(r, h["example"]) for r in ids[:OFFSPRING]],
                generated=len(ids),
                kept=sum(bool((verdicts.get(r) or {}).get("keep")) for r in ids),
            )
        )
    return Gallery(
        round_number,
        found,
        len(hard),
        {c: [generated(r, None) for r in ids] for c, ids in samples.items()},
    )


def _asked(
    facts: Facts, round_number: int, examples: Collection[str]
) -> tuple[dict[str, list[str]], dict[int, list[str]]]:
    """(hard case -> all requests of the arm in question, sorted; label -> the first of `unguided`,
    where that is another arm).
    """
    folder, names = (
        facts.run.round(round_number, "requests"),
        ["request_id", "example", "label", "arm"],
    )
    rows = tables.read(folder, names, tables.REQUESTS).to_pydict()
    offspring: dict[str, list[str]] = {example: [] for example in examples}
    others: dict[int, list[str]] = {}
    for request, example, label, arm in sorted(
        zip(*rows.values(), strict=True), key=lambda r: r[0]
    ):
        if arm == facts.after and example in offspring:
            offspring[example].append(request)
        elif arm == "unguided" and arm != facts.after:
            others.setdefault(label, []).append(request)
    return offspring, {c: ids[:SAMPLES] for c, ids in sorted(others.items())}


def _verdicts(folder: StoragePath, ids: Collection[str]) -> dict[str, Json]:
    rows = tables.read(folder, tables.VERDICTS.names, tables.VERDICTS)
    wanted = [i for i, request in enumerate(rows["request_id"].to_pylist()) if request in ids]
    return {row["request_id"]: row for row in rows.take(pa.array(wanted, pa.int64())).to_pylist()}


def numbers(v: Json) -> list[Number]:
    """The numbers of a verdict that are known, with their limits, in the order of the checks; a
    number that failed is there though it is not known.
    """
    found = []
    for column, group in groupby(CHECKS, key=lambda c: c.number):
        checks = list(group)
        value, digits = number(v.get(column)), checks[0].digits
        value = None if value == checks[0].nothing else value
        failed = v.get("reason") in {c.reason for c in checks}
        if value is not None or failed:
            limit = _limit(v, checks)
            found.append(Number(checks[0].title, fixed(value, digits), limit, failed))
    return found


def _limit(v: Json, checks: list[Check]) -> str:
    """What the checks of one number hold it to: "≥ 0.20", "0.20 to 0.99", "" where all are off."""
    bounds = [(c, x) for c in checks if (x := number(c.bound(v))) not in (None, c.vacuous)]
    if len(bounds) == 1:
        return f"{bounds[0][0].sign} {fixed(bounds[0][1], bounds[0][0].digits)}"
    return " to ".join(fixed(x, c.digits) for c, x in bounds)


def _neighbour(v: Json | None) -> str:
    """The id of the real image in question: in features where that is why it was not kept, in
    pixels otherwise.
    """
    if not v:
        return ""
    failed = [c.neighbour for c in FIRST if c.neighbour and c.reason == v.get("reason")]
    return v.get(failed[0] if failed else "nearest") or ""


def _nearest(
    neighbour: str, real: dict[str, tuple[str, Picture | None]], example: str | None
) -> Nearest | None:
    if neighbour not in real:
        return None
    role, found = real[neighbour]
    return Nearest(role, found, neighbour == example)


def _real(
    data: StoragePath, cases: Collection[str], neighbours: Collection[str]
) -> dict[str, tuple[str, Picture | None]]:
    """id -> (role, picture) of real images; the pictures of test stay closed: only their ids are
    read.
    """
    found: dict[str, tuple[str, Picture | None]] = {}
    for role in ROLES:
        if role == "test":
            ids = tables.read(data / role, ["id"], tables.EXAMPLES)["id"].to_pylist()
            found |= {i: (role, None) for i in set(ids) & set(neighbours)}
            continue
        large = _pictures(data / role, cases) if role == "mine" else {}
        small = _pictures(data / role, set(neighbours) - large.keys(), LARGEST_NEAREST)
        found |= {i: (role, p) for i, p in (large | small).items()}
    return found


def _pictures(
    folder: StoragePath, ids: Collection[str], largest: int = LARGEST
) -> dict[str, Picture]:
    """Pictures of the rows with these ids; no other is decoded."""
    if not ids:
        return {}
    array = RoleArray(folder, build=False)
    rows = np.flatnonzero(np.isin(array.ids, [i.encode() for i in ids]))
    if not len(rows):
        return {}
    names = [i.decode() for i in array.ids[rows].tolist()]
    return {i: _picture(x, largest) for i, x in zip(names, array.take(rows), strict=True)}


def sheet(path: StoragePath) -> Picture:
    """A grid of many pictures; none where the file is gone."""
    return _picture(tables.decode_png(path.read_bytes()), LARGEST_SHEET) if path.exists() else NONE


def _picture(pixels: np.ndarray, largest: int) -> Picture:
    """uint8 [H, W, 3] as a data URI, made smaller where it is large."""
    image = Image.fromarray(pixels).convert("RGB")
    coarse = max(image.size) < largest
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    kind, encoded = "png", tables.encode_png(np.asarray(image))
    if len(encoded) > LARGEST_PNG:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=88, subsampling=0)
        kind, encoded = "jpeg", buffer.getvalue()
    return Picture(f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}", coarse)
