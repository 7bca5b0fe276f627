"""External denoisers against diffusers' own schedulers, on random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors.torch import save_file
from torch import Tensor

from adversa import config as cfg
from adversa.diffuse import external, generator
from adversa.diffuse.strategy import Sources
from adversa.types import GenerationRequest, UserError

CLASSES = ["a", "b", "c"]
SMALL = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


def unet(
    channels: int = 3, out: int | None = None, labels: int | None = 4, **more: Any
) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        in_channels=channels,
        out_channels=out or channels,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=labels,
        add_attention=False,
        **SMALL | more,
    )


def conditional(channels: int = 4, **more: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=8,
        **SMALL | more,
    )


def saved(
    folder: Path,
    model: Any,
    scheduler: Any,
    pipeline: bool = True,
    embeddings: Tensor | None = None,
) -> str:
    model.save_pretrained(folder / "unet" if pipeline else folder)
    scheduler.save_pretrained(folder / "scheduler" if pipeline else folder)
    if embeddings is not None:
        save_file({"embeddings": embeddings}, folder / external.EMBEDDINGS)
    return str(folder)


def change(path: Path, **keys: Any) -> None:
    path.write_text(
        json.dumps(
            {k: v for k, v in (json.loads(path.read_text()) | keys).items() if v != "ABSENT"}
        )
    )


SCHEDULES = [
    {"beta_schedule": "linear"},
    {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },  # Stable Diffusion
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("conditioned", [False, True], ids=["UNet2DModel", "UNet2DConditionModel"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(str(v) for v in s.values()))
@pytest.mark.parametrize("clip", [False, True])
def test_x0_and_step_are_those_of_diffusers_own_scheduler(
    tmp_path: Path, conditioned: bool, prediction: str, schedule: dict[str, Any], clip: bool
) -> None:
    """DDIM's step (of 50) in float64 around the same network, at integer timesteps.

    x0 to 1e-5 of the largest term: with epsilon sigma times the network's answer, whose last bits
    it multiplies. Where the step leads, to 1e-5 of the largest value there (about 3 but for the
    cosine's last steps); in our x = x0 + sigma n it is x' = x0 + sigma' / sigma (x - x0).
    """
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=clip, **schedule)
    embeddings = (
        torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(3)) if conditioned else None
    )
    model = conditional(3) if conditioned else unet()
    denoiser = external.read(saved(tmp_path, model, scheduler, embeddings=embeddings), 3)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(50)
    last = (
        998 if schedule.get("rescale_betas_zero_snr") else 999
    )  # at a terminal abar of 0 DDIM divides by 0
    g = torch.Generator().manual_seed(1)
    for t in (0, 1, 17, 500, 900, last):
        abar = scheduler.alphas_cumprod[t]
        x_vp = torch.randn(2, 3, 16, 16, generator=g, dtype=torch.float64)
        label = torch.tensor([1, 3])
        condition = (
            {"class_labels": label}
            if embeddings is None
            else {"encoder_hidden_states": embeddings[label]}
        )
        with torch.no_grad():
            # What the denoiser is given is rounded to float32; diffusers is given the same numbers.
            sigma = ((1 - abar) / abar).sqrt()
            x = (x_vp / abar.sqrt()).float()
            ours = denoiser(x, sigma.expand(2).float(), label)
            out = model.eval()(
                (x.double() * abar.sqrt()).float(), torch.tensor(t), **condition
            ).sample.double()
        step = scheduler.step(out, t, x.double() * abar.sqrt(), use_clipped_model_output=True)
        theirs = step.pred_original_sample
        scale = max(
            1.0, float(theirs.abs().max()), float(sigma) if prediction == "epsilon" else 1.0
        )
        assert float((ours - theirs).abs().max()) < 1e-5 * scale, (
            t,
            float((ours - theirs).abs().max()),
            scale,
        )
        after = (
            scheduler.alphas_cumprod[t - 20] if t >= 20 else torch.tensor(1.0, dtype=torch.float64)
        )
        led = after.sqrt() * (ours + ((1 - after) / after).sqrt() / sigma * (x.double() - ours))
        largest = max(1.0, float(step.prev_sample.abs().max()))
        apart = float((led - step.prev_sample).abs().max())
        assert apart < 1e-5 * largest, (t, apart, largest)


@pytest.mark.parametrize(
    ("scheduler", "clip"),
    [
        (DDPMScheduler, 1.0),
        (DDIMScheduler, 1.0),
        (HeunDiscreteScheduler, None),
        (PNDMScheduler, None),
    ],
)
def test_what_the_schedulers_file_leaves_out_is_as_its_class_has_it(
    tmp_path: Path, scheduler: Any, clip: float | None
) -> None:
    path = saved(tmp_path, unet(), scheduler())
    names = ("clip_sample", "clip_sample_range", "beta_start", "beta_end", "beta_schedule")
    change(tmp_path / "scheduler/scheduler_config.json", **dict.fromkeys(names, "ABSENT"))
    denoiser = external.read(path, 3)
    assert denoiser.clip == clip
    abar = scheduler().alphas_cumprod.double()
    torch.testing.assert_close(denoiser.log_sigmas, ((1 - abar) / abar).sqrt().log())


def test_x0_is_that_of_ddpm_with_a_learned_variance(tmp_path: Path) -> None:
    scheduler = DDPMScheduler(
        prediction_type="epsilon", variance_type="learned_range", clip_sample=False
    )
    model = unet(out=6)
    denoiser = external.read(saved(tmp_path, model, scheduler), 3)
    abar = float(scheduler.alphas_cumprod[300])
    x_vp, label = (
        torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0, 2]),
    )
    with torch.no_grad():
        ours = denoiser(x_vp / abar**0.5, torch.full((2,), ((1 - abar) / abar) ** 0.5), label)
        out = model.eval()(x_vp, torch.tensor(300), label).sample
    theirs = scheduler.step(
        out, 300, x_vp, generator=torch.Generator().manual_seed(0)
    ).pred_original_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_euler_steps_are_the_solvers_ode(tmp_path: Path) -> None:
    """Diffusers' EulerDiscreteScheduler works in x = x0 + sigma n as we do: its whole trajectory,
    embeddings and all.
    """
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    model, embeddings = conditional(), torch.randn(4, 5, 12)
    denoiser = external.read(saved(tmp_path, model, scheduler, embeddings=embeddings), 3)
    scheduler.set_timesteps(8)
    g = torch.Generator().manual_seed(1)
    x = theirs = torch.randn(2, 4, 16, 16, generator=g) * scheduler.sigmas[0]
    label = torch.tensor([2, 3])
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            out = model.eval()(scheduler.scale_model_input(theirs, t), t, embeddings[label]).sample
            theirs = scheduler.step(out, t, theirs).prev_sample
            now, after = scheduler.sigmas[i], scheduler.sigmas[i + 1]
            x = x + (after - now) * (x - denoiser(x, now.expand(2), label)) / now
    torch.testing.assert_close(x, theirs, rtol=1e-4, atol=1e-4)


def test_a_timestep_between_two_is_linear_in_log_sigma_and_beyond_the_table_is_its_end(
    tmp_path: Path,
) -> None:
    scheduler = PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    model = unet()
    denoiser = external.read(saved(tmp_path, model, scheduler, pipeline=False), 3)
    table = denoiser.log_sigmas.exp()
    assert len(table) == 1000 and float(table[-1]) == pytest.approx(14.6, rel=0.01)
    asked = torch.stack(
        [table[0] / 3, table[7], (table[7] * table[8]).sqrt(), table[999], table[999] * 5]
    )
    s, t = denoiser.timestep(asked)
    np.testing.assert_allclose(t, [0, 7, 7.5, 999, 999], atol=1e-6)
    np.testing.assert_allclose(s / asked, [3, 1, 1, 1, 0.2], rtol=1e-6)
    # Five times the largest sigma: the network's answer for an input of the same variance at the
    # largest.
    x, label = (
        70 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0, 1]),
    )
    top = table[-1].expand(2).float()
    with torch.no_grad():
        above = denoiser(x, 5 * top, label)
        at = denoiser(x * ((1 + top**2) / (1 + 25 * top**2)).sqrt().view(-1, 1, 1, 1), top, label)
    torch.testing.assert_close(above, at, rtol=1e-5, atol=1e-3)
    assert (
        float(above.abs().max()) < 100
    )  # with the true sigma the network's error would be five times as large


def test_a_denoiser_for_known_data_is_the_closed_form(tmp_path: Path) -> None:
    """For data N(0, s^2) the best epsilon is known at every t; through ExternalDenoiser it must be
    the best denoiser at any sigma.
    """
    denoiser = external.read(saved(tmp_path, unet(), DDPMScheduler(clip_sample=False)), 3)
    s, seen = 0.5, []

    def best(
        x: Tensor, t: Tensor, label: Tensor
    ) -> Tensor:  # E[n | x_vp], x_vp of variance abar s^2 + 1 - abar
        seen.append(t)
        level = torch.from_numpy(
            np.interp(t.numpy(), np.arange(1000), denoiser.log_sigmas.numpy())
        ).exp()
        abar = 1 / (1 + level**2)
        return x * ((1 - abar).sqrt() / (abar * s**2 + 1 - abar)).view(-1, 1, 1, 1).float()

    denoiser._network = best  # type: ignore[method-assign]
    sigma = torch.tensor([0.02, 0.3, 1.7, 20.0, 120.0])
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * (
        s**2 + sigma**2
    ).sqrt().view(-1, 1, 1, 1)
    found = denoiser(x, sigma, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(
        found, (s**2 / (s**2 + sigma**2)).view(-1, 1, 1, 1) * x, rtol=1e-3, atol=1e-3
    )


def test_labels_choose_the_embedding(tmp_path: Path) -> None:
    embeddings = torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(3))
    path = saved(tmp_path, conditional(), DDPMScheduler(clip_sample=False), embeddings=embeddings)
    denoiser = external.read(path, 3)
    assert denoiser.has_null
    x, sigma = torch.randn(1, 4, 16, 16), torch.ones(1)
    answers = [denoiser(x, sigma, torch.tensor([k])) for k in range(4)]
    assert all(not torch.equal(answers[i], answers[j]) for i in range(4) for j in range(i))
    assert not external.read(path, 4).has_null  # four classes and none of them the null class


def reference(tmp_path: Path, path: str) -> Path:
    out = tmp_path / "denoiser"
    out.mkdir()
    model = external.read(path, 3)
    (out / "config.json").write_text(json.dumps(external.describe(model, path, CLASSES, 16, 3)))
    return out


def test_generated_through_a_folder_that_stands_for_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "theirs", unet(), DDPMScheduler(clip_sample=False))
    loaded = generator.load(reference(tmp_path, path))
    config = cfg.Generate(batch_size=2, steps=3)
    asked = [
        GenerationRequest(f"r{i}", 0, "guided", "sample", i, None, 40.0, g, i)
        for i, g in enumerate((2.0, 1.0))
    ]
    found = loaded.generate(asked, Sources(), config)
    assert all(p.finite and p.image.shape == (16, 16, 3) for p in found) and loaded.codec is None
    assert not np.array_equal(
        found[0].image,
        loaded.generate([replace(asked[0], guidance=1.0)], Sources(), config)[0].image,
    )


def test_weights_that_changed_are_refused_and_change_the_fingerprint(tmp_path: Path) -> None:
    path = saved(tmp_path / "theirs", unet(), DDPMScheduler())
    out, before = reference(tmp_path, path), external.fingerprint(path)
    change(tmp_path / "theirs/scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert external.fingerprint(path) != before
    with pytest.raises(UserError, match="has changed since"):
        generator.load(out)


def test_no_null_class_no_guidance(tmp_path: Path) -> None:
    path = saved(tmp_path / "theirs", unet(labels=3), DDPMScheduler())
    denoiser = external.read(path, 3)
    external.check(denoiser, path, 3, 16, 1.0)
    with pytest.raises(UserError, match="no null class.*generate.guidance=1"):
        external.check(denoiser, path, 3, 16, 2.0)
    loaded = generator.load(reference(tmp_path, path))
    request = GenerationRequest("r", 0, "guided", "sample", 0, None, 40.0, 2.0, 1)
    with pytest.raises(UserError, match="no null class"):
        loaded.generate([request], Sources(), cfg.Generate(batch_size=2, steps=2))
    with pytest.raises(UserError, match="no null class"):  # its length is measured in guidance
        loaded.generate(
            [replace(request, guidance=1.0, classifier_guidance=0.5)],
            Sources(),
            cfg.Generate(batch_size=2, steps=2),
        )


@pytest.mark.parametrize(
    ("channels", "side", "text"), [(4, 16, "has 3 channels"), (3, 15, "data.resolution")]
)
def test_a_space_that_does_not_fit(tmp_path: Path, channels: int, side: int, text: str) -> None:
    path = saved(tmp_path, unet(), DDPMScheduler())
    with pytest.raises(UserError, match=text):
        external.check(external.read(path, 3), path, channels, side, 1.0)


def no_folder(p: Path) -> None:
    p.rename(p.with_name("gone"))


def no_weights(p: Path) -> None:
    (p / "unet/diffusion_pytorch_model.safetensors").unlink()


def damaged_weights(p: Path) -> None:
    (p / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"damaged")


def other_widths(p: Path) -> None:
    change(p / "unet/config.json", block_out_channels=[8, 32])


def other_class(p: Path) -> None:
    change(p / "unet/config.json", _class_name="UNet1DModel")


def no_scheduler(p: Path) -> None:
    (p / "scheduler/scheduler_config.json").unlink()


def not_json(p: Path) -> None:
    (p / "scheduler/scheduler_config.json").write_text("{")


def flow(p: Path) -> None:
    change(p / "scheduler/scheduler_config.json", prediction_type="flow_prediction")


def no_object(p: Path) -> None:
    (p / "scheduler/scheduler_config.json").write_text("[]")


def unet_no_object(p: Path) -> None:
    (p / "unet/config.json").write_text("[]")


def no_betas(p: Path) -> None:
    FlowMatchEulerDiscreteScheduler().save_pretrained(p / "scheduler")


def unknown_class(p: Path) -> None:
    change(p / "scheduler/scheduler_config.json", _class_name="OwnScheduler", clip_sample="ABSENT")


def unknown_betas(p: Path) -> None:
    change(p / "scheduler/scheduler_config.json", beta_schedule="cubic")


def thresholding(p: Path) -> None:
    change(p / "scheduler/scheduler_config.json", thresholding=True)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (no_folder, "no such folder"),
        (no_weights, "lacks diffusion_pytorch"),
        (damaged_weights, "cannot be read"),
        (other_widths, "cannot be read|lack or misfit"),
        (other_class, "is of class UNet1DModel"),
        (no_scheduler, "lacks scheduler_config"),
        (not_json, "not valid JSON"),
        (no_object, "holds a list, not an object"),
        (unet_no_object, "its config.json holds a list"),
        (unknown_class, "OwnScheduler, unknown to diffusers.*clip_sample"),
        (flow, "predicts flow_prediction"),
        (no_betas, "without betas"),
        (unknown_betas, "cubic"),
        (thresholding, "dynamic thresholding"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, spoil: Any, text: str
) -> None:
    path = saved(tmp_path / "model", unet(), DDPMScheduler())
    spoil(tmp_path / "model")
    with pytest.raises(UserError, match=text) as caught:
        external.read(path, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: unet(labels=None), "no class labels"),
        (lambda: unet(labels=1000), "has 1000 class labels"),
        (lambda: unet(channels=9, out=4), "maps 9 channels to 4"),
        (lambda: unet(time_embedding_type="fourier"), "fourier"),
        (lambda: conditional(addition_embed_type="text"), "asks for addition_embed_type"),
    ],
)
def test_a_model_of_another_kind_is_refused(tmp_path: Path, model: Any, text: str) -> None:
    path = saved(tmp_path, model(), DDPMScheduler(), embeddings=torch.randn(4, 5, 12))
    with pytest.raises(UserError, match=text):
        external.read(path, 3)


@pytest.mark.parametrize("shape", [(4, 12), (4, 5, 13), (6, 5, 12)])
def test_class_embeddings_of_a_wrong_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = saved(tmp_path, conditional(), DDPMScheduler(), embeddings=torch.zeros(shape))
    with pytest.raises(UserError, match="must be one finite tensor|has 6 class labels"):
        external.read(path, 3)


def test_class_embeddings_are_needed(tmp_path: Path) -> None:
    path = saved(tmp_path, conditional(), DDPMScheduler())
    with pytest.raises(UserError, match="class_embeddings.safetensors cannot be read"):
        external.read(path, 3)
