"""prepare: read the source once, decode and resize every image, group, split by group, write Parquet shards per role."""

from __future__ import annotations

import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from adversa import config as cfg
from adversa import runs, tables
from adversa.data import files, images, near, sources, split
from adversa.loop.engine import Engine, Part, Work
from adversa.loop.step import Facts, cost, run_step
from adversa.types import ROLES, UserError, digest

# A decoded image on its way to its role: an Example plus what the split needs to know about its look.
DECODED = pa.schema(
    [*tables.EXAMPLES, ("class", pa.string()), ("phash", pa.uint64()), ("thumb", pa.binary()), ("problem", pa.string())]
)
LOOK = ["id", "source", "label", "class", "group", "phash", "thumb", "problem"]


def prepare(engine: Engine, config: cfg.Data, out: Path) -> None:
    """Fill data/<role>/part-*.parquet, classes.json, split.json and leaks.json. UserError for anything wrong with the source."""
    recipe = runs.Recipe("prepare", 1, config.model_dump(mode="json"), {})
    run_step(out, recipe, partial(_prepare, engine, config, out, recipe.fingerprint))
    shutil.rmtree(out / "decoded", ignore_errors=True)  # a cut-off attempt may have left it after the manifest


def _prepare(engine: Engine, config: cfg.Data, out: Path, asked: str, progress: runs.Progress) -> Facts:
    listing = sources.list_records(config)
    chunks = [listing.records[i : i + config.part_rows] for i in range(0, len(listing.records), config.part_rows)]
    parts = [Part(i, len(c), {"records": c}) for i, c in enumerate(chunks)]
    staging = out / "decoded"
    _begin(staging, digest(asked, *chunks))
    started = time.perf_counter()
    done = engine.map_batches(partial(make_decode, config, listing.classes), parts, staging, progress)
    waited = cost(done, engine.tasks(), time.perf_counter() - started)

    look = pa.concat_tables(pq.read_table(p, columns=LOOK) for p in tables.parts(staging))
    problems = list(listing.problems)
    problems += [
        {"source": s, "problem": p} for s, p in zip(look["source"].to_pylist(), look["problem"].to_pylist(), strict=True) if p
    ]
    roles, leaks = _roles(config, listing.classes, listing.merged, look, problems)
    counts = _write_roles(staging, out, config.part_rows, roles)

    rows = [(i, group, role) for i, (role, group) in sorted(roles.items())]
    labels = dict(zip(look["id"].to_pylist(), look["class"].to_pylist(), strict=True))
    by_class = {r: {c: counts[r, c] for c in listing.classes} for r in ROLES}
    split_hash = split.split_hash(rows)
    runs.write_json(out / "classes.json", {"classes": listing.classes})
    runs.write_json(out / "split.json", {"split_hash": split_hash, "images": by_class, "groups": _groups(rows)})
    runs.write_json(out / "leaks.json", leaks)
    shutil.rmtree(staging)
    # The split's hash knows ids, groups and roles; what is trained on hangs on the pictures' shape and the labels too.
    fingerprint = digest(split_hash, asked, *listing.classes, *(labels[i] for i, _, _ in rows))
    return waited | {"rows": len(rows), "fingerprint": fingerprint, "problems": len(problems)}


def _begin(staging: Path, listing: str) -> None:
    """Keep a cut-off attempt's decoded parts only where the same was asked of the same records: either may have been mended."""
    if runs.read_json(staging / "listing.json") != {"listing": listing}:
        for folder in (staging, *(staging.parent / role for role in ROLES)):
            if folder.exists():
                shutil.rmtree(folder)
        runs.write_json(staging / "listing.json", {"listing": listing})


def make_decode(config: cfg.Data, classes: list[str]) -> Work:
    """Decodes a part's records into DECODED rows; a picture that cannot be read leaves a row with its problem."""
    decode = images.make_decoder(config, classes)

    def work(part: Part, path: Path) -> int:
        rows = []
        for d in decode(part.payload["records"]):
            r = d.record
            rows.append({
                "id": d.id, "source": r.source, "class": r.label, "label": classes.index(r.label), "group": r.group,
                "patient": r.patient, "attributes": list(r.attributes.items()), "problem": d.problem,
                "image": tables.encode_png(d.image) if d.image is not None else None,
                "mask": tables.encode_png(d.mask) if d.mask is not None else None,
                "phash": d.phash, "thumb": d.thumb.tobytes() if d.thumb is not None else None,
            })  # fmt: skip
        tables.write_part(path, pa.Table.from_pylist(rows, schema=DECODED))
        return len(rows)

    return work


def _roles(
    config: cfg.Data, classes: list[str], known: list[Any], look: pa.Table, problems: list[dict[str, str]]
) -> tuple[dict[str, tuple[str, str]], dict[str, Any]]:
    """id -> (role, merged group), and the leak report: what was merged or dropped, and why."""
    readable = [r for r in look.drop_columns(["problem"]).filter(pa.compute.is_null(look["problem"])).to_pylist()]
    rows, copies, copied = _drop_copies(config, readable, problems)
    if not rows:
        raise UserError(f"data.path {config.path}: none of the {len(look)} pictures can be used ({_first(problems)}); mend them")
    groups = [r["group"] for r in rows]
    pairs = [(a, b) for a, b, _ in known] + copied
    similar: list[Any] = []
    if config.grouped and config.near_duplicate_bits >= 0:
        thumbs = np.stack([np.frombuffer(r["thumb"], np.uint8).reshape(near.THUMB, near.THUMB) for r in rows])
        phashes = np.array([r["phash"] for r in rows], np.uint64)
        similar = near.near_identical([r["id"] for r in rows], phashes, thumbs, groups, config.near_duplicate_bits)
    group_of, source_of = {r["id"]: r["group"] for r in rows}, {r["id"]: r["source"] for r in rows}
    pairs += [(group_of[a], group_of[b]) for a, b, _, _ in similar]
    merged = split.merge_groups(groups, pairs)
    final = [merged[g] for g in groups] if config.grouped else [r["id"] for r in rows]
    roles = split.split([r["class"] for r in rows], final, config.split, classes)
    leaks = {
        "known_pairs": [{"group_a": a, "group_b": b, "why": why} for a, b, why in known],
        "near_identical": [
            {"a": source_of[a], "b": source_of[b], "bits": int(d), "correlation": round(float(c), 4)} for a, b, d, c in similar
        ],
        "exact_copies_dropped": copies,
        "problems": problems,
        "problems_by_kind": dict(Counter(p["problem"].split(":")[0] for p in problems)),
        "groups_before": len(set(groups)),
        "groups_after": len(set(final)),
    }
    return {r["id"]: (role, g) for r, role, g in zip(rows, roles, final, strict=True)}, leaks


def _first(problems: list[dict[str, str]]) -> str:
    return f"{files.printable(problems[0]['source'])}: {problems[0]['problem']}, and {len(problems) - 1} more"


def _drop_copies(
    config: cfg.Data, rows: list[dict[str, Any]], problems: list[dict[str, str]]
) -> tuple[list[dict[str, Any]], list[dict[str, str]], list[tuple[str, str]]]:
    """Rows whose id (the hash of the pixels) is new, what was dropped, and the pairs of groups that share a picture.

    A copy under another label is a problem: one of the two labels is wrong. Its groups are one lesion all the same.
    """
    by_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_id[row["id"]].append(row)
    kept, copies, pairs = [], [], []
    for same in by_id.values():
        first = same[0]
        pairs += [(first["group"], r["group"]) for r in same[1:] if r["group"] != first["group"]]
        if len({r["class"] for r in same}) > 1:
            names = ", ".join(f"{r['source']} ({r['class']})" for r in same)
            if config.on_error == "fail":
                raise UserError(
                    f"the same picture has two labels: {names}; correct one, or set data.on_error=skip to leave both out"
                )
            problems += [{"source": r["source"], "problem": f"same picture under two labels: {names}"} for r in same]
            continue
        kept.append(first)
        copies += [
            {"dropped": r["source"], "kept": first["source"], "group_dropped": r["group"], "group_kept": first["group"]}
            for r in same[1:]
        ]
    return kept, copies, pairs


def _write_roles(staging: Path, out: Path, part_rows: int, roles: dict[str, tuple[str, str]]) -> Counter[tuple[str, str]]:
    """Stream the decoded parts into role folders, a buffer of one part a role; each image once. Images by (role, class)."""
    for role in ROLES:
        shutil.rmtree(out / role, ignore_errors=True)  # parts of a cut-off attempt
    written: set[str] = set()
    counts: Counter[tuple[str, str]] = Counter()
    buffers: dict[str, list[dict[str, Any]]] = {r: [] for r in ROLES}
    index = Counter[str]()

    def flush(role: str) -> None:
        table = pa.Table.from_pylist(buffers[role], schema=tables.EXAMPLES)
        tables.write_part(out / role / tables.part_name(index[role]), table)
        index[role] += 1
        buffers[role] = []

    for row in _decoded(staging):
        if row["id"] not in roles or row["id"] in written or row["problem"]:
            continue
        written.add(row["id"])
        role, row["group"] = roles[row["id"]]
        counts[role, row["class"]] += 1
        buffers[role].append({k: row[k] for k in tables.EXAMPLES.names})
        if len(buffers[role]) == part_rows:
            flush(role)
    for role in ROLES:
        if buffers[role]:
            flush(role)
    return counts


def _decoded(staging: Path) -> Iterator[dict[str, Any]]:
    for path in tables.parts(staging):
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()


def _groups(rows: list[tuple[str, str, str]]) -> dict[str, int]:
    return {role: len({g for _, g, r in rows if r == role}) for role in ROLES}
