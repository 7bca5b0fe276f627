"""Generation: at which noise level, and the pool of workers that does it."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adversa import config as cfg
from adversa.common.statistics import softmax
from adversa.engine.interface import Engine
from adversa.engine.step import Facts, cost, inputs, run_step
from adversa.engine.tasks import Part, TaskStats, Work
from adversa.pipeline.pictures import Pictures, sources
from adversa.pipeline.planning import Row, cases_of
from adversa.run import step_folder
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files, tables
from adversa.storage.arrays import RoleArray
from adversa.storage.path import StoragePath, storage_path
from adversa.storage.weights import CONFIG
from adversa.types import (
    FILLING,
    GenerationRequest,
    UserError,
    digest,
    seed_of,
)

# ---- adaptive noise ------------------------------------------------------------------------------


def levels(
    engine: Engine,
    hard: StoragePath,
    data: StoragePath,
    denoiser: StoragePath,
    verifiers: Sequence[StoragePath],
    config: cfg.Generate,
    run: str,
    out: StoragePath,
    without: Collection[int] = (),
) -> None:
    """For each hard case the largest of config.levels at which the verifiers, averaged, still see
    the label in what is generated from it (tables.LEVELS); the least where it sees it at none.
    without: as of `plan`.
    """
    section = config.model_dump(
        mode="json", exclude={"per_case", "classifier_guidance", "reference_guidance"}
    ) | {"run": run}
    section |= {"without": sorted(without)} if without else {}
    names = inputs(
        hard=hard,
        denoiser=denoiser,
        data=data,
        **{f"judge-{k}": f for k, f in enumerate(verifiers)},
    )
    if config.weak:
        names |= {"weak": fingerprint(storage_path(config.weak))}
    recipe = Recipe("levels", 2, section, names)

    def body(progress: Progress) -> Facts:
        cases = cases_of(hard, without)
        chunks = [cases[i : i + config.part_size] for i in range(0, len(cases), config.part_size)]
        parts = [
            Part(i, len(c), {"cases": [(r["example"], r["label"]) for r in c], "run": run})
            for i, c in enumerate(chunks)
        ]
        started = time.perf_counter()
        done = engine.map_parts(
            partial(make_levels, denoiser, data / "mine", tuple(verifiers), config),
            parts,
            out,
            progress,
        )
        return cost(done, engine.samplers(), time.perf_counter() - started) | {"rows": len(cases)}

    run_step(out, recipe, body, engine.handle)


def make_levels(
    denoiser: StoragePath,
    examples: StoragePath,
    verifiers: Sequence[StoragePath],
    config: cfg.Generate,
) -> Work:
    from adversa.classify.score import make_scorer
    from adversa.diffuse import generator
    from adversa.diffuse.strategy import Sources

    loaded, pictures = generator.load(denoiser, device_name()), Pictures(examples)
    scorers = [make_scorer(verifier) for verifier in verifiers]
    guide = steering(loaded, None, config)

    def work(part: Part, path: StoragePath) -> int:
        """A case in part.skip has no row: it starts at config.sigma_start."""
        cases = [
            (str(e), int(label))
            for i, (e, label) in enumerate(part.payload["cases"])
            if i not in part.skip
        ]
        sources = Sources(pictures.images([e for e, _ in cases]))
        tried = sorted(config.levels)
        asked = [
            probe(part.payload["run"], e, label, level, config)
            for e, label in cases
            for level in tried
        ]
        generated = loaded.generate(asked, sources, config, guide)
        if not generated:
            tables.write_part(path, tables.LEVELS.empty_table())
            return 0
        images = np.stack([p.image for p in generated])
        p = np.mean([softmax(score(images)[0]) for score in scorers], axis=0)
        agreement = p[np.arange(len(p)), [r.label for r in asked]] * [x.finite for x in generated]
        rows = []
        for (example, _), seen in zip(
            cases, agreement.reshape(len(cases), len(tried)), strict=True
        ):
            at = largest(seen, config.adaptive_agreement)
            rows.append(
                {"example": example, "sigma_start": tried[at], "agreement": float(seen[at])}
            )
        tables.write_part(path, pa.Table.from_pylist(rows, schema=tables.LEVELS))
        return len(rows)

    return work


def probe(
    run: str, example: str, label: int, level: float, config: cfg.Generate
) -> GenerationRequest:
    key = digest("level", run, example, level, size=10)
    return GenerationRequest(
        key, 0, "levels", "img2img", label, example, level, config.guidance, seed_of(key)
    )


def largest(agreement: np.ndarray, least: float) -> int:
    """Of noise levels in rising order the index of the largest with at least this agreement; 0
    where none has it.
    """
    seen = np.flatnonzero(agreement >= least)
    return int(seen[-1]) if len(seen) else 0


# ---- generation ----------------------------------------------------------------------------------


def generate(
    engine: Engine,
    requests: StoragePath,
    data: StoragePath | None,
    denoiser: StoragePath,
    target: StoragePath | None,
    config: cfg.Generate,
    out: StoragePath,
    option: str = "--run-dir",
) -> None:
    """Generate every request; part i of the requests becomes part i of the images. option: what the
    user gave `out` by.

    data: where the examples of requests are, in the role mine; None where they have none. target:
    the classifier whose weaknesses steer (config.classifier_guidance, and reference guidance in
    features); None where nothing does.
    """
    steers = target is not None and steering_needs_classifier(config)
    names = (
        inputs(requests=requests)
        | {"denoiser": fingerprint(denoiser)}
        | (inputs(data=data) if data else {})
    )
    names |= inputs(target=target) if target and steers else {}
    if config.weak:
        names |= {"weak": fingerprint(storage_path(config.weak))}
    recipe = Recipe("generate", 2, config.model_dump(mode="json"), names)

    def body(progress: Progress) -> Facts:
        if data is not None:
            check_denoiser(denoiser, data)
            check_masks(requests, data)
        paths = tables.parts(requests)
        counts = tables.each(tables.count, paths)
        parts = [
            Part(i, n, {"path": str(p)}) for i, (p, n) in enumerate(zip(paths, counts, strict=True))
        ]
        started = time.perf_counter()
        make = partial(
            make_work,
            denoiser,
            data / "mine" if data else None,
            target if steers else None,
            config,
        )
        done = engine.map_parts(make, parts, out, progress, request_name)
        spent = cost(done, engine.samplers(), time.perf_counter() - started)
        failed = [asdict(f) for share in done for f in share.failed]
        return (
            spent
            | ({"failed": failed} if failed else {})
            | {"rows": sum(p.rows for p in parts)}
            | _totals(out)
        )

    run_step(out, recipe, body, engine.handle, option)


def _totals(out: StoragePath) -> Facts:
    rows = tables.read(out, ["evaluations", "skipped", "finite", "fault"], tables.SYNTHETIC)
    return {
        "evaluations": pc.sum(rows["evaluations"]).as_py() or 0,
        "gradients_skipped": pc.sum(rows["skipped"]).as_py() or 0,
        "not_finite": len(rows) - (pc.sum(rows["finite"]).as_py() or 0),
        "faults": len(rows) - rows["fault"].null_count,
    }


def fingerprint(denoiser: StoragePath) -> str:
    """Of a denoiser's folder, whether a run trained it or it came alone."""
    from adversa.diffuse import generator

    return (
        step_folder.fingerprint(denoiser)
        if step_folder.is_finished(denoiser)
        else generator.fingerprint(denoiser)
    )


def check_denoiser(denoiser: StoragePath, data: StoragePath) -> None:
    """UserError where a denoiser's classes or size are not those of the run's pictures."""
    meta = files.read_json(denoiser / CONFIG) or {}
    theirs, ours = (
        meta.get("classes"),
        (files.read_json(data / "classes.json") or {}).get("classes"),
    )
    fix = "give the denoiser that was trained on these pictures"
    if theirs != ours:
        raise UserError(f"{denoiser} has the classes {theirs}, the run's pictures {ours}; {fix}")
    codec = files.read_json(denoiser.parent / "codec" / CONFIG) or {} if meta.get("codec") else {}
    side = meta["resolution"] * codec.get("factor", 1)
    pictures = RoleArray(data / "mine", build=False)
    if len(pictures.ids) and (picture := pictures.take(np.arange(1)).shape[1]) != side:
        raise UserError(
            f"{denoiser} generates {side} x {side} pixels, the run's pictures have {picture} "
            f"x {picture}; {fix}"
        )


def check_masks(requests: StoragePath, data: StoragePath) -> None:
    """UserError where a picture that is to be filled in has a mask of its own that cannot be
    used.
    """
    asked = tables.read(requests, ["example", "strategy"], tables.REQUESTS)
    wanted = asked.filter(pc.is_in(asked["strategy"], pa.array(FILLING)))["example"].unique()
    if len(wanted):
        Pictures(data / "mine").check_masks(wanted.to_pylist())


def steering_needs_classifier(config: cfg.Generate) -> bool:
    return config.classifier_guidance > 0 or (
        config.reference_guidance > 0 and config.reference_guidance_space == "features"
    )


def make_work(
    denoiser: StoragePath,
    examples: StoragePath | None,
    target: StoragePath | None,
    config: cfg.Generate,
) -> Work:
    from adversa.diffuse import generator

    loaded = generator.load(denoiser, device_name())
    pipeline = loaded.pipeline(config, steering(loaded, target, config))
    pictures = Pictures(examples)

    def work(part: Part, path: StoragePath) -> TaskStats:
        requests = read_requests(storage_path(part.payload["path"]))
        given = sources([r for i, r in enumerate(requests) if i not in part.skip], pictures, config)
        faults = dict(part.skip)  # a reason may be empty: of rows that a trial leaves out
        faults |= {
            i: why
            for i, r in enumerate(requests)
            if i not in faults and (why := cannot_generate(r, given)) is not None
        }
        wanted = [r for i, r in enumerate(requests) if i not in faults]
        loaded.check(wanted, config)
        generated = {p.request.request_id: p for p in pipeline.stream(wanted, given)}
        if len(generated) > 1 and not any(p.finite for p in generated.values()):
            raise UserError(
                f"none of the {len(generated)} images of a part is finite: the denoiser "
                f"{denoiser} answers with NaN or infinity; "
                "train it anew with a lower denoiser.lr, or try generate.amp=false"
            )
        rows = [
            _row(r, generated.get(r.request_id), faults.get(i), loaded)
            for i, r in enumerate(requests)
        ]
        tables.write_part(path, pa.Table.from_pylist(rows, schema=tables.SYNTHETIC))
        return TaskStats(len(rows), sum(p.evaluations for p in generated.values()))

    return work


def cannot_generate(request: GenerationRequest, given: Any) -> str | None:
    """Why there is nothing to generate: around a lesion that fills the picture."""
    if request.strategy not in ("outpaint", "inout") or request.example not in given.outside:
        return None
    return (
        None
        if given.outside[request.example].any()
        else "the lesion fills the picture: there is no skin to generate"
    )


def read_requests(path: StoragePath) -> list[GenerationRequest]:
    return [GenerationRequest(**r) for r in tables.read_part(path).to_pylist()]


def request_name(part: Part, row: int) -> str:
    """Of a request that could not be generated, for messages."""
    return f"request {read_requests(storage_path(part.payload['path']))[row].request_id}"


def _row(request: GenerationRequest, generated: Any, fault: str | None, loaded: Any) -> Row:
    """Of tables.SYNTHETIC; black and not finite where it was not generated."""
    side = loaded.side
    image = generated.image if generated is not None else np.zeros((side, side, 3), np.uint8)
    return {
        "request_id": request.request_id,
        "arm": request.arm,
        "label": request.label,
        "image": tables.encode_png(image),
        "finite": generated is not None and generated.finite,
        "denoiser": loaded.fingerprint,
        "evaluations": generated.evaluations if generated is not None else 0,
        "skipped": generated.skipped if generated is not None else 0,
        "fault": fault,
    }


def device_name() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def steering(loaded: Any, target: StoragePath | None, config: cfg.Generate) -> Any:
    """What steers these requests, in float32: the target classifier, the weak denoiser."""
    from adversa.classify.model import load
    from adversa.diffuse.guidance import classifier_gradient
    from adversa.diffuse.pipeline import Steering

    weak = _weak(loaded, config.weak) if config.weak else None
    if target is None:
        return Steering(weak=weak)
    network = load(target, loaded.device)[0].requires_grad_(False)
    if (classes := network.head.out_features) != len(loaded.meta["classes"]):
        raise UserError(
            f"{target} knows {classes} classes, the denoiser "
            f"{len(loaded.meta['classes'])}; give one of the same classes"
        )
    gradient = (
        classifier_gradient(
            lambda p: network(p)[0], loaded.pixels, config.classifier_guidance_objective
        )
        if config.classifier_guidance
        else None
    )
    features = (
        (lambda p: network(p)[1])
        if config.reference_guidance and config.reference_guidance_space == "features"
        else None
    )
    return Steering(gradient, features, loaded.pixels, weak)


def _weak(loaded: Any, name: str) -> Any:
    """The denoiser of autoguidance. UserError where it is not one of the same classes and space."""
    from adversa.diffuse import generator

    denoiser, meta, _ = generator.read(storage_path(name), loaded.device)
    for key, default in (("classes", None), ("resolution", None), ("channels", 3), ("codec", None)):
        theirs, ours = meta.get(key, default), loaded.meta.get(key, default)
        if theirs != ours:
            raise UserError(
                f"generate.weak {name} has {key} {theirs}, the run's denoiser {ours}; give "
                "one of the same run"
            )
    return denoiser
