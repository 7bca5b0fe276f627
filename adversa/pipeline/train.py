"""Training sets and trainings: an arm's mix, its classifiers, the denoiser."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adversa import config as cfg
from adversa.engine.batches import Feed, balanced
from adversa.engine.interface import FitJob
from adversa.engine.step import Facts, inputs, run_step
from adversa.pipeline import arms, latents
from adversa.run import step_folder
from adversa.run.control import NULL_HANDLE, RunHandle
from adversa.run.folder import RunDir, classes_of
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files, tables
from adversa.storage.path import StoragePath
from adversa.storage.weights import MODEL
from adversa.types import GENERATED, UserError, seed_of

# ---- training ------------------------------------------------------------------------------------


def mix(
    data: StoragePath,
    hard: Sequence[StoragePath],
    verdicts: Sequence[StoragePath],
    arm: str,
    config: cfg.Mix,
    per_case: int,
    out: StoragePath,
    added: arms.Added = arms.UNCHOSEN,
    handle: RunHandle = NULL_HANDLE,
) -> None:
    """Ids and weights of an arm's training set (arms.mix).

    hard, verdicts: of every round so far; none before the first. per_case: what the controls repeat
    where no arm generates. added: without a ratio only before the first round, where there is
    nothing to add.
    """
    names = inputs(data=data) | {
        f"verdicts-{i}": step_folder.fingerprint(v) for i, v in enumerate(verdicts)
    }
    names |= {f"hard-{i}": step_folder.fingerprint(h) for i, h in enumerate(hard)}
    section = {"arm": arm, "per_case": per_case} | config.model_dump(
        mode="json", exclude={"ratios", "patience"}
    )
    assert added.ratio is not None or not (hard or verdicts), "the ratio is not chosen yet"
    section |= {} if added.ratio is None else {"synthetic_ratio": added.ratio}
    section |= {"most": {str(c): n for c, n in sorted(added.caps.items())}} if added.caps else {}
    recipe, ratio = Recipe("mix", 2, section, names), added.ratio or 0.0

    def body(progress: Progress) -> Facts:
        real = pairs(tables.read(data / "train", ["id", "label"], tables.EXAMPLES), "id")
        cases = sorted(
            {p for h in hard for p in pairs(tables.read(h, schema=tables.HARD_CASES), "example")}
        )
        kept = _kept(verdicts, [a for a in config.arms if a in GENERATED])
        classes = len(classes_of(data))
        if kept:
            labels = {a: [label for _, label in rows] for a, rows in kept.items()}
            counts = arms.matched_counts(labels, classes, len(real), ratio, added.caps)
        else:
            counts = arms.repeats(
                [label for _, label in cases], classes, per_case, len(real), ratio, added.caps
            )
        mined = cases if config.fold_mined == "all" else []
        table = arms.mix(arm, real, mined, kept.get(arm, []), counts)
        tables.write_part(out / tables.part_name(0), table)
        given = counts if arm != "real" else [0] * classes
        synthetic = len(table) - len(real) - len(mined)
        return {
            "rows": len(table),
            "mined": len(mined),
            "synthetic": synthetic,
            "added": sum(given),
            "added_by_class": given,
        }

    run_step(out, recipe, body, handle)


def _kept(
    verdicts: Sequence[StoragePath], names: Sequence[str]
) -> dict[str, list[tuple[str, int]]]:
    """Arm -> (request, label) of its images that passed the filter."""
    found: dict[str, list[tuple[str, int]]] = {arm: [] for arm in names}
    for folder in verdicts:
        rows = tables.read(folder, ["request_id", "arm", "label", "keep"], tables.VERDICTS)
        rows = rows.filter(rows["keep"])
        for arm, these in found.items():
            these += pairs(rows.filter(pc.equal(rows["arm"], arm)), "request_id")
    return found


def round_mix(
    c: cfg.Config,
    run: RunDir,
    number: int,
    arm: str,
    added: arms.Added,
    out: StoragePath,
    handle: RunHandle,
) -> None:
    """`mix` of an arm in a round, of all that was mined and kept so far."""
    rounds = range(1, number + 1)
    verdicts = [run.round(n, "verdicts") for n in rounds] if c.mix.generates else []
    mix(
        run.data,
        [run.round(n, "hard") for n in rounds],
        verdicts,
        arm,
        c.mix,
        c.generate.per_case,
        out,
        added,
        handle,
    )


def pairs(rows: pa.Table, name: str) -> list[tuple[str, int]]:
    """(id, label) of each row."""
    return list(zip(rows[name].to_pylist(), rows["label"].to_pylist(), strict=True))


def classifier_job(
    data: StoragePath,
    mix_folder: StoragePath,
    added: Sequence[StoragePath],
    config: cfg.Classifier,
    seed: int,
    resolution: int,
    out: StoragePath,
) -> FitJob:
    """Train a classifier on a mix. The seed alone decides initial weights, draws and augmentation:
    pairs of arms share it.

    added: folders of what is in the mix beside the images of `train`.
    """
    from adversa.classify import fit
    from adversa.training.loop import resume_step

    select = Feed(folders=(data / "select",), batch_size=config.batch_size)
    feed = Feed(
        folders=(data / "train", *added),
        mix=mix_folder,
        steps=config.steps,
        batch_size=config.batch_size,
        balance=config.balance,
        seed=seed_of("feed", seed),
    )
    section = config.model_dump(mode="json", exclude={"checkpoint_steps"})
    recipe = Recipe(
        "classifier",
        1,
        section | {"seed": seed},
        inputs(data=data, mix=mix_folder) | _weights(config.weights),
    )
    classes = len(classes_of(data))
    counts, priors = class_shares(mix_folder, config.balance, classes)
    job = partial(
        fit.fit,
        config=config,
        num_classes=classes,
        resolution=resolution,
        seed=seed,
        counts=counts,
        priors=priors,
    )
    return FitJob(out, recipe, job, resume_step, feed, select)


def round_classifier(
    c: cfg.Config,
    run: RunDir,
    number: int,
    arm: str,
    seed: int,
    mix_folder: StoragePath,
    out: StoragePath,
) -> FitJob:
    """A training of an arm in a round, from one of the run's seeds, on the arm's mix or another of
    that round.
    """
    rounds = range(1, number + 1) if arm in GENERATED else ()
    mined = [run.data / "mine"] if number and c.mix.fold_mined == "all" else []
    return classifier_job(
        run.data,
        mix_folder,
        [*mined, *(run.round(n, "synthetic") for n in rounds)],
        c.classifier,
        seed_of("classifier", c.seed, seed),
        c.data.resolution,
        out,
    )


def class_shares(
    mix_folder: StoragePath, balance: float, classes: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(weight of each class in a mix, its share of the draws once they are balanced), each [K]."""
    rows = tables.read(mix_folder, ["label", "weight"], tables.MIX)
    labels, weights = rows["label"].to_numpy().astype(np.int64), rows["weight"].to_numpy()
    drawn = np.bincount(labels, balanced(weights, labels, balance), minlength=classes)
    return tuple(np.bincount(labels, weights, minlength=classes).tolist()), tuple(
        (drawn / drawn.sum()).tolist()
    )


def denoiser_job(
    data: StoragePath,
    mix_folder: StoragePath,
    config: cfg.Denoiser,
    seed: int,
    resolution: int,
    out: StoragePath,
    codec: tuple[StoragePath, StoragePath] | None = None,
) -> FitJob:
    """Train the denoiser on what the arm `real` sees, and nothing else.

    codec: (codec folder, folder of every role's latents) where latents are diffused; resolution is
    the side of what is diffused.
    """
    from adversa.diffuse import edm
    from adversa.diffuse import fit as diffuse_fit
    from adversa.training.loop import resume_step

    classes = classes_of(data)
    images, std = (codec[1], config.sigma_data) if codec else (data, None)
    feed = Feed(
        folders=(images / "train",),
        mix=mix_folder,
        steps=config.steps,
        batch_size=config.batch_size,
        balance=config.balance,
        seed=seed_of("feed", "denoiser", seed),
        latent_std=std,
    )
    section = config.model_dump(mode="json", exclude={"checkpoint_steps"})
    start = str(edm.SHIPPED) if config.weights == "phantom" else config.weights
    names = inputs(data=data, mix=mix_folder) | (
        inputs(codec=codec[0], latents=codec[1] / "train") if codec else {}
    )
    recipe = Recipe("denoiser", 1, section | {"seed": seed}, names | _weights(start))
    job: partial[dict[str, Any]] = partial(
        diffuse_fit.fit,
        config=config,
        num_classes=len(classes),
        resolution=resolution,
        classes=classes,
        seed=seed_of("denoiser", seed),
    )
    if codec:
        space = latents.scaling(codec[0], codec[1] / "train", config.sigma_data)
        job = partial(latents.fit_denoiser, codec_folder=codec[0], codec=space, **job.keywords)
    select = Feed(folders=(images / "select",), batch_size=config.batch_size, latent_std=std)
    return FitJob(out, recipe, job, resume_step, feed, select)


def _weights(name: str | None) -> dict[str, str]:
    """The contents of a local weight file or folder are part of the recipe: another file under the
    same name is another run.
    """
    if name is None or name == "imagenet":
        return {}
    return {"weights": hashlib.sha256(weight_file(name).read_bytes()).hexdigest()[:32]}


def weight_file(name: str) -> Path:
    """The file of local weights (a folder stands for its model.safetensors). UserError where there
    is none.
    """
    path = Path(name) / MODEL if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise UserError(
            f"weights {name}: no such file; give a safetensors file, a model folder, or "
            "null to start from scratch"
        )
    return path


def check_architectures(config: cfg.Config) -> None:
    """UserError where the classifier or the verifier cannot be built, or cannot take images of this
    size. Their weights are not read.
    """
    from adversa.classify.model import build

    def built(section: cfg.Classifier) -> None:
        build(section.model_copy(update={"weights": None}), 2, config.data.resolution)

    built(config.classifier)
    if not config.mix.generates:
        return
    try:
        built(cfg.verifier_of(config))
    except UserError as e:
        raise UserError(f"the verifier (curate.judge): {e}") from None


def check_weights(config: cfg.Config) -> None:
    """Before anything runs: the weight files are there, and the shipped denoiser has not seen this
    run's pictures.
    """
    from adversa.diffuse import edm, external, generator

    if config.denoiser.external:
        external.places(config.denoiser.external)
    verifier = cfg.verifier_of(config).weights
    if config.generate.weak and config.mix.arms != ["real"]:
        generator.fingerprint(Path(config.generate.weak))
    for name in (config.classifier.weights, verifier, config.denoiser.weights):
        if name not in (None, "imagenet", "phantom"):
            weight_file(name)
    seen = files.read_json(edm.SHIPPED / "config.json") or {}
    if (
        config.denoiser.weights == "phantom"
        and seen.get("pretraining", {}).get("phantom_seed") == config.data.phantom.seed
    ):
        seed = config.data.phantom.seed
        raise UserError(
            f"data.phantom.seed {seed}: the shipped denoiser was trained on these very "
            "pictures; take another seed"
        )


def check_models(
    config: cfg.Config, classes: list[str], synthetic: bool, codec: StoragePath
) -> None:
    """Before the first training: every model the run needs can be built. UserError now, and not
    after an hour of training.

    synthetic: whether the run generates, and so needs a verifier and a denoiser. codec: the run's
    folder of the codec, there if it is a given one.
    """
    from adversa.classify import model
    from adversa.diffuse import edm, external

    model.build(config.classifier, len(classes), config.data.resolution)
    if not synthetic:
        return
    model.build(cfg.verifier_of(config), len(classes), config.data.resolution)
    channels, side = latents.space(config, codec)
    if (path := config.denoiser.external) is not None:
        external.check(
            external.read(path, len(classes)), path, channels, side, config.generate.guidance
        )
        return
    denoiser = edm.build(config.denoiser, len(classes), side, channels)
    pixels = config.codec.kind == "pixels"
    if pixels or step_folder.is_finished(
        codec
    ):  # before it is fitted, nothing can be said of weights that are to go on in its latents
        space = None if pixels else {"fingerprint": step_folder.fingerprint(codec)}
        edm.start_from(denoiser, config.denoiser, classes, side, channels, space)
