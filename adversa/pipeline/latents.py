"""The steps about the space that is diffused: its codec, the latents of the real images, a denoiser
that came from elsewhere.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from adversa import config as cfg
from adversa.common.symmetry import symmetry
from adversa.engine.batches import STATS, Feed
from adversa.engine.interface import Engine, FitJob
from adversa.engine.step import Facts, inputs, mapped, run_step
from adversa.engine.tasks import Part, Work
from adversa.run import step_folder
from adversa.run.control import NULL_HANDLE, RunHandle
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files, tables, weights
from adversa.storage.arrays import RoleArray
from adversa.storage.path import StoragePath, storage_path
from adversa.types import UserError, seed_of

MEASURED = 64  # images of `select` that a given codec's PSNR is measured on


def space(config: cfg.Config, codec: StoragePath) -> tuple[int, int]:
    """(channels, side) of what is diffused. codec: the run's codec folder, read where the codec is
    not fitted here.
    """
    resolution = config.data.resolution
    if config.codec.kind == "pixels":
        return 3, resolution
    if config.codec.is_fitted:
        return config.codec.latent_channels, resolution >> config.codec.halvings
    meta = files.read_json(codec / weights.CONFIG)
    assert meta is not None, f"{codec} is not made yet"
    return meta["channels"], resolution // meta["factor"]


def check_codec(config: cfg.Codec, resolution: int) -> None:
    """Before anything runs: the folder of a given codec is there and, where it says so, of the
    right kind and factor.

    A finished codec is in the run, and needs it no more.
    """
    from adversa.diffuse import codec

    if config.path is not None:
        codec.source(config)
        codec.check(config, resolution)


def codec_job(
    data: StoragePath,
    mix: StoragePath,
    config: cfg.Codec,
    balance: float,
    seed: int,
    resolution: int,
    out: StoragePath,
) -> FitJob:
    """Fit an autoencoder on what the arm `real` sees; `select` only tells how well it does."""
    from adversa.diffuse import codec_fit
    from adversa.training.loop import resume_step

    feed = Feed(
        folders=(data / "train",),
        mix=mix,
        steps=config.steps,
        batch_size=config.batch_size,
        balance=balance,
        seed=seed_of("feed", "codec", seed),
    )
    section = config.model_dump(mode="json", exclude={"checkpoint_steps"}) | {
        "balance": balance,
        "seed": seed,
    }
    recipe = Recipe("codec", 1, section, inputs(data=data, mix=mix))
    job = partial(
        codec_fit.fit_codec, config=config, resolution=resolution, seed=seed_of("codec", seed)
    )
    return FitJob(
        out,
        recipe,
        job,
        resume_step,
        feed,
        Feed(folders=(data / "select",), batch_size=config.batch_size),
    )


def fetch(
    data: StoragePath,
    config: cfg.Codec,
    resolution: int,
    out: StoragePath,
    handle: RunHandle = NULL_HANDLE,
) -> None:
    """Copy the autoencoder that config.path names into the run, and measure it on pictures of
    `select`.
    """
    from adversa.diffuse import codec

    section = {"kind": config.kind, "path": config.path, "resolution": resolution}
    recipe = Recipe("codec", 1, section, inputs(data=data) | codec.source(config))

    def body(progress: Progress) -> Facts:
        fingerprint = codec.fetch(config, resolution, out)
        images = _some(data / "select", MEASURED)
        loaded = codec.load(out)
        psnr = codec.psnr(images, loaded.decode(loaded.to_space(images)))
        return {"rows": len(images), "fingerprint": fingerprint, "metrics": {"psnr": psnr}}

    run_step(out, recipe, body, handle)


def _some(examples: StoragePath, number: int) -> np.ndarray:
    """At most `number` images of a role, evenly spread over it: data sets often list one class
    after the other.
    """
    pictures = RoleArray(examples, build=False)
    return pictures.take(np.unique(np.linspace(0, len(pictures.ids) - 1, number).astype(np.int64)))


def encode(
    engine: Engine,
    examples: StoragePath,
    data: StoragePath,
    codec: StoragePath,
    views: int,
    out: StoragePath,
    measured: StoragePath | None = None,
) -> None:
    """The latents of `views` symmetries of every image of a role; beside them mean and standard
    deviation (STATS) by channel.

    measured: the latents whose mean and standard deviation these are given with; None: their own.
    """
    names = inputs(data=data, codec=codec) | ({} if measured is None else inputs(measured=measured))
    recipe = Recipe("encode", 1, {"role": examples.name, "views": views}, names)

    def body(progress: Progress) -> Facts:
        paths = tables.parts(examples)
        parts = [Part(i, tables.count(p), {"path": str(p)}) for i, p in enumerate(paths)]
        make = partial(make_encode, examples, codec, views)
        spent = mapped(engine, make, parts, out, progress, model=True)
        stats = measure(out) if measured is None else files.read_json(measured / STATS) or {}
        files.write_json(out / STATS, stats)
        return spent | stats

    run_step(out, recipe, body, engine.handle)


def make_encode(examples: StoragePath, codec_folder: StoragePath, views: int) -> Work:
    import torch

    from adversa.diffuse import codec

    loaded = codec.load(codec_folder, "cuda" if torch.cuda.is_available() else "cpu")
    pictures = RoleArray(examples)

    def work(part: Part, path: StoragePath) -> int:
        source = storage_path(part.payload["path"])
        rows, images = tables.read_part(source, ["id", "label"]), pictures.part(source.name)
        turned = (np.ascontiguousarray(symmetry(images, v, 1, 2)) for v in range(views))
        latents = np.stack([loaded.encode(x).numpy() for x in turned], axis=1)
        if not (np.abs(latents) < np.finfo(np.float16).max).all():
            bad = rows["id"][
                int(
                    np.flatnonzero(
                        ~(np.abs(latents) < np.finfo(np.float16).max).reshape(len(rows), -1).all(1)
                    )[0]
                )
            ]
            raise UserError(
                f"the latent of image {bad} is not finite; take another codec.path, or a "
                "lower codec.lr"
            )
        tables.write_part(
            path,
            tables.latents_table(
                rows["id"].to_pylist(), rows["label"].to_pylist(), latents.astype(np.float16)
            ),
        )
        return len(rows)

    return work


def measure(folder: StoragePath) -> dict[str, Any]:
    """Mean and standard deviation of latents, channel by channel, over every row and view, one part
    in memory at a time.
    """
    count, total, square = 0, np.zeros(0), np.zeros(0)
    for path in tables.parts(folder):
        z = tables.decode_latents(tables.read_part(path, ["latent"])["latent"])
        z = np.moveaxis(z, 2, 0).reshape(z.shape[2], -1).astype(np.float64)
        if not count:
            total = square = np.zeros(len(z))
        count, total, square = count + z.shape[1], total + z.sum(1), square + (z**2).sum(1)
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 0))
    if dead := np.flatnonzero(std < 1e-4).tolist():
        fix = (
            "fit it for more codec.steps or with fewer codec.latent_channels, or take another "
            "codec.path"
        )
        raise UserError(
            f"channels {dead} of the codec's latents are constant: nothing can be diffused "
            f"in them; {fix}"
        )
    return {"mean": mean.tolist(), "std": std.tolist()}


def scaling(codec: StoragePath, latents: StoragePath, sigma_data: float) -> dict[str, Any]:
    """The key `codec` of the config.json of a denoiser that is trained on latents."""
    from adversa.diffuse.codec import measured

    stats = files.read_json(latents / STATS)
    assert stats is not None, f"{latents} is not finished"
    return measured(step_folder.fingerprint(codec), stats["mean"], stats["std"], sigma_data)


def fit_denoiser(
    batches: Any, *, codec_folder: StoragePath, codec: dict[str, Any], **given: Any
) -> dict[str, Any]:
    """`diffuse.fit.fit` on latents: the codec is loaded where the training runs, to show its
    samples. codec: as of `scaling`.
    """
    from adversa.diffuse import codec as codecs
    from adversa.diffuse import fit

    loaded = codecs.load(codec_folder, space=codec)
    return fit.fit(
        batches, channels=loaded.meta["channels"], decode=loaded.decode, codec=codec, **given
    )


def external_denoiser(
    config: cfg.Config,
    data: StoragePath,
    classes: list[str],
    codec: StoragePath,
    out: StoragePath,
    handle: RunHandle = NULL_HANDLE,
) -> None:
    """A folder that stands for config.denoiser.external: nothing is trained, and the recipe holds
    the hash of its weights.
    """
    from adversa.diffuse import external

    path = config.denoiser.external
    assert path is not None
    latent = config.codec.kind != "pixels"
    names = (
        inputs(data=data)
        | ({"codec": step_folder.fingerprint(codec)} if latent else {})
        | {"weights": external.fingerprint(path)}
    )
    recipe = Recipe("denoiser", 1, {"external": path}, names)

    def body(progress: Progress) -> Facts:
        channels, side = space(config, codec)
        model = external.read(path, len(classes))
        external.check(model, path, channels, side, config.generate.guidance)
        own = (files.read_json(codec / weights.CONFIG) or {}).get("native")
        extra = {"codec": {"fingerprint": names["codec"], **own}} if latent and own else {}
        files.write_json(
            out / weights.CONFIG, external.describe(model, path, classes, side, channels, **extra)
        )
        return {"rows": 0, "metrics": {}}

    run_step(out, recipe, body, handle)
