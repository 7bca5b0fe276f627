"""The gate as steps: limits measured on real images, each painted image by itself, twins among them, and the verdicts.

The near-copy indices hold every role, `test` too: they can only ever remove an image. No limit is set on `test`, no judge sees it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from adversa import config as cfg
from adversa import runs, tables
from adversa.loop.engine import Engine
from adversa.loop.judging import Judges, folders
from adversa.loop.parts import Part, Work
from adversa.loop.step import Facts, cost, inputs, run_step
from adversa.loop.steps import classes_of, matrix
from adversa.types import ROLES, UserError, Verdict

CHOOSING = tuple(r for r in ROLES if r != "test")
HELD_OUT = ("mine", "select")  # of the roles that may choose, those that the denoiser and the classifier were not fitted on
LIMITS, SCALE, MEMORISATION = "limits.json", "scale.npz", "memorisation.json"
QUERIES = 512  # pictures whose twins are looked for, a part


# ---- what is measured on real images, once a run -----------------------------------------------------------------------


def features(engine: Engine, data: Path, role: str, classifier: Path, judge: Path, out: Path) -> None:
    """Embeddings of a role's images under two classifiers of different architectures: tables.FEATURES."""
    recipe = runs.Recipe("features", 1, {"role": role}, inputs(data=data, classifier=classifier, judge=judge))

    def body(progress: runs.Progress) -> Facts:
        paths = tables.parts(data / role)
        parts = [Part(i, pq.read_metadata(p).num_rows, {"path": str(p)}) for i, p in enumerate(paths)]
        started = time.perf_counter()
        done = engine.map_batches(partial(make_features, classifier, judge), parts, out, progress, model=True)
        return cost(done, engine.tasks(model=True), time.perf_counter() - started) | {"rows": sum(p.rows for p in parts)}

    run_step(out, recipe, body)


def make_features(classifier: Path, judge: Path) -> Work:
    from adversa.classify.score import make_scorer

    scorers = [make_scorer(folder, embed=True) for folder in (classifier, judge)]

    def work(part: Part, path: Path) -> int:
        rows = pq.read_table(part.payload["path"], columns=["id", "label", "group", "image"])
        images = tables.decode_images(rows["image"])
        spaces = [list(scorer(images)[1]) for scorer in scorers]
        tables.write_part(path, pa.table([rows["id"], rows["label"], rows["group"], *spaces], schema=tables.FEATURES))
        return len(rows)

    return work


def limits(data: Path, features: Path, config: cfg.Curate, out: Path) -> None:
    """limits.json and scale.npz: what a painted image must keep to, measured on the roles that may choose.

    near_copy, near_copy_features: quantiles of the similarity of real images of different lesions; realism, realism_2: quantiles
    of held-out images' distance to the manifold of `train`, a number a class; held_out: similarities of held-out images to their
    nearest real image of another lesion, for the memorisation curve.
    """
    asked = {k: getattr(config, k) for k in ("near_copy_quantile", "realism_quantile")}
    recipe = runs.Recipe("limits", 1, asked, inputs(data=data, **{f"features-{r}": features / r for r in CHOOSING}))

    def body(progress: runs.Progress) -> Facts:
        progress({"done": 0, "total": 2, "unit": "index"})
        from adversa.curate.near_copy import NearCopy, NearFeatures, threshold

        ids, groups, images = real_images(data, CHOOSING)
        index = NearCopy(ids, images)
        names, similarity = index.strangers(ids, groups)
        found: dict[str, Any] = {"near_copy": threshold(similarity, config.near_copy_quantile)}
        held_out = set(real_ids(data, HELD_OUT))
        found["held_out"] = [float(s) for i, s in zip(names, similarity, strict=True) if i in held_out]
        progress({"done": 1, "total": 2, "unit": "index"})
        rows = read_features(features, CHOOSING)
        lesion = dict(zip(ids, groups, strict=True))
        known = rows["id"].to_pylist()
        in_features = NearFeatures(known, matrix(rows["classifier"]))
        found["near_copy_features"] = in_features.threshold(known, [lesion[i] for i in known], config.near_copy_quantile)
        found |= _realism(data, features, config)
        out.mkdir(parents=True, exist_ok=True)
        with open(out / SCALE, "wb") as f:
            np.savez(f, signal=index.scale.signal, noise=index.scale.noise)
        runs.write_json(out / LIMITS, found)
        return {"rows": len(ids)} | {k: found[k] for k in ("near_copy", "near_copy_features", "realism", "realism_2")}

    run_step(out, recipe, body)


def _realism(data: Path, features: Path, config: cfg.Curate) -> dict[str, list[float] | None]:
    from adversa.curate import realism

    if config.realism_quantile is None:
        return {"realism": None, "realism_2": None}
    held, classes = read_features(features, HELD_OUT), len(classes_of(data))
    found = {}
    for name, column in (("realism", "classifier"), ("realism_2", "judge")):
        ratios = manifold(features, column).ratio(matrix(held[column]))
        found[name] = realism.limits(ratios, held["label"].to_numpy(), classes, config.realism_quantile).tolist()
    return found


def manifold(features: Path, column: str) -> Any:
    """curate.realism.Manifold of `train` in one feature space. UserError where there are too few lesions for one."""
    from adversa.curate.realism import NEIGHBOUR, Manifold

    rows = read_features(features, ["train"])
    groups = rows["group"].to_pylist()
    if len(set(groups)) <= NEIGHBOUR:
        raise UserError(
            f"train has {len(set(groups))} lesions, too few to say what is like a real image; give more, or set "
            "curate.realism_quantile=null"
        )
    return Manifold(matrix(rows[column]), groups)


def read_features(features: Path, roles: Sequence[str]) -> pa.Table:
    return pa.concat_tables(tables.read(features / r, schema=tables.FEATURES) for r in roles)


def real_ids(data: Path, roles: Sequence[str]) -> list[str]:
    return [i for r in roles for i in tables.read(data / r, ["id"], tables.EXAMPLES)["id"].to_pylist()]


def real_images(data: Path, roles: Sequence[str]) -> tuple[list[str], list[str], Iterator[np.ndarray]]:
    """(ids, groups, blocks of uint8 images [n, H, W, 3] in their order) of some roles; one block is in memory at a time."""
    paths = [path for role in roles for path in tables.parts(data / role)]
    rows = pa.concat_tables(pq.read_table(path, columns=["id", "group"]) for path in paths)
    blocks = (
        tables.decode_images(batch.column("image"))
        for path in paths
        for batch in pq.ParquetFile(path).iter_batches(tables.ROW_GROUP, columns=["image"])
    )
    return rows["id"].to_pylist(), rows["group"].to_pylist(), blocks


# ---- each painted image by itself --------------------------------------------------------------------------------------


def limits_of(folder: Path, config: cfg.Curate) -> Any:
    """curate.gate.Limits of a run's measurements and settings."""
    from adversa.curate.gate import Limits

    found = runs.read_json(folder / LIMITS)
    assert found is not None, f"{folder} is not finished"
    off = config.realism_quantile is None
    spaces = {k: None if off else tuple(found[k]) for k in ("realism", "realism_2")}
    return Limits(
        near_copy=found["near_copy"], near_copy_features=found["near_copy_features"], least_agreement=config.min_agreement,
        most_agreement=config.max_agreement, contrast=config.min_contrast, clipped=config.max_clipped,
        twin=found["near_copy"] if config.twins else None, quota=config.quota, **spaces,
    )  # fmt: skip


def inspect(
    engine: Engine, requests: Path, synthetic: Path, data: Path, features: Path, limits: Path, classifier: Path, judge: Path,
    config: cfg.Curate, out: Path,
) -> None:  # fmt: skip
    """The first pass of the gate over every painted image: tables.VERDICTS, none kept yet."""
    judges = {f"judge-{k}": f for k, f in enumerate(folders(judge, config.folds))}
    names = inputs(synthetic=synthetic, requests=requests, data=data, limits=limits, classifier=classifier, **judges)
    recipe = runs.Recipe("inspect", 1, config.model_dump(mode="json", exclude={"judge", "quota", "twins"}), names)

    def body(progress: runs.Progress) -> Facts:
        parts = [
            Part(i, pq.read_metadata(p).num_rows, {"path": str(p), "requests": str(requests / p.name)})
            for i, p in enumerate(tables.parts(synthetic))
        ]
        make = partial(make_inspected, data, features, limits, classifier, judge, config)
        started = time.perf_counter()
        done = engine.map_batches(make, parts, out, progress, model=True)
        return cost(done, engine.tasks(model=True), time.perf_counter() - started) | {"rows": sum(p.rows for p in parts)}

    run_step(out, recipe, body)


def make_inspected(data: Path, features: Path, limits: Path, classifier: Path, judge: Path, config: cfg.Curate) -> Work:
    from adversa.classify.score import make_scorer
    from adversa.curate import gate
    from adversa.curate.near_copy import NearCopy, NearFeatures

    allowed = limits_of(limits, config)
    scorer, judges = make_scorer(classifier, embed=True), Judges(judge, config.folds, data)
    ids, _, images = real_images(data, ROLES)
    copies = NearCopy(ids, images, like=scale_of(limits))
    everyone = read_features(features, ROLES)
    in_features = NearFeatures(everyone["id"].to_pylist(), matrix(everyone["classifier"]))
    spaces = [manifold(features, c) for c in ("classifier", "judge")] if allowed.realism else None

    def work(part: Part, path: Path) -> int:
        rows = pq.read_table(part.payload["path"])
        asked = pq.read_table(part.payload["requests"], columns=["request_id", "strategy", "example"]).to_pylist()
        request = {r["request_id"]: r for r in asked}
        names, labels = rows["request_id"].to_pylist(), rows["label"].to_pylist()
        pictures = tables.decode_images(rows["image"])
        similarity, nearest = copies.nearest(pictures)
        probs, second = judges(pictures, labels, nearest)
        first = scorer(pictures)[1]
        similarity_2, nearest_2 = in_features.nearest(first)
        ratios = [space.ratio(x) for space, x in zip(spaces, (first, second), strict=True)] if spaces else [None, None]
        painted = gate.Painted(
            request_ids=names, arms=rows["arm"].to_pylist(), labels=labels, strategies=[request[i]["strategy"] for i in names],
            sources=[request[i]["example"] for i in names], finite=rows["finite"].to_pylist(), faults=rows["fault"].to_pylist(),
            images=pictures, probs=probs, ratio=ratios[0], ratio_2=ratios[1], similarity=similarity, nearest=nearest,
            similarity_2=similarity_2, nearest_2=nearest_2,
        )  # fmt: skip
        tables.write_part(path, tables.to_table(gate.inspect(painted, allowed), tables.VERDICTS))
        return len(rows)

    return work


def scale_of(limits: Path) -> Any:
    """curate.near_copy.Scale that a run's similarities are measured by."""
    from adversa.curate.near_copy import Scale

    with np.load(limits / SCALE, allow_pickle=False) as saved:
        return Scale(saved["signal"], saved["noise"])


# ---- twins, and the verdicts -------------------------------------------------------------------------------------------


def twins(engine: Engine, synthetic: Path, inspected: Path, limits: Path, out: Path) -> None:
    """Pairs of near copies among the images of an arm that passed the first pass: tables.TWINS."""
    recipe = runs.Recipe("twins", 1, {}, inputs(inspected=inspected, synthetic=synthetic, limits=limits))

    def body(progress: runs.Progress) -> Facts:
        found = waiting(inspected)
        chunks = [(arm, i, min(i + QUERIES, len(ids))) for arm, ids in found.items() for i in range(0, len(ids), QUERIES)]
        parts = [Part(k, stop - start, {"arm": arm, "start": start, "stop": stop}) for k, (arm, start, stop) in enumerate(chunks)]
        started = time.perf_counter()
        done = engine.map_batches(partial(make_twins, synthetic, inspected, limits), parts, out, progress)
        return cost(done, engine.tasks(), time.perf_counter() - started) | {"rows": sum(len(ids) for ids in found.values())}

    run_step(out, recipe, body)


def waiting(inspected: Path) -> dict[str, list[str]]:
    """arm -> request ids, sorted, of what passed the first pass."""
    from adversa.curate.gate import PENDING

    rows = tables.read(inspected, ["request_id", "arm", "reason"], tables.VERDICTS)
    rows = rows.filter(pc.equal(rows["reason"], PENDING))
    arms = rows["arm"].to_pylist()
    ids = rows["request_id"].to_pylist()
    return {arm: sorted(i for i, a in zip(ids, arms, strict=True) if a == arm) for arm in sorted(set(arms))}


def make_twins(synthetic: Path, inspected: Path, limits: Path) -> Work:
    from adversa.curate.near_copy import NearCopy

    measured = runs.read_json(limits / LIMITS)
    assert measured is not None, f"{limits} is not finished"
    ids, scale = waiting(inspected), scale_of(limits)
    indices: dict[str, NearCopy] = {}

    def work(part: Part, path: Path) -> int:
        arm = part.payload["arm"]
        if arm not in indices:
            indices[arm] = NearCopy(*pictures_of(synthetic, ids[arm]), like=scale)
        pairs = indices[arm].pairs(measured["near_copy"], slice(part.payload["start"], part.payload["stop"]))
        rows = [{"a": a, "b": b, "similarity": s} for a, b, s in pairs]
        tables.write_part(path, pa.Table.from_pylist(rows, schema=tables.TWINS))
        return part.rows

    return work


def pictures_of(synthetic: Path, ids: Sequence[str]) -> tuple[list[str], Iterator[np.ndarray]]:
    """(ids, blocks of uint8 images [n, H, W, 3]) of some painted images, in the order in which they lie."""
    wanted = pa.array(ids)
    parts = [pq.read_table(p, columns=["request_id", "image"]) for p in tables.parts(synthetic)]
    rows = pa.concat_tables(t.filter(pc.is_in(t["request_id"], wanted)) for t in parts)
    blocks = (tables.decode_images(rows["image"][i : i + tables.ROW_GROUP]) for i in range(0, len(rows), tables.ROW_GROUP))
    return rows["request_id"].to_pylist(), blocks


def settle(inspected: Path, twins: Path, limits: Path, config: cfg.Curate, out: Path) -> None:
    """The second pass: tables.VERDICTS, in the order of the first, and memorisation.json."""
    from adversa.curate import gate

    names = inputs(inspected=inspected, limits=limits) | (inputs(twins=twins) if config.twins else {})
    recipe = runs.Recipe("settle", 1, {"twins": config.twins, "quota": config.quota}, names)

    def body(progress: runs.Progress) -> Facts:
        found = [Verdict(**row) for row in tables.read(inspected, schema=tables.VERDICTS).to_pylist()]
        pairs = tables.read(twins, schema=tables.TWINS).to_pylist() if config.twins else []
        searched = [i for ids in waiting(inspected).values() for i in ids]
        settled = gate.settle(found, searched, [(p["a"], p["b"], p["similarity"]) for p in pairs], limits_of(limits, config))
        tables.write_part(out / tables.part_name(0), tables.to_table(settled, tables.VERDICTS))
        runs.write_json(out / MEMORISATION, memorised(settled, (runs.read_json(limits / LIMITS) or {})["held_out"]))
        return {"rows": len(settled), "kept": sum(v.keep for v in settled)}

    run_step(out, recipe, body)


def memorised(found: Sequence[Verdict], held_out: Sequence[float]) -> dict[str, Any]:
    """arm -> curate.memorisation.Memorisation as plain values, of all images painted, kept or not; None where there are none."""
    from adversa.curate.memorisation import memorisation

    told = {}
    for arm in sorted({v.arm for v in found}):
        m = memorisation(np.array([v.similarity for v in found if v.arm == arm]), np.array(held_out))
        told[arm] = None if m is None else asdict(m)
    return told
