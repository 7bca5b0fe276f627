"""The cycle where latents are diffused, and where the denoiser came from elsewhere: on the local
engine, without a network.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors.torch import save_file
from typer.testing import CliRunner

from adversa import config as cfg
from adversa.cli.app import app
from adversa.common.symmetry import symmetry
from adversa.diffuse import codec, edm, external
from adversa.engine import batches
from adversa.engine.local import LocalEngine
from adversa.engine.tasks import Part
from adversa.pipeline import latents, loop
from adversa.pipeline.stages import stages
from adversa.report import page
from adversa.run import folder as run_folder
from adversa.run import step_folder
from adversa.storage import files, tables
from adversa.types import UserError

SHORT = {
    "data": {"phantom": {"images": 200}},
    "classifier": {
        "model_args": {"channels": [8, 8, 8, 8]},
        "steps": 6,
        "batch_size": 16,
        "evaluations": 1,
        "checkpoint_steps": 3,
    },
    "codec": {
        "kind": "tiny",
        "width": 8,
        "halvings": 2,
        "latent_channels": 3,
        "steps": 6,
        "batch_size": 8,
        "checkpoint_steps": 2,
    },
    "denoiser": {
        "architecture": "unet",
        "patch": 1,
        "channels": [8, 8],
        "steps": 4,
        "batch_size": 8,
        "checkpoint_steps": 2,
    },
    "generate": {"per_case": 2, "steps": 2, "batch_size": 8},
    "mine": {"budget": 6},
    "curate": {"min_agreement": 0.0},
    "evaluate": {"bootstrap": 100},
}


@pytest.fixture
def short(tiny):
    def build(**changes):
        return tiny(
            **{
                k: {**SHORT.get(k, {}), **v} if isinstance(v, dict) else v
                for k, v in ({k: {} for k in SHORT} | changes).items()
            }
        )

    return build


def go(config, root, until=None, engine=None):
    run = loop.open_run(config, root)
    loop.run(config, run, engine or LocalEngine(1, 1), page.write, until)
    return run


def kl_folder(root: Path) -> str:
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(root)
    return str(root)


def test_a_whole_run_in_the_latents_of_a_codec_it_fits(short, tmp_path):
    config = short()
    run = go(config, tmp_path / "run")
    assert all(s.is_finished for s in stages(config, run)) and (run.root / "report.html").exists()
    assert [s.title for s in stages(config, run)][:3] == ["prepare", "codec", "train"]
    stats, mix = files.read_json(run.latents("train") / batches.STATS), run.arm(0, "real") / "mix"
    assert len(stats["mean"]) == 3 and step_folder.manifest(run.codec)["metrics"]["psnr"] > 5
    _, meta, _ = edm.load(run.denoiser)
    assert (meta["resolution"], meta["channels"]) == (8, 3) and meta["codec"][
        "fingerprint"
    ] == step_folder.fingerprint(run.codec)
    # What the denoiser is fed has zero mean and the standard deviation it is made for, channel by
    # channel.
    whole = batches.Feed(
        folders=(run.latents("train"),),
        mix=mix,
        steps=40,
        batch_size=32,
        seed=1,
        latent_std=config.denoiser.sigma_data,
    )
    x = np.concatenate([b["latent"] for b in whole.batches()])
    assert x.dtype == np.float32 and x.shape[1:] == (3, 8, 8)
    np.testing.assert_allclose(x.mean((0, 2, 3)), 0, atol=0.05)
    np.testing.assert_allclose(x.std((0, 2, 3)), 0.5, rtol=0.1)
    assert any(
        "latents of an autoencoder" in note and " dB" in note
        for note in files.read_json(run.summary)["notes"]
    )
    pictures = tables.decode_images(tables.read(run.round(1, "synthetic"), ["image"])["image"])
    assert pictures.shape[1:] == (32, 32, 3) and len(np.unique(pictures)) > 10


def test_latents_are_those_of_the_images_in_every_symmetry(short, tmp_path):
    config = short()
    run = go(config, tmp_path / "run", until="codec")
    assert not run.denoiser.exists()
    loaded, checked = codec.load(run.codec), 0
    for data, path in zip(
        tables.parts(run.data / "train"), tables.parts(run.latents("train")), strict=True
    ):
        rows, found = pq.read_table(data), pq.read_table(path)
        assert (
            found["id"].to_pylist() == rows["id"].to_pylist()
            and found["label"].to_pylist() == rows["label"].to_pylist()
        )
        z, images = tables.decode_latents(found["latent"]), tables.decode_images(rows["image"])
        assert z.shape == (len(rows), 8, 3, 8, 8) and z.dtype == np.float16
        for view in (0, 1, 6):
            np.testing.assert_allclose(
                z[:, view], loaded.encode(symmetry(images, view, 1, 2).copy()), rtol=2e-3, atol=1e-4
            )
        checked += len(rows)
    assert checked == step_folder.manifest(run.latents("train"))["rows"] > 50
    mean, std = (
        np.array(files.read_json(run.latents("train") / batches.STATS)[k]) for k in ("mean", "std")
    )
    every = np.concatenate(
        [
            tables.decode_latents(pq.read_table(p)["latent"])
            for p in tables.parts(run.latents("train"))
        ]
    ).astype(np.float64)
    np.testing.assert_allclose(every.mean((0, 1, 3, 4)), mean, rtol=1e-6)
    np.testing.assert_allclose(every.std((0, 1, 3, 4)), std, rtol=1e-6)


def test_views_follow_the_seed_and_a_resumed_feed_sees_the_same(short, tmp_path):
    config = short(codec={"views": 4})
    run = go(config, tmp_path / "run", until="codec")
    made = {
        "folders": (run.latents("train"),),
        "mix": run.arm(0, "real") / "mix",
        "steps": 9,
        "batch_size": 16,
        "latent_std": 0.5,
    }
    whole = list(batches.Feed(**made, seed=3).batches())
    for a, b in zip(whole[5:], batches.Feed(**made, seed=3).batches(5), strict=True):
        assert a["id"] == b["id"] and np.array_equal(a["latent"], b["latent"])
    halves = [batches.Feed(**made, seed=3).batch(2, rank, 2) for rank in (0, 1)]
    assert np.array_equal(np.concatenate([h["latent"] for h in halves]), whole[2]["latent"])
    again = {}  # one image in several views
    for b in whole:
        for i, z in zip(b["id"], b["latent"], strict=True):
            again.setdefault(i, set()).add(z.tobytes())
    assert max(len(v) for v in again.values()) > 1 and all(len(v) <= 4 for v in again.values())
    assert (
        tables.decode_latents(pq.read_table(tables.parts(run.latents("train"))[0])["latent"]).shape[
            1
        ]
        == 4
    )


def test_without_flips_one_view_is_encoded(short, tmp_path):
    run = go(short(denoiser={"flips": False}), tmp_path / "run", until="codec")
    assert (
        tables.decode_latents(pq.read_table(tables.parts(run.latents("train"))[0])["latent"]).shape[
            1
        ]
        == 1
    )


@pytest.mark.ray
@pytest.mark.slow
def test_ray_encodes_and_trains_the_same(short, tmp_path, ray_engine):
    config = short()
    ours, theirs = (
        go(config, tmp_path / e.name, until="train", engine=e)
        for e in (LocalEngine(1, 1), ray_engine)
    )
    assert step_folder.fingerprint(ours.codec) == step_folder.fingerprint(theirs.codec)
    for role in ("train", "select"):
        assert tables.read(ours.latents(role)).equals(tables.read(theirs.latents(role)))
    assert files.read_json(ours.latents("train") / batches.STATS) == files.read_json(
        theirs.latents("train") / batches.STATS
    )
    assert step_folder.fingerprint(ours.denoiser) == step_folder.fingerprint(theirs.denoiser)


class Cut(Exception):
    pass


def test_an_encoding_that_is_cut_off_ends_like_an_undisturbed_one(short, tmp_path, monkeypatch):
    config = short()
    whole, out = go(config, tmp_path / "whole", until="codec"), tmp_path / "out"
    real, seen = latents.make_encode, []

    def cut(examples, folder, views):
        work = real(examples, folder, views)

        def once(part: Part, path: Path) -> int:
            if part.index == 1:
                raise Cut
            seen.append(part.index)
            return work(part, path)

        return once

    monkeypatch.setattr(latents, "make_encode", cut)
    with pytest.raises(Cut):
        go(config, out, until="codec")
    monkeypatch.setattr(latents, "make_encode", real)
    run = go(config, out, until="codec")
    assert seen == [0] and step_folder.is_finished(run.latents("train"))
    for a, b in zip(
        tables.parts(whole.latents("train")), tables.parts(run.latents("train")), strict=True
    ):
        assert pq.read_table(a).equals(pq.read_table(b))
    assert files.read_json(run.latents("train") / batches.STATS) == files.read_json(
        whole.latents("train") / batches.STATS
    )


def test_a_given_autoencoder_is_copied_measured_and_used(short, tmp_path):
    path = kl_folder(tmp_path / "kl")
    config = short(codec={"kind": "kl", "path": path})
    run = go(config, tmp_path / "run", until="train")
    shutil.rmtree(path)  # the run has all it needs
    assert (
        step_folder.manifest(run.codec)["metrics"]["psnr"] > 0
        and codec.load(run.codec).meta["channels"] == 4
    )
    assert edm.load(run.denoiser)[1]["resolution"] == 16
    run = go(config.model_copy(), tmp_path / "run", until="generate")
    assert step_folder.manifest(run.round(1, "synthetic"))["rows"] > 0


def test_other_weights_in_the_same_folder_are_another_recipe(short, tmp_path):
    path = kl_folder(tmp_path / "kl")
    config = short(codec={"kind": "kl", "path": path})
    run = go(config, tmp_path / "run", until="codec")
    (run.codec / step_folder.MANIFEST).unlink()  # the step is asked again
    theirs = AutoencoderKL.from_pretrained(path)
    with torch.no_grad():
        next(theirs.parameters()).add_(1)
    theirs.save_pretrained(path)
    with pytest.raises(UserError, match="another recipe.*inputs.codec"):
        go(config, tmp_path / "run", until="codec")


def test_what_does_not_fit_is_said_before_anything_is_trained(short, tmp_path):
    path = kl_folder(tmp_path / "kl")
    config = short(codec={"kind": "kl", "path": path}, denoiser={"channels": [8, 8, 8, 8, 8, 8]})
    with pytest.raises(UserError, match="must be a multiple of"):
        go(config, tmp_path / "run", until="codec")
    assert not (tmp_path / "run/latents").exists()
    run = go(
        short(codec={"kind": "kl", "path": path}), tmp_path / "run", until="codec"
    )  # fixed in place
    assert step_folder.is_finished(run.latents("train"))
    with pytest.raises(UserError, match=r"another recipe.*denoiser.flips: True -> False"):
        go(
            short(codec={"kind": "kl", "path": path}, denoiser={"flips": False}),
            tmp_path / "run",
            until="codec",
        )
    with pytest.raises(UserError, match="no such folder"):
        go(
            short(codec={"kind": "kl", "path": str(tmp_path / "none")}),
            tmp_path / "other",
            until="codec",
        )


def test_a_given_autoencoder_of_another_kind_or_factor_is_told_before_the_data_are_read(
    short, tmp_path
):
    path = kl_folder(tmp_path / "kl")
    with pytest.raises(
        UserError, match="is of class AutoencoderKL; codec.kind tiny wants AutoencoderTiny"
    ):
        go(short(codec={"kind": "tiny", "path": path}), tmp_path / "run", until="codec")
    assert not (tmp_path / "run/data").exists()
    for levels, kind in ((5, AutoencoderKL), (5, AutoencoderTiny)):
        config = {"block_out_channels": [8] * levels, "encoder_block_out_channels": [8] * levels}
        root = tmp_path / kind.__name__
        root.mkdir()
        (root / "config.json").write_text(json.dumps({"_class_name": kind.__name__} | config))
        (root / "diffusion_pytorch_model.safetensors").touch()
        asked = cfg.Codec(kind="kl" if kind is AutoencoderKL else "tiny", path=str(root))
        latents.check_codec(asked, 48)
        with pytest.raises(
            UserError, match="data.resolution 40 must be a multiple of 16, the factor of codec.path"
        ):
            latents.check_codec(asked, 40)


def test_the_factor_that_is_told_is_the_factor_that_is_measured(short, tmp_path):
    path = kl_folder(tmp_path / "kl")
    asked = cfg.Codec(kind="kl", path=path)
    fetched = codec.fetch(asked, 32, tmp_path / "ours") and cfg.Codec(
        kind="kl", path=str(tmp_path / "ours")
    )
    assert files.read_json(tmp_path / "ours/config.json")["factor"] == 2
    for given in (asked, fetched):
        codec.check(given, 34)
        with pytest.raises(UserError, match="must be a multiple of 2,"):
            codec.check(given, 33)
    with pytest.raises(UserError, match="wants AutoencoderTiny"):
        codec.check(fetched.model_copy(update={"kind": "tiny"}), 32)


def test_a_mistake_in_an_external_denoiser_is_fixed_in_the_same_folder(short, tmp_path):
    """Of a latent one: the data and the codec are made by then, and stay."""
    path = kl_folder(tmp_path / "vae")
    theirs = short(
        codec={"kind": "kl", "path": path},
        denoiser={"external": unet_folder(tmp_path / "theirs", labels=6)},
    )
    with pytest.raises(UserError, match="channels"):
        go(theirs, tmp_path / "run", until="codec")
    run = run_folder.RunDir(tmp_path / "run")
    made = step_folder.manifest(run.codec)["finished"], step_folder.manifest(run.data)["finished"]
    assert not step_folder.is_finished(run.arm(0, "real") / "mix")
    run = go(short(codec={"kind": "kl", "path": path}), tmp_path / "run", until="codec")
    assert made == (
        step_folder.manifest(run.codec)["finished"],
        step_folder.manifest(run.data)["finished"],
    )
    assert step_folder.is_finished(run.latents("train"))


def test_a_channel_without_spread_is_refused(tmp_path):
    z = np.random.default_rng(0).normal(size=(5, 1, 2, 4, 4)).astype(np.float16)
    z[:, :, 1] = 3.0
    tables.write_part(
        tmp_path / tables.part_name(0), tables.latents_table([str(i) for i in range(5)], [0] * 5, z)
    )
    with pytest.raises(UserError, match=r"channels \[1\] of the codec's latents are constant"):
        latents.measure(tmp_path)


# ---- a denoiser from elsewhere -------------------------------------------------------------------


def unet_folder(root: Path, labels: int = 6) -> str:
    torch.manual_seed(0)
    UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        num_class_embeds=labels,
    ).save_pretrained(root / "unet")
    DDPMScheduler().save_pretrained(root / "scheduler")
    return str(root)


PIXELS = {"kind": "pixels"}


def test_a_whole_run_with_an_external_denoiser(short, tmp_path):
    config = short(codec=PIXELS, denoiser={"external": unet_folder(tmp_path / "theirs")})
    run = go(config, tmp_path / "run")
    assert (run.root / "report.html").exists() and not (run.denoiser / "model.safetensors").exists()
    generated = tables.read(run.round(1, "synthetic"))
    assert all(generated["finite"].to_pylist()) and len(set(generated["denoiser"].to_pylist())) == 1
    assert step_folder.manifest(run.denoiser)["rows"] == 0


def test_external_weights_are_part_of_the_recipe(short, tmp_path):
    path = unet_folder(tmp_path / "theirs")
    config = short(codec=PIXELS, denoiser={"external": path})
    run = go(config, tmp_path / "run", until="train")
    before = files.read_json(run.denoiser / step_folder.RECIPE)["inputs"]["weights"]
    assert before == external.fingerprint(path)
    scheduler = tmp_path / "theirs/scheduler/scheduler_config.json"
    scheduler.write_text(
        json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"})
    )
    with pytest.raises(UserError, match="has changed since this run began"):
        go(config, tmp_path / "run", until="generate")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"labels": 5}, "no null class to guide against; set generate.guidance=1"),
        ({"labels": 9}, "has 9 class labels; give one with the run's 5 classes"),
    ],
)
def test_an_external_denoiser_that_does_not_fit_stops_before_the_training(
    short, tmp_path, change, text
):
    config = short(codec=PIXELS, denoiser={"external": unet_folder(tmp_path / "theirs", **change)})
    with pytest.raises(UserError, match=text):
        go(config, tmp_path / "run", until="train")
    assert not any((tmp_path / "run").rglob("model.safetensors"))


def test_a_missing_external_folder_is_said_before_the_data_is_read(short, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        go(
            short(codec=PIXELS, denoiser={"external": str(tmp_path / "none")}),
            tmp_path / "run",
            until="train",
        )
    assert not (tmp_path / "run/data").exists()


def test_an_external_latent_model_generates_in_its_autoencoders_own_scaling(short, tmp_path):
    """As Stable Diffusion is: a UNet2DConditionModel with embeddings, an AutoencoderKL with its
    scaling factor.
    """
    torch.manual_seed(0)
    root = tmp_path / "theirs"
    UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    ).save_pretrained(root / "unet")
    EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    ).save_pretrained(root / "scheduler")
    save_file({"embeddings": torch.randn(6, 3, 12)}, root / external.EMBEDDINGS)
    kl_folder(root / "vae")
    config = short(
        codec={"kind": "kl", "path": str(root)},
        denoiser={"external": str(root)},
        generate={"sigma_max": 14.6},
    )
    run = go(config, tmp_path / "run", until="generate")
    assert not run.latents("train").exists()  # nothing is trained on them
    meta = files.read_json(run.denoiser / "config.json")
    assert meta["codec"]["scale"] == [0.18215] * 4 and (meta["channels"], meta["resolution"]) == (
        4,
        16,
    )
    generated = tables.read(run.round(1, "synthetic"))
    assert all(generated["finite"].to_pylist()) and tables.decode_images(generated["image"]).shape[
        1:
    ] == (32, 32, 3)


# ---- the command ---------------------------------------------------------------------------------


def adversa(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_train_codec_fits_the_codec_and_stops_there(short, tmp_path):
    from adversa.config import dump

    (tmp_path / "c.yaml").write_text(dump(short()))
    found = adversa(
        "train", "codec", tmp_path / "c.yaml", "--engine", "local", "--run-dir", tmp_path / "run"
    )
    assert found.exit_code == 0, found.output
    run = run_folder.RunDir(tmp_path / "run")
    assert (
        "codec is done" in found.output
        and step_folder.is_finished(run.latents("train"))
        and not run.denoiser.exists()
    )
    assert (run.codec / "reconstructions.png").stat().st_size > 1000
    status = adversa("status", tmp_path / "run")
    assert "codec" in status.output and status.exit_code == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["codec"], "no codec to train; set codec.kind=tiny"),
        (["codec", "a.yaml", "b.yaml"], "write adversa train [codec] [CONFIG]"),
        (["a.yaml", "b.yaml"], "write adversa train [codec] [CONFIG]"),
        (["codex"], "no configuration at codex"),
    ],
)
def test_train_with_words_that_make_no_sense(tmp_path, words, text):
    found = adversa("train", *words, "--engine", "local", "--run-dir", tmp_path / "run")
    assert found.exit_code == 2 and text in found.stderr and found.stderr.count("\n") == 1, (
        found.output
    )
    assert not (tmp_path / "run").exists()
