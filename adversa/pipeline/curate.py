"""The gate as steps: limits measured on real images, each painted image by itself, twins among
them, and the verdicts.

The near-copy indices hold every role, `test` too: they can only ever remove an image. Of `test`
they have the pixels and the classifier's features, no label; no limit is set on it, no judge sees
it, and which judge speaks does not hang on it.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adversa import config as cfg
from adversa.common.statistics import softmax
from adversa.engine.interface import Engine
from adversa.engine.step import Facts, cost, inputs, run_step
from adversa.engine.tasks import Part, Work
from adversa.pipeline.verifier import Judges, folders
from adversa.run import step_folder
from adversa.run.control import NULL_HANDLE, RunHandle
from adversa.run.folder import classes_of
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files, tables
from adversa.storage.path import storage_path
from adversa.storage.predictions import matrix
from adversa.types import ROLES, UserError, Verdict

CHOOSING = tuple(r for r in ROLES if r != "test")
HELD_OUT = (
    "mine",
    "select",
)  # of the roles that may choose, those that the denoiser and the classifier were not fitted on
LIMITS, SCALE, MEMORISATION = "limits.json", "scale.npz", "memorisation.json"
HELD = 1000  # held-out images of the memorisation curve
QUERIES = 512  # pictures whose twins are looked for, a part
TOLD = (
    "request_id",
    "arm",
    "label",
    "strategy",
    "source",
    "similarity",
)  # what the second pass asks of the first
SETTLED = (
    "keep",
    "reason",
    "twin",
    "twin_similarity",
    "place",
    "twin_limit",
    "quota",
)  # what it may write anew
VERDICT_ROWS = 1 << 16


# ---- what is measured on real images, once a run -------------------------------------------------


def features(
    engine: Engine, data: Path, role: str, classifier: Path, judges: Sequence[Path], out: Path
) -> None:
    """What the classifier and the judges make of a role's images: tables.FEATURES."""
    names = inputs(
        data=data, classifier=classifier, **{f"judge-{k}": f for k, f in enumerate(judges)}
    )
    recipe = Recipe("features", 2, {"role": role}, names)

    def body(progress: Progress) -> Facts:
        paths = tables.parts(data / role)
        parts = [Part(i, tables.count(p), {"path": str(p)}) for i, p in enumerate(paths)]
        started = time.perf_counter()
        done = engine.map_batches(
            partial(make_features, classifier, () if role == "test" else tuple(judges)),
            parts,
            out,
            progress,
            model=True,
        )
        return cost(done, engine.tasks(model=True), time.perf_counter() - started) | {
            "rows": sum(p.rows for p in parts)
        }

    run_step(out, recipe, body, engine.handle)


def make_features(classifier: Path, judges: Sequence[Path]) -> Work:
    """judges: none for `test`, whose labels are not read either."""
    from adversa.classify.score import make_scorer

    scorer, panel = (
        make_scorer(classifier, embed=True),
        [make_scorer(folder, embed=True) for folder in judges],
    )

    def work(part: Part, path: Path) -> int:
        rows = tables.read_part(
            storage_path(part.payload["path"]),
            ["id", "image", *(("label", "group") if panel else ())],
        )
        images = tables.decode_images(rows["image"])
        found = [
            {"id": i, "classifier": x}
            for i, x in zip(rows["id"].to_pylist(), scorer(images)[1].tolist(), strict=True)
        ]
        if panel:
            scored = [judge(images) for judge in panel]
            labels = rows["label"].to_numpy()
            agreement = np.stack(
                [softmax(logits)[np.arange(len(labels)), labels] for logits, _ in scored], axis=1
            )
            told = zip(
                labels.tolist(),
                rows["group"].to_pylist(),
                scored[0][1].tolist(),
                agreement.tolist(),
                strict=True,
            )
            for row, (label, group, embedding, agreed) in zip(found, told, strict=True):
                row |= {"label": label, "group": group, "judge": embedding, "agreement": agreed}
        tables.write_part(path, pa.Table.from_pylist(found, schema=tables.FEATURES))
        return len(rows)

    return work


def limits(
    data: Path,
    features: Path,
    config: cfg.Curate,
    out: Path,
    handle: RunHandle = NULL_HANDLE,
) -> None:
    """limits.json and scale.npz: what a painted image must keep to, measured on the roles that may
    choose.

    near_copy, near_copy_features: quantiles of the similarity of real images of different lesions;
    most_agreement: quantile of what each judge gives the label of held-out images; realism,
    realism_2: quantiles of held-out images' distance to the manifold of `train`, a number a class;
    held_out: similarities of held-out images to their nearest image of another lesion, of any role
    as those of painted images are, for the memorisation curve alone.
    """
    asked = {
        k: getattr(config, k)
        for k in ("near_copy_quantile", "realism_quantile", "trivial_quantile")
    }
    recipe = Recipe(
        "limits", 2, asked, inputs(data=data, **{f"features-{r}": features / r for r in CHOOSING})
    )

    def body(progress: Progress) -> Facts:
        progress({"done": 0, "total": 3, "unit": "index"})
        from adversa.curate.near_copy import NearCopy, NearFeatures, threshold

        ids, groups, images = real_images(data, CHOOSING)
        index = NearCopy(ids, images)
        found: dict[str, Any] = {
            "near_copy": threshold(index.strangers(ids, groups)[1], config.near_copy_quantile)
        }
        progress({"done": 1, "total": 3, "unit": "index"})
        found["held_out"] = held_out(data, index.scale)
        progress({"done": 2, "total": 3, "unit": "index"})
        rows = read_features(features, CHOOSING)
        lesion = dict(zip(ids, groups, strict=True))
        known = rows["id"].to_pylist()
        in_features = NearFeatures(known, matrix(rows["classifier"]))
        found["near_copy_features"] = in_features.threshold(
            known, [lesion[i] for i in known], config.near_copy_quantile
        )
        found |= _realism(data, features, config) | {"most_agreement": _trivial(features, config)}
        buffer = io.BytesIO()
        np.savez(buffer, signal=index.scale.signal, noise=index.scale.noise)
        files.replace_bytes(out / SCALE, buffer.getbuffer())
        files.write_json(out / LIMITS, found)
        return {"rows": len(ids)} | {
            k: found[k] for k in ("near_copy", "near_copy_features", "realism", "realism_2")
        }

    run_step(out, recipe, body, handle)


def held_out(data: Path, scale: Any) -> list[float]:
    """Similarity of up to HELD images of the held-out roles to their nearest image of another
    lesion, of any role.
    """
    from adversa.curate.near_copy import NearCopy

    ids, groups, images = real_images(data, ROLES)
    among = real_ids(data, HELD_OUT)
    return NearCopy(ids, images, like=scale).strangers(ids, groups, among, HELD)[1].tolist()


def _trivial(features: Path, config: cfg.Curate) -> float:
    if config.trivial_quantile is None:
        return 1.0
    given = matrix(read_features(features, HELD_OUT)["agreement"])
    return float(np.quantile(given, config.trivial_quantile))


def _realism(data: Path, features: Path, config: cfg.Curate) -> dict[str, list[float] | None]:
    from adversa.curate import realism

    if config.realism_quantile is None:
        return {"realism": None, "realism_2": None}
    held, classes = read_features(features, HELD_OUT), len(classes_of(data))
    found = {}
    for name, column in (("realism", "classifier"), ("realism_2", "judge")):
        ratios = manifold(features, column).ratio(matrix(held[column]))
        found[name] = realism.limits(
            ratios, held["label"].to_numpy(), classes, config.realism_quantile
        ).tolist()
    return found


def manifold(features: Path, column: str) -> Any:
    """curate.realism.Manifold of `train` in one feature space. UserError where there are too few
    lesions for one.
    """
    from adversa.curate.realism import NEIGHBOUR, Manifold

    rows = read_features(features, ["train"])
    groups = rows["group"].to_pylist()
    if len(set(groups)) <= NEIGHBOUR:
        raise UserError(
            f"train has {len(set(groups))} lesions, too few to say what is like a real "
            "image; give more, or set "
            "curate.realism_quantile=null"
        )
    return Manifold(matrix(rows[column]), groups)


def read_features(features: Path, roles: Sequence[str]) -> pa.Table:
    return pa.concat_tables(tables.read(features / r, schema=tables.FEATURES) for r in roles)


def real_ids(data: Path, roles: Sequence[str]) -> list[str]:
    return [
        i for r in roles for i in tables.read(data / r, ["id"], tables.EXAMPLES)["id"].to_pylist()
    ]


def real_images(
    data: Path, roles: Sequence[str]
) -> tuple[list[str], list[str], Iterator[np.ndarray]]:
    """(ids, groups, blocks of uint8 images [n, H, W, 3] in their order) of some roles; one block is
    in memory at a time.
    """
    paths = [path for role in roles for path in tables.parts(data / role)]
    rows = pa.concat_tables(tables.read_part(path, ["id", "group"]) for path in paths)
    blocks = (
        tables.decode_images(batch.column("image"))
        for path in paths
        for batch in tables.batches(path, ["image"])
    )
    return rows["id"].to_pylist(), rows["group"].to_pylist(), blocks


# ---- each painted image by itself ----------------------------------------------------------------


def limits_of(folder: Path, config: cfg.Curate) -> Any:
    """curate.gate.Limits of a run's measurements and settings."""
    from adversa.curate.gate import Limits

    found = files.read_json(folder / LIMITS)
    assert found is not None, f"{folder} is not finished"
    off = config.realism_quantile is None
    spaces = {k: None if off else tuple(found[k]) for k in ("realism", "realism_2")}
    return Limits(
        near_copy=found["near_copy"],
        near_copy_features=found["near_copy_features"],
        least_agreement=config.min_agreement if config.folds else None,
        most_agreement=found["most_agreement"] if config.trivial_quantile is not None else 1.0,
        contrast=config.min_contrast,
        clipped=config.max_clipped,
        twin=found["near_copy"] if config.twins else None,
        quota=config.quota,
        **spaces,
    )


def inspect(
    engine: Engine,
    requests: Path,
    synthetic: Path,
    data: Path,
    features: Path,
    limits: Path,
    classifier: Path,
    judge: Path,
    config: cfg.Curate,
    out: Path,
) -> None:
    """The first pass of the gate over every painted image: tables.VERDICTS, none kept yet."""
    judges = {f"judge-{k}": f for k, f in enumerate(folders(judge, config.folds))}
    names = inputs(
        synthetic=synthetic,
        requests=requests,
        data=data,
        limits=limits,
        classifier=classifier,
        **judges,
    )
    names |= {f"features-{r}": step_folder.fingerprint(features / r) for r in ROLES}
    recipe = Recipe(
        "inspect", 2, config.model_dump(mode="json", exclude={"judge", "quota", "twins"}), names
    )

    def body(progress: Progress) -> Facts:
        paths = tables.parts(synthetic)
        counts = tables.each(tables.count, paths)
        parts = [
            Part(i, n, {"path": str(p), "requests": str(requests / p.name)})
            for i, (p, n) in enumerate(zip(paths, counts, strict=True))
        ]
        make = partial(make_inspected, data, features, limits, classifier, judge, config)
        started = time.perf_counter()
        done = engine.map_batches(make, parts, out, progress, model=True)
        return cost(done, engine.tasks(model=True), time.perf_counter() - started) | {
            "rows": sum(p.rows for p in parts)
        }

    run_step(out, recipe, body, engine.handle)


def make_inspected(
    data: Path, features: Path, limits: Path, classifier: Path, judge: Path, config: cfg.Curate
) -> Work:
    from adversa.classify.score import make_scorer
    from adversa.curate import gate
    from adversa.curate.near_copy import NearCopy, NearFeatures

    allowed = limits_of(limits, config)
    scorer, judges = (
        make_scorer(classifier, embed=True),
        Judges(judge, config.folds, data) if config.folds else None,
    )
    ids, _, images = real_images(data, ROLES)
    copies = NearCopy(ids, images, like=scale_of(limits))
    everyone = read_features(features, ROLES)
    assert sorted(everyone["id"].to_pylist()) == sorted(ids), (
        f"{features} is not of the images of {data}"
    )
    in_features = NearFeatures(everyone["id"].to_pylist(), matrix(everyone["classifier"]))
    known = read_features(features, ["train"])
    in_train = NearFeatures(known["id"].to_pylist(), matrix(known["classifier"]))
    spaces = [manifold(features, c) for c in ("classifier", "judge")] if allowed.realism else None

    def work(part: Part, path: Path) -> int:
        rows = tables.read_part(storage_path(part.payload["path"]))
        asked = tables.read_part(
            storage_path(part.payload["requests"]), ["request_id", "strategy", "example"]
        ).to_pylist()
        request = {r["request_id"]: r for r in asked}
        names, labels = rows["request_id"].to_pylist(), rows["label"].to_pylist()
        pictures = tables.decode_images(rows["image"])
        similarity, nearest = copies.nearest(pictures)
        first = scorer(pictures)[1]
        probs, second = (
            judges(pictures, labels, in_train.nearest(first)[1]) if judges else (None, None)
        )
        similarity_2, nearest_2 = in_features.nearest(first)
        ratios = (
            [space.ratio(x) for space, x in zip(spaces, (first, second), strict=True)]
            if spaces
            else [None, None]
        )
        painted = gate.Painted(
            request_ids=names,
            arms=rows["arm"].to_pylist(),
            labels=labels,
            strategies=[request[i]["strategy"] for i in names],
            sources=[request[i]["example"] for i in names],
            finite=rows["finite"].to_pylist(),
            faults=rows["fault"].to_pylist(),
            images=pictures,
            probs=probs,
            ratio=ratios[0],
            ratio_2=ratios[1],
            similarity=similarity,
            nearest=nearest,
            similarity_2=similarity_2,
            nearest_2=nearest_2,
        )
        tables.write_part(path, tables.to_table(gate.inspect(painted, allowed), tables.VERDICTS))
        return len(rows)

    return work


def scale_of(limits: Path) -> Any:
    """curate.near_copy.Scale that a run's similarities are measured by."""
    from adversa.curate.near_copy import Scale

    with np.load(io.BytesIO((limits / SCALE).read_bytes()), allow_pickle=False) as saved:
        return Scale(saved["signal"], saved["noise"])


# ---- twins, and the verdicts ---------------------------------------------------------------------


def twins(engine: Engine, synthetic: Path, inspected: Path, limits: Path, out: Path) -> None:
    """Pairs of near copies among the images of an arm that passed the first pass: tables.TWINS."""
    recipe = Recipe("twins", 1, {}, inputs(inspected=inspected, synthetic=synthetic, limits=limits))

    def body(progress: Progress) -> Facts:
        found = waiting(inspected)
        chunks = [
            (arm, i, min(i + QUERIES, len(ids)))
            for arm, ids in found.items()
            for i in range(0, len(ids), QUERIES)
        ]
        parts = [
            Part(k, stop - start, {"arm": arm, "start": start, "stop": stop})
            for k, (arm, start, stop) in enumerate(chunks)
        ]
        started = time.perf_counter()
        done = engine.map_batches(
            partial(make_twins, synthetic, inspected, limits), parts, out, progress
        )
        return cost(done, engine.tasks(), time.perf_counter() - started) | {
            "rows": sum(len(ids) for ids in found.values())
        }

    run_step(out, recipe, body, engine.handle)


def waiting(inspected: Path) -> dict[str, list[str]]:
    """arm -> request ids, sorted, of what passed the first pass."""
    from adversa.curate.gate import PENDING

    rows = tables.read(inspected, ["request_id", "arm", "reason"], tables.VERDICTS)
    rows = rows.filter(pc.equal(rows["reason"], PENDING))
    arms = rows["arm"].to_pylist()
    ids = rows["request_id"].to_pylist()
    return {
        arm: sorted(i for i, a in zip(ids, arms, strict=True) if a == arm)
        for arm in sorted(set(arms))
    }


def make_twins(synthetic: Path, inspected: Path, limits: Path) -> Work:
    from adversa.curate.near_copy import NearCopy

    measured = files.read_json(limits / LIMITS)
    assert measured is not None, f"{limits} is not finished"
    ids, scale = waiting(inspected), scale_of(limits)
    indices: dict[str, NearCopy] = {}

    def work(part: Part, path: Path) -> int:
        arm = part.payload["arm"]
        if arm not in indices:
            indices[arm] = NearCopy(*pictures_of(synthetic, ids[arm]), like=scale)
        pairs = indices[arm].pairs(
            measured["near_copy"], slice(part.payload["start"], part.payload["stop"])
        )
        rows = [{"a": i} for i in indices[arm].ids[part.payload["start"] : part.payload["stop"]]]
        rows += [{"a": a, "b": b, "similarity": s} for a, b, s in pairs]
        tables.write_part(path, pa.Table.from_pylist(rows, schema=tables.TWINS))
        return part.rows

    return work


def pictures_of(synthetic: Path, ids: Sequence[str]) -> tuple[list[str], Iterator[np.ndarray]]:
    """(ids, blocks of uint8 images [n, H, W, 3], one read at a time) of some painted images, in the
    order in which they lie.
    """
    wanted, paths = (
        frozenset(ids),
        tables.parts(synthetic),
    )  # pyarrow's is_in would hash all of them anew for each part
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


def settle(
    inspected: Path,
    twins: Path,
    limits: Path,
    config: cfg.Curate,
    out: Path,
    handle: RunHandle = NULL_HANDLE,
) -> None:
    """The second pass: tables.VERDICTS, in the order of the first, and memorisation.json."""
    from adversa.curate import gate

    names = inputs(inspected=inspected, limits=limits) | (
        inputs(twins=twins) if config.twins else {}
    )
    recipe = Recipe("settle", 1, {"twins": config.twins, "quota": config.quota}, names)

    def body(progress: Progress) -> Facts:
        found = [
            Verdict(**row)
            for p in tables.parts(inspected)
            for row in tables.read_part(p, [*TOLD, *SETTLED]).to_pylist()
        ]
        rows = (
            tables.read(twins, schema=tables.TWINS) if config.twins else tables.TWINS.empty_table()
        )
        alone, paired = rows.filter(pc.field("b").is_null()), rows.filter(pc.field("b").is_valid())
        pairs = zip(*(paired[name].to_pylist() for name in ("a", "b", "similarity")), strict=True)
        settled = gate.settle(found, alone["a"].to_pylist(), pairs, limits_of(limits, config))
        _write_verdicts(inspected, settled, out)
        files.write_json(
            out / MEMORISATION,
            memorised(settled, (files.read_json(limits / LIMITS) or {})["held_out"]),
        )
        return {"rows": len(settled), "kept": sum(v.keep for v in settled)}

    run_step(out, recipe, body, handle)


def _write_verdicts(inspected: Path, settled: Sequence[Verdict], out: Path) -> None:
    """The verdicts of the first pass with what was settled put in, VERDICT_ROWS or a few more a
    part.
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
        new = {name: [getattr(v, name) for v in settled[at : at + count]] for name in SETTLED}
        columns = [new.get(name, rows[name]) for name in tables.VERDICTS.names]
        tables.write_part(out / tables.part_name(index), pa.table(columns, schema=tables.VERDICTS))
        held, at, index = [], at + count, index + 1


def memorised(found: Sequence[Verdict], held_out: Sequence[float]) -> dict[str, Any]:
    """arm -> curate.memorisation.Memorisation as plain values, of all images painted, kept or not;
    None where there are none.
    """
    from adversa.curate.memorisation import memorisation

    told = {}
    for arm in sorted({v.arm for v in found}):
        m = memorisation(
            np.array([v.similarity for v in found if v.arm == arm]), np.array(held_out)
        )
        told[arm] = None if m is None else asdict(m)
    return told
