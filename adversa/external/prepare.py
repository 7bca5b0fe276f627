"""The pictures of an external cohort: decoded, without those that the run has seen, each with the
cluster it belongs to.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from adversa import config as cfg
from adversa.data import images, near, split
from adversa.data.files import printable
from adversa.data.records import SKIP, ImageRecord
from adversa.engine.interface import BatchEngine
from adversa.engine.step import Facts, cost, inputs, run_step
from adversa.engine.tasks import Part, Work
from adversa.external import cohort
from adversa.external.cohort import FOLDER, ExternalCohort
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files, tables
from adversa.storage.arrays import RoleArray
from adversa.storage.path import StoragePath, rmtree, scratch, storage_path
from adversa.types import ROLES, UserError

LOOKS = ".looks"  # thumbnails of the run's own pictures, shared by all sets
SEEN = tuple(r for r in ROLES if r != "test")  # the roles that fitted or chose something
LEFT_OUT = "left-out.json"
WHY = ("same pixels", "look-alike", "same lesion")  # a picture is known to the run
LOOK = pa.schema({"id": pa.string(), "thumb": pa.binary()})
PICTURES = pa.schema(
    [
        *tables.EXAMPLES,
        ("lesion", pa.string()),
        ("class", pa.string()),
        ("thumb", pa.binary()),
        ("problem", pa.string()),
    ]
)


def prepare(
    external: ExternalCohort, engine: BatchEngine, say: Callable[[str], None] = lambda _: None
) -> None:
    """Decode the set, leave out what the run has seen, name the clusters; labels are scored
    classes.
    """
    saved = files.read_json(external.folder / "set.json")
    assert saved is not None, "check() writes it"
    config = external.settings() | {"set": saved["content"]}
    recipe = Recipe("external", 1, config, inputs(data=external.run.data))
    if (
        not step_folder.is_finished(external.pictures)
        and (files.read_json(external.pictures / step_folder.RECIPE) or recipe.to_json())
        != recipe.to_json()
    ):
        rmtree(external.pictures)

    def body(progress: Progress) -> Facts:
        staging = external.pictures / "decoded"
        facts = _decode(external, engine, staging, progress)
        say("comparing the pictures with those the run has seen")
        looks = own_looks(external.run, engine)
        counts = _write(external, staging, looks)
        rmtree(staging)
        return facts | counts

    run_step(external.pictures, recipe, body, engine.handle)
    rmtree(
        external.pictures / "decoded", missing_ok=True
    )  # a cut-off attempt may have left it after the manifest


def _decode(
    external: ExternalCohort, engine: BatchEngine, staging: StoragePath, progress: Progress
) -> Facts:
    rows, size = external.outside.records, external.data.part_rows
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    parts = [Part(i, len(c), {"records": c}) for i, c in enumerate(chunks)]
    make = partial(
        make_pictures,
        external.data,
        external.translation.names,
        external.outside.unit,
        external.config.data.crop,
    )
    started = time.perf_counter()
    done = engine.map_batches(make, parts, staging, progress)
    return cost(done, engine.tasks(), time.perf_counter() - started)


def make_pictures(data: cfg.Data, classes: list[str], unit: str, crop: str) -> Work:
    """Decodes a part's records into PICTURES rows. crop: the run's own, by which it is compared
    with the run's pictures.
    """
    decode = images.make_decoder(data, classes)
    other = (
        images.make_decoder(data.model_copy(update={"crop": crop}), classes)
        if crop != data.crop
        else None
    )

    def work(part: Part, path: StoragePath) -> int:
        records: list[ImageRecord] = part.payload["records"]
        found = decode(records)
        compared = other(records) if other is not None else found
        rows = []
        for d, c in zip(found, compared, strict=True):
            r = d.record
            rows.append(
                {
                    "id": d.id,
                    "source": r.source,
                    "class": r.label,
                    "label": classes.index(r.label),
                    "lesion": r.group,
                    "group": cohort.cluster(r.patient, r.group, unit),
                    "patient": r.patient,
                    "attributes": list(r.attributes.items()),
                    "problem": d.problem,
                    "image": tables.encode_png(d.image) if d.image is not None else None,
                    "thumb": thumb(c.image) if c.image is not None else None,
                }
            )
        tables.write_part(path, pa.Table.from_pylist(rows, schema=PICTURES))
        return len(rows)

    return work


def thumb(image: np.ndarray) -> bytes:
    """uint8 [R, R, 3] at the run's resolution and crop to its grey thumbnail, 32 x 32: of the run's
    pictures no other is kept.
    """
    return (
        Image.fromarray(image)
        .convert("L")
        .resize((near.THUMB, near.THUMB), Image.Resampling.BOX)
        .tobytes()
    )


def own_looks(run: RunDir, engine: BatchEngine) -> StoragePath:
    """Thumbnails of the run's pictures of SEEN, made once for all sets."""
    out = run.root / FOLDER / LOOKS
    recipe = Recipe("looks", 1, {"side": near.THUMB}, inputs(data=run.data))

    def body(progress: Progress) -> Facts:
        paths = [p for role in SEEN for p in tables.parts(run.data / role)]
        parts = [Part(i, tables.count(p), {"path": str(p)}) for i, p in enumerate(paths)]
        started = time.perf_counter()
        done = engine.map_batches(make_looks, parts, out, progress)
        return cost(done, engine.tasks(), time.perf_counter() - started) | {
            "rows": sum(p.rows for p in parts)
        }

    run_step(out, recipe, body, engine.handle)
    return out


def make_looks() -> Work:
    pictures = cache(RoleArray)

    def work(part: Part, path: StoragePath) -> int:
        source = storage_path(part.payload["path"])
        ids = tables.read_part(source, ["id"])["id"]
        thumbs = [thumb(image) for image in pictures(source.parent).part(source.name)]
        tables.write_part(path, pa.table({"id": ids, "thumb": thumbs}, schema=LOOK))
        return len(ids)

    return work


# ---- what is left out ----------------------------------------------------------------------------


def _write(external: ExternalCohort, staging: StoragePath, looks: StoragePath) -> Facts:
    """Write the pictures that count, and left-out.json: each of the others by name, with why."""
    columns = ["id", "source", "class", "lesion", "group", "thumb", "problem"]
    rows = pa.concat_tables(tables.read_part(p, columns) for p in tables.parts(staging)).to_pylist()
    problems = list(external.outside.problems) + [
        {k: r[k] for k in ("source", "problem")} for r in rows if r["problem"]
    ]
    kept, copies, copied = _first_of_each(
        [r for r in rows if not r["problem"]], external.data.on_error, problems
    )
    known, pairs = _known(
        kept, looks, staging, external.config.data.near_duplicate_bits, external.outside.unit
    )
    scored = [r for r in kept if r["id"] not in known]
    present = {r["class"] for r in scored}
    if len(present) < 2:
        what = f"only pictures of {next(iter(present))} are" if present else "no picture is"
        raise UserError(
            f"--on {external.data.path}: {what} left to score of {len(rows)} ({len(problems)} "
            f"unreadable or at odds, {len(known)} "
            f"known to the run, {len(copies)} copies); give a set the run has not seen"
        )
    merged = split.merge_groups(
        (r["group"] for r in scored), pairs + copied + external.outside.pairs
    )
    final = {r["id"]: merged[r["group"]] for r in scored}
    why = [known[r["id"]] | {"source": r["source"]} for r in kept if r["id"] in known]
    files.write_json(
        external.pictures / LEFT_OUT,
        {"labels": external.outside.omitted, "problems": problems, "copies": copies, "known": why},
    )
    _stream(external, staging, final)
    return {
        "rows": len(scored),
        "listed": external.outside.listed,
        "omitted": sum(external.outside.omitted.values()),
        "problems": len(problems),
        "copies": len(copies),
        "known": _reasons(why),
        "clusters": len(set(final.values())),
        "by_class": {c: sum(r["class"] == c for r in scored) for c in external.translation.names},
        "without_patient": sum(r["group"].startswith(cohort.LESION) for r in scored),
    }


def _reasons(known: Sequence[dict[str, str]]) -> dict[str, int]:
    return {why: sum(k["why"] == why for k in known) for why in WHY}


def _first_of_each(
    rows: list[dict[str, Any]], on_error: str, problems: list[dict[str, str]]
) -> tuple[list[dict[str, Any]], list[dict[str, str]], list[tuple[str, str]]]:
    """(rows with a new id, those dropped as copies, pairs of clusters that share a picture).

    A picture under two labels is a problem: one of them is wrong.
    """
    same: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for r in rows:
        same[r["id"]].append(r)
    kept, copies, pairs = [], [], []
    for found in same.values():
        if len({r["class"] for r in found}) == 1:
            kept.append(found[0])
            copies += [{"dropped": r["source"], "kept": found[0]["source"]} for r in found[1:]]
            pairs += [(found[0]["group"], r["group"]) for r in found[1:]]
            continue
        names = ", ".join(f"{printable(r['source'])} ({r['class']})" for r in found)
        if on_error == "fail":
            raise UserError(
                f"the same picture has two labels: {names}; correct one, or leave both out "
                f"with {SKIP}"
            )
        problems += [
            {"source": r["source"], "problem": f"same picture under two labels: {names}"}
            for r in found
        ]
    return kept, copies, pairs


def _known(
    rows: list[dict[str, Any]], looks: StoragePath, staging: StoragePath, bits: int, unit: str
) -> tuple[dict[str, dict[str, str]], list[tuple[str, str]]]:
    """(id -> why it is known to the run: same pixels, a look-alike, another picture of such a
    lesion; pairs of clusters of the set that share a look).

    A look-alike of a look-alike counts: of many equal pictures near.near_identical gives a chain.
    """
    own = tables.read(looks, schema=LOOK)
    ids = set(own["id"].to_pylist())
    known = {r["id"]: {"why": "same pixels"} for r in rows if r["id"] in ids}
    rest = [r for r in rows if r["id"] not in known]
    alike = _alike(rest, own, staging, bits)
    pairs = [(a, b) for a, b in alike if a not in ids and b not in ids]
    chained = split.merge_groups(
        ["run"], [("run" if a in ids else a, "run" if b in ids else b) for a, b in alike]
    )
    seen = chained["run"]
    known |= {r["id"]: {"why": "look-alike"} for r in rest if chained.get(r["id"]) == seen}
    if unit != cohort.IMAGE:
        lesions = {r["lesion"] for r in rows if r["id"] in known}
        known |= {
            r["id"]: {"why": "same lesion"}
            for r in rows
            if r["lesion"] in lesions and r["id"] not in known
        }
    group = {r["id"]: r["group"] for r in rows if r["id"] not in known}
    return known, [(group[a], group[b]) for a, b in pairs if a in group and b in group]


def _alike(
    rows: list[dict[str, Any]], own: pa.Table, folder: StoragePath, bits: int
) -> list[tuple[str, str]]:
    """Pairs of ids that look alike, of the set, or of the set and the run. folder: for a file of
    thumbnails, where it is local.
    """
    ids = [r["id"] for r in rows] + own["id"].to_pylist()
    groups = [r["id"] for r in rows] + ["run"] * len(
        own
    )  # the run's own pictures are not compared with each other
    with scratch(folder) as local:
        path = local / "thumbs"
        with open(path, "wb") as f:
            f.writelines(r["thumb"] for r in rows)
            for data in own["thumb"].to_pylist():
                f.write(data)
        thumbs = near.Thumbs(path)
        hashes = [
            near.perceptual_hash(thumbs[np.arange(i, min(i + 2048, len(ids)))])
            for i in range(0, len(ids), 2048)
        ]
        found = near.near_identical(ids, np.concatenate(hashes), thumbs, groups, bits)
        path.unlink()
    return [(a, b) for a, b, _, _ in found]


def _stream(external: ExternalCohort, staging: StoragePath, clusters: dict[str, str]) -> None:
    """The rows that count, part by part, their group the cluster they are resampled with."""
    for part in tables.parts(external.pictures):
        part.unlink()  # of a cut-off attempt
    written: set[str] = set()
    for index, path in enumerate(tables.parts(staging)):
        rows = tables.read_part(path, [*tables.EXAMPLES.names, "problem"]).to_pylist()
        chosen = []
        for r in rows:
            if r.pop("problem") is None and r["id"] in clusters and r["id"] not in written:
                written.add(r["id"])
                chosen.append(r | {"group": clusters[r["id"]], "mask": None})
        if chosen:
            tables.write_part(
                external.pictures / tables.part_name(index),
                pa.Table.from_pylist(chosen, schema=tables.EXAMPLES),
            )
