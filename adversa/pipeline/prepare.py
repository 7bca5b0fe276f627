"""prepare: read the source once, decode and resize every image, group, split by group, write
Parquet shards per role.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from adversa import config as cfg
from adversa.data import files, images, near, sources, split
from adversa.data.records import SKIP
from adversa.engine.interface import Engine
from adversa.engine.step import Facts, cost, mapped, run_step
from adversa.engine.tasks import Part, Work
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files as storage_files
from adversa.storage import tables
from adversa.storage.path import StoragePath, rmtree, scratch
from adversa.types import ROLES, UserError, digest

# A decoded image on its way to its role: an Example plus what the split needs to know about its
# look.
DECODED = pa.schema(
    [
        *tables.EXAMPLES,
        ("class", pa.string()),
        ("phash", pa.uint64()),
        ("thumb", pa.binary()),
        ("problem", pa.string()),
    ]
)
LOOK = ["id", "source", "class", "group", "phash", "problem"]


def prepare(engine: Engine, config: cfg.Data, out: StoragePath) -> None:
    """Fill data/<role>/part-*.parquet, classes.json, split.json and leaks.json. UserError for
    anything wrong with the source.
    """
    recipe = Recipe("prepare", 1, config.model_dump(mode="json"), {})
    body = partial(_prepare, engine, config, out, recipe.fingerprint)
    run_step(out, recipe, body, engine.handle)
    rmtree(
        out / "decoded", missing_ok=True
    )  # a cut-off attempt may have left it after the manifest


def _prepare(
    engine: Engine, config: cfg.Data, out: StoragePath, asked: str, progress: Progress
) -> Facts:
    staging = out / "decoded"
    waited, classes, known, problems = _decode(engine, config, staging, asked, progress)
    looks = [tables.read_part(p, LOOK) for p in tables.parts(staging)]
    look, firsts = pa.concat_tables(looks), np.cumsum([0, *map(len, looks)])
    bad = look.filter(pa.compute.is_valid(look["problem"]))
    problems += bad.select(["source", "problem"]).to_pylist()
    kept, roles, leaks = _roles(config, classes, known, staging, look, problems)
    ids = look["id"].take(kept).to_pylist()
    del look, looks

    def told(_: dict[str, Any]) -> None:
        progress({"done": int(firsts[-1]), "total": int(firsts[-1]), "unit": "image"})

    for role in ROLES:
        dealt = np.array([roles[i][0] == role for i in ids], bool)
        groups = [roles[i][1] for i in compress(ids, dealt)]
        parts = _role_parts(kept[dealt], groups, firsts, config.part_rows)
        make = partial(make_role, staging)
        spent = mapped(engine, make, parts, out / role, told)
        waited |= {k: waited[k] + spent[k] for k in ("waited", "device_seconds")}
    counts = Counter((role, name) for role, _, name in roles.values())

    rows = [(i, group, role) for i, (role, group, _) in sorted(roles.items())]
    by_class = {r: {c: counts[r, c] for c in classes} for r in ROLES}
    split_hash = split.split_hash(rows)
    storage_files.write_json(out / "classes.json", {"classes": classes})
    storage_files.write_json(
        out / "split.json", {"split_hash": split_hash, "images": by_class, "groups": _groups(rows)}
    )
    storage_files.write_json(out / "leaks.json", leaks)
    rmtree(staging)
    # The split's hash knows ids, groups and roles; what is trained on hangs on the pictures' shape
    # and the labels too.
    fingerprint = digest(split_hash, asked, *classes, *(roles[i][2] for i, _, _ in rows))
    return waited | {"rows": len(rows), "fingerprint": fingerprint, "problems": len(problems)}


def _decode(
    engine: Engine, config: cfg.Data, staging: StoragePath, asked: str, progress: Progress
) -> tuple[Facts, list[str], list[Any], list[dict[str, str]]]:
    """Fill `staging` with every picture of the source: (the seconds waited, classes, groups known
    to be one, problems).
    """
    listing = sources.list_records(config)
    chunks = [
        listing.records[i : i + config.part_rows]
        for i in range(0, len(listing.records), config.part_rows)
    ]
    parts = [Part(i, len(c), {"records": c}) for i, c in enumerate(chunks)]
    _begin(staging, digest(asked, listing.classes, listing.merged, *chunks))
    started = time.perf_counter()
    done = engine.map_batches(
        partial(make_decode, config, listing.classes), parts, staging, progress
    )
    waited = cost(done, engine.tasks(), time.perf_counter() - started)
    return waited, listing.classes, listing.merged, list(listing.problems)


def _begin(staging: StoragePath, listing: str) -> None:
    """Keep a cut-off attempt's decoded parts, and those of its roles, only where the same was asked
    of the same records and groups: either may have been fixed.
    """
    if storage_files.read_json(staging / "listing.json") != {"listing": listing}:
        for folder in (staging, *(staging.parent / role for role in ROLES)):
            if folder.exists():
                rmtree(folder)
        storage_files.write_json(staging / "listing.json", {"listing": listing})


def make_decode(config: cfg.Data, classes: list[str]) -> Work:
    """Decodes a part's records into DECODED rows; a picture that cannot be read leaves a row with
    its problem.
    """
    decode = images.make_decoder(config, classes)

    def work(part: Part, path: StoragePath) -> int:
        rows = []
        for d in decode(part.payload["records"]):
            r = d.record
            rows.append(
                {
                    "id": d.id,
                    "source": r.source,
                    "class": r.label,
                    "label": classes.index(r.label),
                    "group": r.group,
                    "patient": r.patient,
                    "attributes": list(r.attributes.items()),
                    "problem": d.problem,
                    "image": tables.encode_png(d.image) if d.image is not None else None,
                    "mask": tables.encode_png(d.mask) if d.mask is not None else None,
                    "phash": d.phash,
                    "thumb": d.thumb.tobytes() if d.thumb is not None else None,
                }
            )
        tables.write_part(path, pa.Table.from_pylist(rows, schema=DECODED))
        return len(rows)

    return work


def _roles(
    config: cfg.Data,
    classes: list[str],
    known: list[Any],
    staging: StoragePath,
    look: pa.Table,
    problems: list[dict[str, str]],
) -> tuple[np.ndarray, dict[str, tuple[str, str, str]], dict[str, Any]]:
    """(the rows kept; id -> role, merged group, class; the leak report: what was merged or dropped,
    and why).

    Columns and not rows: there may be many, and a row as a dict takes ten times its bytes.
    """
    readable = np.flatnonzero(look["problem"].is_null().to_numpy())
    kept, copies, copied = _drop_copies(config, look, readable, problems)
    if not len(kept):
        raise UserError(
            f"data.path {config.path}: none of the {len(look)} pictures can be used "
            f"({_first(problems)}); fix them"
        )
    rows = look.take(kept)
    ids, groups, labels = rows["id"].to_pylist(), rows["group"].to_pylist(), _names(rows["class"])
    similar: list[Any] = []
    if config.grouped and config.near_duplicate_bits >= 0:
        with scratch(staging) as local:
            thumbs = near.Thumbs(_thumbs(staging, local), kept)
            similar = near.near_identical(
                ids, rows["phash"].to_numpy(), thumbs, groups, config.near_duplicate_bits
            )
    place = {i: n for n, i in enumerate(ids)}
    pairs = (
        [(a, b) for a, b, _ in known]
        + copied
        + [(groups[place[a]], groups[place[b]]) for a, b, _, _ in similar]
    )
    merged = split.merge_groups(groups, pairs)
    final = [merged[g] for g in groups] if config.grouped else ids
    roles = split.split(labels, final, config.split, classes)
    source = rows["source"]
    leaks = {
        "known_pairs": [{"group_a": a, "group_b": b, "why": why} for a, b, why in known],
        "near_identical": [
            {
                "a": source[place[a]].as_py(),
                "b": source[place[b]].as_py(),
                "bits": int(d),
                "correlation": round(float(c), 4),
            }
            for a, b, d, c in similar
        ],
        "exact_copies_dropped": copies,
        "problems": problems,
        "problems_by_kind": dict(Counter(p["problem"].split(":")[0] for p in problems)),
        "groups_before": len(set(groups)),
        "groups_after": len(set(final)),
    }
    return kept, dict(zip(ids, zip(roles, final, labels, strict=True), strict=True)), leaks


def _thumbs(staging: StoragePath, scratch: Path) -> Path:
    """The thumbnails of all decoded pictures, 1 KB each (of zeros where there is none), in one file
    in `scratch`.
    """
    path = scratch / "thumbs"
    with open(path, "wb") as f:
        for part in tables.parts(staging):
            for thumb in tables.read_part(part, ["thumb"])["thumb"].to_pylist():
                f.write(thumb or bytes(near.THUMB**2))
    return path


def _names(column: pa.ChunkedArray) -> list[str]:
    """A column of few different strings to a list in which equal ones are one object."""
    names: dict[str, str] = {}
    return [names.setdefault(v, v) for v in column.to_pylist()]


def _first(problems: list[dict[str, str]]) -> str:
    return (
        f"{files.printable(problems[0]['source'])}: {problems[0]['problem']}, and "
        f"{len(problems) - 1} more"
    )


def _drop_copies(
    config: cfg.Data, look: pa.Table, readable: np.ndarray, problems: list[dict[str, str]]
) -> tuple[np.ndarray, list[dict[str, str]], list[tuple[str, str]]]:
    """Of the rows `readable` those with a new id (the hash of the pixels), what was dropped, pairs
    of groups that share a picture.

    A copy under another label is a problem: one of the two labels is wrong. Its groups are one
    lesion all the same.
    """
    first: dict[str, int] = {}
    same: dict[int, list[int]] = defaultdict(
        list
    )  # first row of a picture that comes again -> all its rows
    for row, id_ in zip(readable.tolist(), look["id"].take(readable).to_pylist(), strict=True):
        at = first.setdefault(id_, row)
        if at != row:
            same[at] = [*(same[at] or [at]), row]
    copies, pairs, dropped = [], [], set()
    for at in sorted(same):
        rows = look.select(["source", "class", "group"]).take(same[at]).to_pylist()
        pairs += [
            (rows[0]["group"], r["group"]) for r in rows[1:] if r["group"] != rows[0]["group"]
        ]
        if len({r["class"] for r in rows}) > 1:
            names = ", ".join(f"{r['source']} ({r['class']})" for r in rows)
            if config.on_error == "fail":
                raise UserError(
                    f"the same picture has two labels: {names}; correct one, or leave both "
                    f"out with {SKIP}"
                )
            problems += [
                {"source": r["source"], "problem": f"same picture under two labels: {names}"}
                for r in rows
            ]
            dropped.add(at)
            continue
        copies += [
            {
                "dropped": r["source"],
                "kept": rows[0]["source"],
                "group_dropped": r["group"],
                "group_kept": rows[0]["group"],
            }
            for r in rows[1:]
        ]
    return np.array([row for row in first.values() if row not in dropped], np.int64), copies, pairs


def _role_parts(
    rows: np.ndarray, groups: Sequence[str], firsts: np.ndarray, part_rows: int
) -> list[Part]:
    """The parts of a role: which rows of which decoded parts each holds, and their merged groups.
    rows: of all decoded parts, in order; firsts: the first row of each of those.
    """
    parts = []
    for index, i in enumerate(range(0, len(rows), part_rows)):
        here = rows[i : i + part_rows]
        source = np.searchsorted(firsts, here, side="right") - 1
        taken = [(int(n), (here[source == n] - firsts[n]).tolist()) for n in np.unique(source)]
        payload = {"rows": taken, "groups": groups[i : i + part_rows]}
        parts.append(Part(index, len(here), payload))
    return parts


def make_role(staging: StoragePath) -> Work:
    """Writes a part of a role from rows of decoded parts."""
    decoded = tables.parts(staging)

    def work(part: Part, path: StoragePath) -> int:
        rows = pa.concat_tables(
            tables.read_part(decoded[n], tables.EXAMPLES.names).take(taken)
            for n, taken in part.payload["rows"]
        )
        at = rows.schema.get_field_index("group")
        groups = pa.array(part.payload["groups"], pa.string())
        rows = rows.set_column(at, "group", groups).combine_chunks()
        tables.write_part(path, rows.cast(tables.EXAMPLES))
        return len(rows)

    return work


def _groups(rows: list[tuple[str, str, str]]) -> dict[str, int]:
    return {role: len({g for _, g, r in rows if r == role}) for role in ROLES}
