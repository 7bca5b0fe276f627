"""What a cell of a sweep is made of, as steps: its real images, its hard cases, its denoiser, its
pools of generated images.

A cell is a run in small: the same steps on fewer images, so nothing it makes has seen a real image
outside of it (but for `sees` all, which says so in its name). Each function is one trial's work,
with the engine of its actor.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from adversa import config as cfg
from adversa.engine.interface import Engine, Tell
from adversa.engine.step import Facts, inputs, run_step
from adversa.pipeline import curate, evaluate, finalize, latents, mine, planning, train, verifier
from adversa.pipeline import generate as pipeline_generate
from adversa.run import step_folder
from adversa.run.control import NULL_HANDLE, RunHandle
from adversa.run.folder import RunDir, classes_of
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files, tables
from adversa.storage.path import StoragePath
from adversa.sweep import grid
from adversa.sweep.grid import DataRegime, Variant
from adversa.types import ROLES, GenerationRequest, digest, seed_of

ROUND = 1  # of a cell there is one
PLAIN = cfg.Mix(arms=["real", "unguided", "guided"])  # nothing of it hangs on the run's own section


# ---- its real images -----------------------------------------------------------------------------


def subset(
    data: StoragePath,
    cell: DataRegime,
    seed: int,
    out: StoragePath,
    handle: RunHandle = NULL_HANDLE,
) -> None:
    """A data folder with `cell.count` images a class of train and at most as many of mine (all of
    them where None); select and test are those of `data`, by links where the file system has them.
    A class with fewer gives what it has.

    Nested: a smaller count of the same seed is part of a larger one.
    """

    def body(progress: Progress) -> Facts:
        kept: dict[str, list[Any]] = {}
        for role in ("train", "mine"):
            rows = tables.read(data / role, ["id", "label", "group"], tables.EXAMPLES).to_pylist()
            kept[role] = nested(rows, cell.count, seed)
            _only(data / role, {r["id"] for r in kept[role]}, out / role)
        for role in ("select", "test"):
            _same(data / role, out / role)
        classes = classes_of(data)
        split = files.read_json(data / "split.json") or {}
        images = {
            r: {c: sum(x["label"] == k for x in kept[r]) for k, c in enumerate(classes)}
            for r in kept
        }
        files.write_json(out / "classes.json", {"classes": classes})
        files.write_json(
            out / "split.json",
            split | {"images": split["images"] | images, "groups": split["groups"] | _groups(kept)},
        )
        lesions = [
            len({x["group"] for x in kept["train"] if x["label"] == k}) for k in range(len(classes))
        ]
        real = [images["train"][c] for c in classes]
        return {
            "rows": sum(map(len, kept.values())),
            "real": real,
            "lesions": lesions,
            "mine": list(images["mine"].values()),
        }

    recipe = Recipe("subset", 1, {"count": cell.count, "seed": seed}, inputs(data=data))
    run_step(out, recipe, body, handle)


def nested(rows: Sequence[dict[str, Any]], count: int | None, seed: int) -> list[dict[str, Any]]:
    """The first `count` rows of each label in an order that hangs on the seed and the names alone:
    one image of each lesion, then each one's second image, and so on; lesions by hash.
    """
    turns: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for r in rows:
        turns[r["label"], r["group"]].append(r)
    placed = []
    for (label, group), found in turns.items():
        at = digest("cell", seed, group, size=8)
        ordered = sorted(found, key=lambda r: digest("cell", seed, r["id"], size=8))
        placed += [(label, turn, at, group, r) for turn, r in enumerate(ordered)]
    taken: Counter[int] = Counter()
    kept = []
    for label, *_, row in sorted(placed, key=lambda p: p[:4]):
        taken[label] += 1
        if count is None or taken[label] <= count:
            kept.append(row)
    return kept


def _groups(kept: dict[str, list[Any]]) -> dict[str, int]:
    return {role: len({r["group"] for r in rows}) for role, rows in kept.items()}


def _only(role: StoragePath, ids: set[str], out: StoragePath) -> None:
    """The examples of these ids, as few parts as their number allows."""
    wanted = pa.array(sorted(ids))
    rows = pa.concat_tables(
        tables.read_part(p, None, pa.compute.field("id").isin(wanted)) for p in tables.parts(role)
    )
    assert len(rows) == len(ids), (len(rows), len(ids))
    for i in range(0, len(rows), tables.ROW_GROUP * 2):
        tables.write_part(
            out / tables.part_name(i // (tables.ROW_GROUP * 2)), rows.slice(i, tables.ROW_GROUP * 2)
        )


def _same(role: StoragePath, out: StoragePath) -> None:
    """The parts of a role under another name: a second name of the same file, or a copy where there
    can be none.
    """
    out.mkdir(parents=True, exist_ok=True)
    for part in tables.parts(role):
        named = out / part.name
        if isinstance(part, Path) and isinstance(named, Path) and not named.exists():
            try:
                os.link(part, named)
            except OSError:
                files.replace_bytes(named, part.read_bytes())
        elif not isinstance(part, Path):
            files.replace_bytes(out / part.name, part.read_bytes())


def first_mix(d: RunDir, handle: RunHandle = NULL_HANDLE) -> None:
    """What the classifier that finds the hard cases and the denoiser are trained on: the cell's
    images of train.
    """
    train.mix(d.data, [], [], "real", PLAIN, 1, d.arm(0, "real") / "mix", handle=handle)


# ---- what is trained on them ---------------------------------------------------------------------


def config_of(config: cfg.Config, d: RunDir) -> cfg.Config:
    """The settings of a cell: the run's, with every class mined alike, the hardest first, and the
    filter its lesions allow.
    """
    lesions = step_folder.manifest(d.data)["lesions"]
    mine = config.mine.model_copy(
        update={"near_margin": 1.0, "ratio_cap": 1.0, "scorer": _scorer(config.mine.scorer)}
    )
    return config.model_copy(
        update={
            "mine": mine,
            "curate": grid.filter_of(config.curate, lesions),
            "mix": PLAIN,
            "rounds": 1,
        }
    )


def _scorer(name: str) -> str:
    """Of one classifier and one round there is no disagreement of seeds and nothing to forget."""
    return "loss" if name in ("bald", "forgetting") else name


def find_hard_cases(
    config: cfg.Config, d: RunDir, engine: Engine, tell: Tell | None = None
) -> None:
    """The classifier that finds the hard cases and those; where anything is generated the
    verifiers, too, and what the filter measures.
    """
    c = config_of(config, d)
    classifier = target_classifier(d)
    job = train.classifier_job(
        d.data,
        d.arm(0, "real") / "mix",
        [],
        c.classifier,
        seed_of("classifier", c.seed, 0),
        c.data.resolution,
        classifier,
    )
    engine.fit(
        [
            job,
            *(verifier.jobs(d.data, c, d.judge, engine.handle) if grid.generates(c.sweep) else []),
        ]
    )
    evaluate.score(
        engine, [("real", 0, classifier)], d.data / "mine", d.data, True, d.round(ROUND, "scores")
    )
    mine.mine(
        d.round(ROUND, "scores"), d.data, c.mine, d.round(ROUND, "hard"), handle=engine.handle
    )
    if not grid.generates(c.sweep):
        return
    verifiers = verifier.folders(d.judge, c.curate.folds)
    for role in ROLES:
        curate.features(engine, d.data, role, classifier, verifiers, d.features / role)
    curate.measure_thresholds(d.data, d.features, c.curate, d.limits, engine.handle)


def hard_cases_of(config: cfg.Config, d: RunDir) -> StoragePath:
    """The step folder that `find_hard_cases` finishes last."""
    return d.limits if grid.generates(config.sweep) else d.round(ROUND, "hard")


def target_classifier(d: RunDir) -> StoragePath:
    return d.arm(0, "real", 0) / "classifier"


def denoise(config: cfg.Config, d: RunDir, engine: Engine, tell: Tell | None = None) -> None:
    """The cell's denoiser, and its codec where latents are diffused: fitted on what `first_mix`
    holds, and nothing else.
    """
    c, codec, mix = config, None, d.arm(0, "real") / "mix"
    if c.codec.kind != "pixels":
        _encode(c, d, engine)
        codec = d.codec, d.latents("train").parent
    if c.denoiser.external:
        latents.external_denoiser(c, d.data, classes_of(d.data), d.codec, d.denoiser, engine.handle)
        return
    engine.fit(
        [
            train.denoiser_job(
                d.data, mix, c.denoiser, c.seed, latents.space(c, d.codec)[1], d.denoiser, codec
            )
        ]
    )


def _encode(c: cfg.Config, d: RunDir, engine: Engine) -> None:
    if c.codec.is_fitted:
        mix = d.arm(0, "real") / "mix"
        engine.fit(
            [
                latents.codec_job(
                    d.data, mix, c.codec, c.denoiser.balance, c.seed, c.data.resolution, d.codec
                )
            ]
        )
    else:
        latents.fetch(d.data, c.codec, c.data.resolution, d.codec, engine.handle)
    if c.denoiser.external is None:
        views = c.codec.views if c.denoiser.flips else 1
        latents.encode(engine, d.data / "train", d.data, d.codec, views, d.latents("train"))
        latents.encode(
            engine, d.data / "select", d.data, d.codec, 1, d.latents("select"), d.latents("train")
        )


# ---- its pools -----------------------------------------------------------------------------------


def generate_pool(
    config: cfg.Config,
    d: RunDir,
    denoiser: StoragePath,
    variant: Variant,
    run: str,
    ratio: float,
    out: StoragePath,
    engine: Engine,
    tell: Tell | None = None,
) -> None:
    """All generated images of a cell and an arm, enough for `ratio`, with their verdicts. run: what
    request ids are made of.
    """
    c = config_of(config, d)
    generate = c.generate.model_copy(
        update={"strategy": variant.strategy} if variant.strategy else {}
    )
    requests, synthetic, inspected, twins = (
        out / x for x in ("requests", "synthetic", "inspected", "twins")
    )
    requested = grid.wanted(step_folder.manifest(d.data)["real"], ratio, config.sweep.overdraw)
    plan(d, variant, run, requested, generate, requests, engine.handle)
    pipeline_generate.generate(
        engine, requests, d.data, denoiser, target_classifier(d), generate, synthetic
    )
    curate.inspect(
        engine,
        requests,
        synthetic,
        d.data,
        d.features,
        d.limits,
        target_classifier(d),
        d.judge,
        c.curate,
        inspected,
    )
    if c.curate.twins:
        finalize.near_duplicates(engine, synthetic, inspected, d.limits, twins)
    finalize.finalize(inspected, twins, d.limits, c.curate, verdicts_of(out), engine.handle)


def verdicts_of(pool: StoragePath) -> StoragePath:
    return pool / "verdicts"


def plan(
    d: RunDir,
    variant: Variant,
    run: str,
    requested: Sequence[int],
    config: cfg.Generate,
    out: StoragePath,
    handle: RunHandle,
) -> None:
    """Requests for so many images of each class, shared evenly among its hard cases; of a class
    without any there are none.

    The unguided arm asks for as many of a class, and takes nothing of the cases but their label.
    """
    hard, classifier = d.round(ROUND, "hard"), target_classifier(d)
    settings = config.model_dump(mode="json", exclude={"per_case"}) | {
        "run": run,
        "arm": variant.arm,
        "asked": list(requested),
    }

    def body(progress: Progress) -> Facts:
        cases = tables.read(hard, schema=tables.HARD_CASES).sort_by("rank").to_pylist()
        by = step_folder.fingerprint(classifier)
        found = replicates(cases, requested, variant, run, config, by)
        rows = tables.write_parts(out, found, config.part_size, tables.REQUESTS)
        if not rows:
            tables.write_part(out / tables.part_name(0), tables.REQUESTS.empty_table())
        return {"rows": rows}

    recipe = Recipe("pool", 1, settings, inputs(hard=hard, classifier=classifier))
    run_step(out, recipe, body, handle)


def replicates(
    cases: Sequence[dict[str, Any]],
    requested: Sequence[int],
    variant: Variant,
    run: str,
    config: cfg.Generate,
    classifier: str,
) -> Iterator[GenerationRequest]:
    """requested[c] requests for class c: the first of every hard case, then the second of every
    one, and so on.
    """
    found = (
        planning.partners(cases)
        if variant.arm == "guided" and config.strategy == "interpolate"
        else {}
    )
    left = {
        c: n for c, n in enumerate(requested) if n > 0 and any(case["label"] == c for case in cases)
    }
    turn = 0
    while left:
        for case in cases:
            if case["label"] not in left:
                continue
            asks = planning.request(
                run, ROUND, variant.arm, case, turn, config, None, found.get(case["example"])
            )
            yield replace(asks, classifier=classifier)
            left[case["label"]] -= 1
            if not left[case["label"]]:
                del left[case["label"]]
        turn += 1
