"""The last steps of the filter: near-duplicates among the images of an arm, and the verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adversa import config as cfg
from adversa.curate import checks
from adversa.engine.interface import Engine
from adversa.engine.step import Facts, inputs, mapped, run_step
from adversa.engine.tasks import Part, Work
from adversa.pipeline.curate import THRESHOLDS, scale_of, thresholds_of
from adversa.run.control import NULL_HANDLE, RunHandle
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files, tables
from adversa.storage.path import StoragePath

if TYPE_CHECKING:
    from adversa.curate.filter import Verdict
    from adversa.curate.near_copy import NearCopy

MEMORISATION = "memorisation.json"
QUERIES = 512  # images whose near-duplicates are looked for, a part
VERDICT_ROWS = 1 << 16  # of a part of the verdicts, at least
# What the second pass reads of the first, and what it may write anew.
READ = ("request_id", "arm", "label", "strategy", "source", "similarity")
FINAL = ("keep", "reason", *(c.name for c in checks.columns(checks.FINAL)))


def near_duplicates(
    engine: Engine,
    synthetic: StoragePath,
    inspected: StoragePath,
    limits: StoragePath,
    out: StoragePath,
) -> None:
    """Write tables.TWINS: near-duplicates among the images of an arm that passed the first pass."""
    recipe = Recipe("twins", 1, {}, inputs(inspected=inspected, synthetic=synthetic, limits=limits))

    def body(progress: Progress) -> Facts:
        chunks = [
            (arm, i, min(i + QUERIES, len(ids)))
            for arm, ids in waiting(inspected).items()
            for i in range(0, len(ids), QUERIES)
        ]
        parts = [
            Part(k, stop - start, {"arm": arm, "start": start, "stop": stop})
            for k, (arm, start, stop) in enumerate(chunks)
        ]
        make = partial(make_near_duplicates, synthetic, inspected, limits)
        return mapped(engine, make, parts, out, progress)

    run_step(out, recipe, body, engine.handle)


def waiting(inspected: StoragePath) -> dict[str, list[str]]:
    """{arm: request ids of what passed the first pass, sorted}."""
    from adversa.curate.filter import PENDING

    rows = tables.read(inspected, ["request_id", "arm", "reason"], tables.VERDICTS)
    rows = rows.filter(pc.equal(rows["reason"], PENDING))
    arms = rows["arm"].to_pylist()
    ids = rows["request_id"].to_pylist()
    return {
        arm: sorted(i for i, a in zip(ids, arms, strict=True) if a == arm)
        for arm in sorted(set(arms))
    }


def make_near_duplicates(
    synthetic: StoragePath, inspected: StoragePath, limits: StoragePath
) -> Work:
    from adversa.curate.near_copy import NearCopy

    measured = files.read_json(limits / THRESHOLDS)
    assert measured is not None, f"{limits} is not finished"
    ids, scale = waiting(inspected), scale_of(limits)
    indices: dict[str, NearCopy] = {}

    def work(part: Part, path: StoragePath) -> int:
        arm = part.payload["arm"]
        if arm not in indices:
            indices[arm] = NearCopy(*pictures_of(synthetic, ids[arm]), like=scale)
        some = slice(part.payload["start"], part.payload["stop"])
        pairs = indices[arm].pairs(measured["near_copy"], some)
        rows: list[dict[str, str | float]] = [{"a": i} for i in indices[arm].ids[some]]
        rows += [{"a": a, "b": b, "similarity": s} for a, b, s in pairs]
        tables.write_part(path, pa.Table.from_pylist(rows, schema=tables.TWINS))
        return part.rows

    return work


def pictures_of(
    synthetic: StoragePath, ids: Sequence[str]
) -> tuple[list[str], Iterator[np.ndarray]]:
    """(ids, blocks of uint8 images [n, H, W, 3], one read at a time) of some generated images, in
    the order in which they lie.
    """
    paths = tables.parts(synthetic)
    wanted = frozenset(ids)  # pyarrow's is_in would hash all of them anew for each part
    held = tables.each(
        lambda p: tables.read_part(p, ["request_id"])["request_id"].to_pylist(), paths
    )

    def blocks() -> Iterator[np.ndarray]:
        for path in paths:
            for batch in tables.batches(path, ["request_id", "image"]):
                keep = pa.array(
                    [i in wanted for i in batch.column("request_id").to_pylist()], pa.bool_()
                )
                if len(images := batch.column("image").filter(keep)):
                    yield tables.decode_images(images)

    return [i for names in held for i in names if i in wanted], blocks()


def finalize(
    inspected: StoragePath,
    twins: StoragePath,
    limits: StoragePath,
    config: cfg.Curate,
    out: StoragePath,
    handle: RunHandle = NULL_HANDLE,
) -> None:
    """Write tables.VERDICTS after the second pass (rows in the order of the first), and
    memorisation.json.
    """
    from adversa.curate import filter

    names = inputs(inspected=inspected, limits=limits) | (
        inputs(twins=twins) if config.twins else {}
    )
    recipe = Recipe("settle", 1, {"twins": config.twins, "quota": config.quota}, names)

    def body(progress: Progress) -> Facts:
        found = [
            filter.Verdict(**row)
            for p in tables.parts(inspected)
            for row in tables.read_part(p, [*READ, *FINAL]).to_pylist()
        ]
        rows = (
            tables.read(twins, schema=tables.TWINS) if config.twins else tables.TWINS.empty_table()
        )
        alone, paired = rows.filter(pc.field("b").is_null()), rows.filter(pc.field("b").is_valid())
        pairs = zip(*(paired[name].to_pylist() for name in ("a", "b", "similarity")), strict=True)
        final = filter.finalize(found, alone["a"].to_pylist(), pairs, thresholds_of(limits, config))
        _write_verdicts(inspected, final, out)
        held_out = (files.read_json(limits / THRESHOLDS) or {})["held_out"]
        files.write_json(out / MEMORISATION, memorised(final, held_out))
        return {"rows": len(final), "kept": sum(v.keep for v in final)}

    run_step(out, recipe, body, handle)


def _write_verdicts(inspected: StoragePath, final: Sequence[Verdict], out: StoragePath) -> None:
    """Write the verdicts of the first pass with the columns FINAL replaced, VERDICT_ROWS or a few
    more a part.
    """
    read, held, at, index = tables.parts(inspected), [], 0, 0
    if not read:
        tables.write_part(out / tables.part_name(0), tables.VERDICTS.empty_table())
    for path in read:
        held.append(tables.read_part(path))
        count = sum(map(len, held))
        if count < VERDICT_ROWS and path != read[-1]:
            continue
        rows = pa.concat_tables(held)
        new = {name: [getattr(v, name) for v in final[at : at + count]] for name in FINAL}
        columns = [new.get(name, rows[name]) for name in tables.VERDICTS.names]
        tables.write_part(out / tables.part_name(index), pa.table(columns, schema=tables.VERDICTS))
        held, at, index = [], at + count, index + 1


def memorised(verdicts: Sequence[Verdict], held_out: Sequence[float]) -> dict[str, Any]:
    """{arm: curate.memorisation.Memorisation as plain values}, of all generated images, kept or
    not; None where there are none.
    """
    from adversa.curate.memorisation import memorisation

    measured = {}
    for arm in sorted({v.arm for v in verdicts}):
        m = memorisation(
            np.array([v.similarity for v in verdicts if v.arm == arm]), np.array(held_out)
        )
        measured[arm] = None if m is None else asdict(m)
    return measured
