"""How good the denoiser's samples are: draw some, compute features of them and of real images,
compare the two sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from adversa import config as cfg
from adversa.data.loader import ImageTable
from adversa.engine.interface import Engine
from adversa.engine.step import Facts, inputs, mapped, run_step
from adversa.engine.tasks import Part, Work
from adversa.pipeline import arms, generate, train
from adversa.pipeline.folders import QualityFolders, needs_classifier, quality_folders
from adversa.run import step_folder, tracking
from adversa.run.control import NULL_HANDLE, RunHandle
from adversa.run.folder import RunDir, classes_of, split_hash
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files, predictions, tables
from adversa.storage.path import StoragePath, storage_path
from adversa.types import GenerationRequest, UserError, digest, seed_of

if TYPE_CHECKING:
    from adversa.classify.features import FeatureSpace

# What the denoiser was never fitted on, and whose pictures may be looked at before the end: `test`
# is opened once, for the arms.
HELD_OUT = ("mine", "select")
FEATURES = pa.schema(
    {
        "id": pa.string(),
        "kind": pa.string(),
        "label": pa.int64(),
        "finite": pa.bool_(),
        "feature": pa.list_(pa.float32()),
    }
)
COLUMNS = 8  # of the grid of samples
RESULT = "quality.json"


def check(config: cfg.Config) -> None:
    """Before anything runs: the named feature space is there, and its network can be built.
    UserError where not.
    """
    from adversa.classify import features

    name, weights = config.quality.features, config.quality.weights
    if name is None:
        return
    if Path(name).is_dir():
        if weights is not None:
            raise UserError(
                f"quality.weights {weights}: the folder quality.features {name} has "
                "weights of its own; leave one out"
            )
        features.network(_named(config.quality), config.data.resolution)
        return
    if weights is None:
        raise UserError(
            f"quality.features {name}: no such folder, and as a timm model it needs "
            "quality.weights (imagenet, or a safetensors "
            "file): features of random weights tell little"
        )
    if weights != "imagenet":
        train.weight_file(weights)
    features.network(_named(config.quality), config.data.resolution)


def evaluate(engine: Engine, config: cfg.Config, run: RunDir) -> None:
    """All the steps, after the denoiser and what the feature space needs."""
    at = quality_folders(config, run)
    plan(run.data, config.quality, config.generate, at.requests, engine.handle)
    generate.generate(
        engine, at.requests, run.data, run.denoiser, None, config.generate, at.samples
    )
    features(engine, run, config, at)
    compare(run, config, at, engine.handle)


def publish(config: cfg.Config, run: RunDir) -> dict[str, Any]:
    """The result of these settings, which is written to the run folder's quality.json as well: the
    last that was asked for.
    """
    result = files.read_json(quality_folders(config, run).result / RESULT)
    assert result is not None, f"the denoiser of {run.root} is not evaluated"
    with files.writing(run.root):
        files.write_json(run.root / RESULT, result)
    return result


def plan(
    data: StoragePath,
    config: cfg.Quality,
    generate: cfg.Generate,
    out: StoragePath,
    handle: RunHandle = NULL_HANDLE,
) -> None:
    """Requests for samples, classes in the proportions of the held-out images, part by part.

    A sample's noise is that of its class and number: denoisers are compared on the same draws, and
    more images continue fewer.
    """
    section = {
        "images": config.images,
        "guidance": config.guidance,
        "part_size": generate.part_size,
    }
    recipe = Recipe("quality-plan", 1, section, inputs(data=data))

    def body(progress: Progress) -> Facts:
        counts = arms.shares(
            held_out(data).tolist(), config.images, [config.images] * len(classes_of(data))
        )
        asked = (
            request(label, i, config.guidance, generate.sigma_max)
            for label, n in enumerate(counts)
            for i in range(n)
        )
        rows = tables.write_parts(out, asked, generate.part_size, tables.REQUESTS)
        return {"rows": rows, "by_class": counts}

    run_step(out, recipe, body, handle)


def held_out(data: StoragePath) -> np.ndarray:
    """Held-out images of each class [K]."""
    labels = np.concatenate(
        [tables.read(data / r, ["label"], tables.EXAMPLES)["label"].to_numpy() for r in HELD_OUT]
    )
    return np.bincount(labels.astype(np.int64), minlength=len(classes_of(data)))


def request(label: int, number: int, guidance: float, sigma_max: float) -> GenerationRequest:
    key = digest("quality", label, number, size=10)
    return GenerationRequest(
        key, 0, "quality", "sample", label, None, sigma_max, guidance, seed_of(key)
    )


def features(engine: Engine, run: RunDir, config: cfg.Config, at: QualityFolders) -> None:
    """Features of every held-out image, of as many images of `train` (the floor), and of the
    samples: one part a part of them.
    """
    found = space(config, run)
    names = inputs(data=run.data, samples=at.samples) | source(found)
    recipe = Recipe("quality-features", 1, {"features": found.name}, names)

    def body(progress: Progress) -> Facts:
        taken = floor(run.data, step_folder.manifest(at.requests)["by_class"])
        kinds = [("real", p) for role in HELD_OUT for p in tables.parts(run.data / role)]
        kinds += [("train", p) for p in tables.parts(run.data / "train")] + [
            ("sample", p) for p in tables.parts(at.samples)
        ]
        parts = []
        for i, (kind, path) in enumerate(kinds):
            ids = sorted(taken.get(path.name, [])) if kind == "train" else None
            rows = tables.count(path) if ids is None else len(ids)
            parts.append(Part(i, rows, {"path": str(path), "kind": kind, "ids": ids}))
        make = partial(make_features, found, config.data.resolution)
        return mapped(engine, make, parts, at.features, progress, model=True)

    run_step(at.features, recipe, body, engine.handle)


def space(config: cfg.Config, run: RunDir) -> FeatureSpace:
    """The feature space that config.quality names.

    By default the pretrained weights the classifier starts from, as they are: features that were
    never fitted on the images they judge. A classifier from scratch has none, so there it is the
    run's own, which has seen `train`: the floor, the distance of `train` from the held-out images,
    holds what that does.
    """
    from adversa.classify.features import FeatureSpace

    q, c = config.quality, config.classifier
    if needs_classifier(config):
        return FeatureSpace("the run's own classifier", folder=run.arm(0, "real", 0) / "classifier")
    if q.features is None:
        return FeatureSpace(f"{c.model}, pretrained", config=c)
    return _named(q)


def _named(q: cfg.Quality) -> FeatureSpace:
    from adversa.classify.features import FeatureSpace, pretrained

    assert q.features is not None
    if Path(q.features).is_dir():
        return FeatureSpace(q.features, folder=Path(q.features).absolute())
    assert q.weights is not None, "`check` comes first"
    return pretrained(q.features, q.weights)


def source(found: FeatureSpace) -> dict[str, str]:
    """What a feature space is made of, as inputs of a recipe."""
    from adversa.storage.weights import read_model

    if found.folder is not None:
        return {"features": read_model(found.folder)[2]}
    assert found.config is not None, found.name
    section = found.config.model_dump_json(include={"model", "model_args", "input_size"})
    return {"features": digest(section, *train._weights(found.config.weights).values())}


def floor(data: StoragePath, counts: Sequence[int]) -> dict[str, list[str]]:
    """Part name -> ids of `train`: of each class as many as samples are drawn of it, or all there
    are, first by id (a hash).
    """
    rows = [(i, label, p.name) for p in tables.parts(data / "train") for i, label in _ids(p)]
    left = list(counts)
    taken: dict[str, list[str]] = {}
    for i, label, name in sorted(rows):
        if left[label] > 0:
            left[label] -= 1
            taken.setdefault(name, []).append(i)
    return taken


def _ids(path: StoragePath) -> list[tuple[str, int]]:
    table = tables.read_part(path, ["id", "label"])
    return list(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))


def make_features(found: FeatureSpace, resolution: int) -> Work:
    from adversa.classify.features import make_features as make

    compute, pictures = make(found, resolution), cache(lambda folder: ImageTable([folder]))

    def work(part: Part, path: StoragePath) -> int:
        kind, ids = part.payload["kind"], part.payload["ids"]
        if ids == []:
            tables.write_part(path, FEATURES.empty_table())
            return 0
        key = "request_id" if kind == "sample" else "id"
        columns = [key, "label"] + (["finite"] if kind == "sample" else [])
        source = storage_path(part.payload["path"])
        rows = tables.read_part(source, columns, None if ids is None else [(key, "in", ids)])
        values = compute(pictures(source.parent).fetch(rows[key].to_pylist()))
        finite = rows["finite"] if kind == "sample" else [True] * len(rows)
        table = {
            "id": rows[key],
            "kind": [kind] * len(rows),
            "label": rows["label"],
            "finite": finite,
            "feature": list(values),
        }
        tables.write_part(path, pa.table(table, schema=FEATURES))
        return len(rows)

    return work


def compare(
    run: RunDir, config: cfg.Config, at: QualityFolders, handle: RunHandle = NULL_HANDLE
) -> None:
    """quality.json and a grid of samples from the features; the same figures for images of `train`
    are what is within reach.
    """
    q = config.quality
    section = q.model_dump(mode="json", include={"neighbours", "subsets", "subset_size"})
    recipe = Recipe("quality", 1, section, inputs(features=at.features, denoiser=run.denoiser))

    def body(progress: Progress) -> Facts:
        rows = tables.read(at.features, schema=FEATURES)
        kinds = np.array(rows["kind"].to_pylist())
        values, labels = predictions.matrix(rows["feature"]), rows["label"].to_numpy()
        sets = {k: (values[kinds == k], labels[kinds == k]) for k in ("real", "train", "sample")}
        figures = _figures(sets, q, classes_of(run.data))
        denoiser = step_folder.manifest(run.denoiser)
        result = figures | {
            "denoiser": denoiser["fingerprint"],
            "denoiser_metrics": denoiser.get("metrics", {}),
            "validation_loss": validation_loss(run.denoiser),
            "split_hash": split_hash(run.data),
            "features": space(config, run).name,
            "width": values.shape[1],
            "held_out": list(HELD_OUT),
            "images": {k: len(x) for k, (x, _) in sets.items()},
            "not_finite": int((~rows["finite"].to_numpy(zero_copy_only=False)).sum()),
            "guidance": q.guidance,
            "neighbours": q.neighbours,
            "subsets": q.subsets,
            "subset_size": min(q.subset_size, *(len(x) for x, _ in sets.values())),
            "grid": run.name_of(at.result / "samples.png"),
        }
        files.replace_bytes(
            at.result / "samples.png",
            tables.encode_png(grid(at.samples, len(classes_of(run.data)))),
        )
        files.write_json(at.result / RESULT, result)
        return {"rows": len(rows), "kid": figures["samples"]["kid"]}

    run_step(at.result, recipe, body, handle)


def validation_loss(denoiser: StoragePath) -> float | None:
    """The last of a denoiser's training; None where none was computed, or nothing was trained."""
    path = denoiser / tracking.METRICS
    found = (
        [v["validation_loss"] for _, v in tracking.lines(path) if "validation_loss" in v]
        if path.exists()
        else []
    )
    return found[-1] if found else None


def _figures(
    sets: dict[str, tuple[np.ndarray, np.ndarray]], config: cfg.Quality, classes: list[str]
) -> dict[str, Any]:
    """KID and PRDC against the held-out images: of the samples, of images of `train` (the floor),
    and class by class.
    """
    from adversa.evaluate.quality import MEASURES, kid, prdc, prdc_by_class

    (real, real_labels), k = sets["real"], config.neighbours
    size = min(
        config.subset_size, *(len(x) for x, _ in sets.values())
    )  # one size for both: their deviations can be compared
    found: dict[str, Any] = {}
    for name, kind in (("samples", "sample"), ("train", "train")):
        fake, fake_labels = sets[kind]
        mean, std = kid(fake, real, config.subsets, size, seed_of("kid"))
        enough = min(len(real), len(fake)) > k
        overall: dict[str, Any] = dict(prdc(real, fake, k)) if enough else dict.fromkeys(MEASURES)
        by_class = prdc_by_class(real, real_labels, fake, fake_labels, k, classes)
        found[name] = {"kid": mean, "kid_std": std, **overall, "classes": by_class}
    return found


def grid(samples: StoragePath, classes: int) -> np.ndarray:
    """The first COLUMNS samples of each class, a row a class (black where there are fewer): uint8
    [classes * R, COLUMNS * R, 3].
    """
    rows: list[list[np.ndarray]] = [[] for _ in range(classes)]
    for path in tables.parts(samples):
        table = tables.read_part(path, ["label", "image"])
        for label, image in zip(
            table["label"].to_pylist(), table["image"].to_pylist(), strict=True
        ):
            if len(rows[label]) < COLUMNS:
                rows[label].append(tables.decode_png(image))
    blank = np.zeros_like(next(r[0] for r in rows if r))
    return np.concatenate(
        [np.concatenate([*r, *[blank] * (COLUMNS - len(r))], axis=1) for r in rows]
    )
