"""Codecs: given ones and the one that is fitted here. No network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DModel

from adversa import config as cfg
from adversa.common.symmetry import symmetry
from adversa.diffuse import codec, codec_fit, edm, pretrained
from adversa.diffuse.codec_fit import fit_codec, losses, turned
from adversa.diffuse.pipeline import generate
from adversa.diffuse.strategy import Sources
from adversa.storage import weights
from adversa.training.loop import resume_step
from adversa.types import GenerationRequest, UserError

NOWHERE = "http://127.0.0.1:9"  # nobody listens there
TINY = cfg.Codec(kind="tiny", width=16, halvings=2, steps=7, batch_size=4, checkpoint_steps=2)


def pictures(count: int, seed: int = 0, side: int = 16) -> np.ndarray:
    """Smooth colours with one bright square: uint8 [count, side, side, 3]."""
    rng = np.random.default_rng(seed)
    x = (
        np.broadcast_to(rng.integers(40, 200, (count, 1, 1, 3)), (count, side, side, 3))
        .astype(np.uint8)
        .copy()
    )
    for i, (a, b) in enumerate(rng.integers(0, side - 5, (count, 2))):
        x[i, a : a + 5, b : b + 5] = rng.integers(0, 255, 3)
    return x


def batches(first: int = 0, steps: int = 7, size: int = 4) -> Iterator[dict[str, Any]]:
    for step in range(first, steps):
        yield {
            "id": [f"img{step}-{i}" for i in range(size)],
            "image": pictures(size, step),
            "label": np.zeros(size, np.int64),
        }


def run(out: Path, feed: Any, config: cfg.Codec = TINY, **given: Any) -> dict[str, Any]:
    given = {"seed": 0, "report": lambda p: None, "threads": 1} | given
    return fit_codec(feed, config=config, resolution=16, out=out, **given)


def tiny_vae() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=2,
    )


def kl_vae(**more: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        **more,
    )


def given(kind: str, path: Path | str) -> cfg.Codec:
    return cfg.Codec(kind=kind, path=str(path))


# ---- a given codec -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "vae", "factor"), [("tiny", tiny_vae, 4), ("kl", kl_vae, 2)])
@pytest.mark.parametrize("pipeline", [False, True])
def test_a_local_folder_becomes_a_codec_that_answers_as_diffusers(
    tmp_path: Path, kind: str, vae: Any, factor: int, pipeline: bool
) -> None:
    model, images = vae().eval(), pictures(3)
    model.save_pretrained(tmp_path / "theirs" / ("vae" if pipeline else "."))
    codec.fetch(given(kind, tmp_path / "theirs"), 16, tmp_path / "codec")
    loaded = codec.load(tmp_path / "codec")
    z = loaded.encode(images)
    with torch.no_grad():
        found = model.encode(edm.to_tensor(images))
        theirs = found.latent_dist.mean if kind == "kl" else found.latents
        back = model.decode(theirs).sample
    torch.testing.assert_close(z, theirs, rtol=1e-4, atol=1e-5)
    assert (loaded.meta["channels"], loaded.meta["factor"]) == (z.shape[1], factor) and z.shape[
        2
    ] == 16 // factor
    assert (
        np.abs(loaded.decode(loaded.to_space(images)).astype(int) - edm.to_images(back)).max() <= 1
    )


def test_a_latent_does_not_hang_on_its_neighbours(tmp_path: Path) -> None:
    kl_vae().save_pretrained(tmp_path / "theirs")
    codec.fetch(given("kl", tmp_path / "theirs"), 16, tmp_path / "codec")
    loaded, images = codec.load(tmp_path / "codec"), pictures(codec.ROWS + 5)
    sizes: list[int] = []
    for part in (loaded.model.encoder, loaded.model.decoder):
        part.register_forward_hook(lambda module, given, answer: sizes.append(len(answer)))
    whole = loaded.encode(images)
    assert torch.equal(loaded.encode(images[3:4]), whole[3:4]) and torch.equal(
        loaded.encode(images[::-1]).flip(0), whole
    )
    assert np.array_equal(loaded.decode(whole)[2], loaded.decode(whole[2:3])[0])
    assert set(sizes) == {
        codec.ROWS
    }  # other numbers of rows may take other kernels, with other last bits


@pytest.mark.parametrize(
    ("more", "shift", "scale"),
    [
        ({}, 0.0, 0.18215),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, 0.1159, 0.3611),
        ({"scaling_factor": 0.5, "latents_mean": (1.0,) * 4, "latents_std": (2.0,) * 4}, 1.0, 0.25),
    ],
)
def test_the_autoencoders_own_scaling_and_a_measured_one(
    tmp_path: Path, more: dict[str, Any], shift: float, scale: float
) -> None:
    kl_vae(**more).save_pretrained(tmp_path / "theirs")
    fingerprint = codec.fetch(given("kl", tmp_path / "theirs"), 16, tmp_path / "codec")
    own, images = codec.load(tmp_path / "codec"), pictures(6)
    z = own.encode(images)
    torch.testing.assert_close(own.to_space(images), (z - shift) * scale)
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3), correction=0)
    space = codec.measured(fingerprint, mean.tolist(), std.tolist(), 0.5)
    x = codec.load(tmp_path / "codec", space=space).to_space(images)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.full((4,), 0.5))
    other = codec.load(tmp_path / "codec", space=space)
    assert np.abs(other.decode(x).astype(int) - own.decode(own.to_space(images))).max() <= 1
    with pytest.raises(UserError, match="give them as they were made"):
        codec.load(tmp_path / "codec", space=space | {"fingerprint": "0" * 32})


def test_a_codec_folder_of_another_run_can_be_given(tmp_path: Path) -> None:
    first = run(tmp_path / "fitted", batches())
    again = codec.fetch(given("tiny", tmp_path / "fitted"), 16, tmp_path / "copy")
    images = pictures(2)
    assert torch.equal(
        codec.load(tmp_path / "fitted").encode(images), codec.load(tmp_path / "copy").encode(images)
    )
    assert again == first["fingerprint"]  # so that a denoiser of that run may go on with it
    with pytest.raises(UserError, match="wants AutoencoderKL"):
        codec.fetch(given("kl", tmp_path / "fitted"), 16, tmp_path / "no")


def test_the_hash_of_local_weights_changes_with_them(tmp_path: Path) -> None:
    model = tiny_vae()
    model.save_pretrained(tmp_path / "theirs")
    before = codec.source(given("tiny", tmp_path / "theirs"))
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path / "theirs")
    assert (
        codec.source(given("tiny", tmp_path / "theirs")) != before
        and codec.source(given("tiny", "owner/name")) == {}
    )


def damaged(p: Path) -> None:
    (p / pretrained.WEIGHTS).write_bytes(b"damaged")


def no_weights(p: Path) -> None:
    (p / pretrained.WEIGHTS).unlink()


def lacking(p: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(p / pretrained.WEIGHTS)
    state.pop(sorted(state)[0])
    save_file(state, p / pretrained.WEIGHTS, metadata={"format": "pt"})


def pickled(p: Path) -> None:
    no_weights(p)
    torch.save(tiny_vae().state_dict(), p / "diffusion_pytorch_model.bin")


def a_unet(p: Path) -> None:
    UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).save_pretrained(p)


def not_json(p: Path) -> None:
    (p / "config.json").write_text("{")


def no_object(p: Path) -> None:
    (p / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (damaged, "cannot be read"),
        (no_weights, "cannot be read"),
        (lacking, "lack or misfit 1 tensors"),
        (pickled, "cannot be read"),
        (a_unet, "is of class UNet2DModel; it must be AutoencoderTiny"),
        (not_json, "cannot be read"),
        (no_object, "cannot be read .its config.json holds a list"),
    ],
)
def test_a_folder_that_is_no_codec_is_refused_in_one_line(
    tmp_path: Path, spoil: Any, text: str
) -> None:
    tiny_vae().save_pretrained(tmp_path / "theirs")
    spoil(tmp_path / "theirs")
    with pytest.raises(UserError, match=text) as caught:
        codec.fetch(given("tiny", tmp_path / "theirs"), 16, tmp_path / "codec")
    assert "\n" not in str(caught.value) and not (tmp_path / "codec").exists()


def test_kind_channels_and_resolution_must_fit(tmp_path: Path) -> None:
    kl_vae().save_pretrained(tmp_path / "kl")
    with pytest.raises(UserError, match="is of class AutoencoderKL; it must be AutoencoderTiny"):
        codec.fetch(given("tiny", tmp_path / "kl"), 16, tmp_path / "codec")
    tiny_vae().save_pretrained(tmp_path / "tiny")
    with pytest.raises(UserError, match="data.resolution 18 must be a multiple of 4"):
        codec.fetch(given("tiny", tmp_path / "tiny"), 18, tmp_path / "codec")
    kl_vae(in_channels=1).save_pretrained(tmp_path / "grey")
    with pytest.raises(UserError, match="encodes 1 channels"):
        codec.fetch(given("kl", tmp_path / "grey"), 16, tmp_path / "codec")


@pytest.mark.parametrize("path", ["/no/such/folder", "./no-such", "justaname", "a/b/c"])
def test_a_path_that_is_not_there(path: str) -> None:
    with pytest.raises(
        UserError, match="no such folder; give a local diffusers folder, or a hub id"
    ):
        codec.source(given("kl", path))


def test_a_hub_id_offline_says_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"cannot be had from the hub \(HF_HUB_OFFLINE is set\).*give a local"
    ) as caught:
        codec.fetch(given("tiny", "nobody-adversa/no-such-model"), 16, tmp_path / "codec")
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name, value in {
        "ENDPOINT": NOWHERE,
        "HUGGINGFACE_CO_URL_TEMPLATE": NOWHERE + "/{repo_id}/{revision}/{filename}",
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between its tries
    with pytest.raises(
        UserError,
        match=r"no such folder, and the hub cannot be reached .*; give a local diffusers folder$",
    ) as caught:
        codec.fetch(given("tiny", "nobody-adversa/no-such-model"), 16, tmp_path / "codec")
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_a_folder_that_holds_another_model_is_no_codec(tmp_path: Path) -> None:
    weights.save_model(tmp_path, {"a": torch.zeros(1)}, {"kind": "classifier"})
    with pytest.raises(UserError, match="kind 'classifier', not a codec"):
        codec.load(tmp_path)


def test_generation_in_latents_starts_from_the_encoded_case_and_is_decoded(tmp_path: Path) -> None:
    run(tmp_path / "codec", batches())
    loaded, case = codec.load(tmp_path / "codec"), pictures(1)
    meta = {"resolution": 4, "channels": 4, "classes": ["a"]}
    place = loaded.to_space(case)[0]

    def perfect(x: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x0 = place.expand_as(x).clone()
        x0[label == 1] = float("nan")
        return x0

    asked = [GenerationRequest("r", 0, "guided", "img2img", 0, "case", 0.5, 1.0, 1)]
    config = cfg.Generate(batch_size=4, steps=3)
    found = generate(
        perfect,
        asked,
        Sources({"case": case[0]}),
        config,
        meta,
        encode=loaded.to_space,
        decode=loaded.decode,
    )
    assert (
        np.array_equal(found[0].image, loaded.decode(place[None])[0])
        and found[0].finite
        and len(found) == 1
    )
    nan = generate(
        lambda x, s, y: x * float("nan"),
        asked,
        Sources({"case": case[0]}),
        config,
        meta,
        encode=loaded.to_space,
        decode=loaded.decode,
    )
    assert not nan[0].finite and not nan[0].image.any()


# ---- the fitted codec ----------------------------------------------------------------------------


class Killed(Exception):
    pass


def dying(feed: Iterator[dict[str, Any]], after: int) -> Iterator[dict[str, Any]]:
    for i, batch in enumerate(feed):
        if i == after:
            raise Killed
        yield batch


@pytest.mark.parametrize("amp", [True, False])
def test_a_fit_that_is_killed_ends_like_an_undisturbed_one(tmp_path: Path, amp: bool) -> None:
    config = TINY.model_copy(update={"amp": amp})
    select = {"select": lambda: [{"id": ["x"] * 3, "image": pictures(3, 99)}]}
    whole = run(tmp_path / "whole", batches(), config, **select)
    out, steps = tmp_path / "out", []
    for after, finished in ((5, 4), (1, 4), (2, 6)):
        with pytest.raises(Killed):
            run(
                out,
                dying(batches(resume_step(out)), after),
                config,
                committed=steps.append,
                **select,
            )
        assert resume_step(out) == finished
        torch.manual_seed(after)  # the global generator plays no part
    assert run(out, batches(resume_step(out)), config, committed=steps.append, **select) == whole
    assert steps == [2, 4, 6, 7]
    for name in ("model.safetensors", "config.json", "metrics.jsonl", "reconstructions.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_fitting_lowers_the_error_on_pictures_it_has_not_seen(tmp_path: Path) -> None:
    held = [{"id": ["x"] * 16, "image": pictures(16, 12345)}]
    config = TINY.model_copy(update={"halvings": 1})
    short = run(tmp_path / "a", batches(), config, select=lambda: held)
    longer = config.model_copy(update={"steps": 100, "batch_size": 8, "checkpoint_steps": 1000})
    far = run(tmp_path / "b", batches(0, 100, 8), longer, select=lambda: held)
    assert far["psnr"] > short["psnr"] + 5, (short["psnr"], far["psnr"])
    rows = [
        json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in rows] == [50, 100] and rows[-1]["loss"] == far["loss"] < rows[0][
        "loss"
    ]
    loaded = codec.load(tmp_path / "b")
    assert codec.psnr(
        held[0]["image"], loaded.decode(loaded.to_space(held[0]["image"]))
    ) == pytest.approx(far["psnr"], abs=1e-6)


@pytest.mark.parametrize("lr", [1e30])
def test_a_loss_that_is_not_finite_stops_naming_step_and_images(tmp_path: Path, lr: float) -> None:
    with pytest.raises(
        UserError, match=r"diverged at step [2-7]: .*codec.lr .*images: img[1-6]-0, img"
    ) as caught:
        run(tmp_path, batches(), TINY.model_copy(update={"lr": lr, "warmup": 0.0}))
    assert "\n" not in str(caught.value) and not (tmp_path / weights.MODEL).exists()


def test_a_weight_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    config = TINY.model_copy(
        update={"lr": 1e39, "warmup": 0.0, "steps": 1}
    )  # the loss is looked at before the only step
    with pytest.raises(
        UserError,
        match=r"step 1: a weight that is not finite; lower codec.lr .* img0-0, img0-1, img0-2, "
        r"img0-3$",
    ):
        run(tmp_path, batches(0, 1), config)
    assert not (tmp_path / weights.MODEL).exists() and not (tmp_path / weights.CHECKPOINT).exists()


def test_the_images_whose_loss_is_not_finite_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return losses(x, y) / torch.tensor([1.0, 1.0, 0.0, 1.0])

    monkeypatch.setattr(codec_fit, "losses", poisoned)
    with pytest.raises(
        UserError, match=r"at step 1: loss inf, .*; lower codec.lr .* images: img0-2$"
    ):
        run(tmp_path, batches())


@pytest.mark.parametrize(
    ("update", "more"),
    [({"lr": 1e-3}, {}), ({"latent_channels": 3}, {}), ({}, {"seed": 1})],
    ids=str,
)
def test_a_checkpoint_of_other_settings_is_refused(
    tmp_path: Path, update: dict[str, Any], more: dict[str, Any]
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, dying(batches(), 3))
    with pytest.raises(
        UserError, match=f"^{tmp_path} holds an unfinished training with other settings; delete"
    ) as caught:
        run(tmp_path, batches(2), TINY.model_copy(update=update), **more)
    assert "\n" not in str(caught.value) and resume_step(tmp_path) == 2
    assert run(tmp_path, batches(2), TINY.model_copy(update={"checkpoint_steps": 5}))["steps"] == 7


def test_the_loss_of_known_differences() -> None:
    x = torch.zeros(2, 3, 8, 8)
    y = x.clone()
    y[0] += 0.5  # a constant error: no difference between neighbours
    y[1, :, :, 4:] = (
        # a step: half the pixels err by 1; of 7 differences along a row one is 1, of 3 at half the
        # resolution one
        1.0
    )
    torch.testing.assert_close(losses(x, y), torch.tensor([0.5, 0.5 + 1 / 7 + 1 / 3]))


def test_symmetries_are_eight_and_those_of_the_feed_are_those_of_the_fit() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    all_ = [symmetry(image, v, 1, 2).copy() for v in range(8)]
    assert len({a.tobytes() for a in all_}) == 8 and np.array_equal(all_[0], image)
    g = torch.Generator().manual_seed(0)
    x = edm.to_tensor(np.repeat(image, 64, 0))
    views = torch.randint(0, 8, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    for row, v in zip(turned(x, 8, g, slice(0, 64), 64), views, strict=True):
        assert torch.equal(row, edm.to_tensor(all_[v])[0])
    assert torch.equal(turned(x, 1, g, slice(0, 64), 64), x)


def test_psnr() -> None:
    a = np.full((2, 4, 4, 3), 100, np.uint8)
    assert codec.psnr(a, a) == 100.0 and codec.psnr(a, a + 5) == pytest.approx(
        20 * np.log10(255 / 5)
    )
