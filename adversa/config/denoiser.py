"""The diffusion model."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
)

from adversa.config.base import AMP, Amp, Section, WeightPath


class Denoiser(Section):
    """The diffusion model that generates images."""

    architecture: Literal["unet", "transformer"] = Field(
        "transformer", description="diffusers' UNet2DModel, or a transformer over patches"
    )
    channels: list[int] = Field([64, 80, 80], min_length=1, description="unet: width of each level")
    layers: int = Field(1, ge=1, description="unet: residual blocks a level")
    attention: bool = Field(False, description="unet: self-attention at the coarsest level")
    width: int = Field(256, ge=16, multiple_of=16, description="transformer: of a token")
    depth: int = Field(5, ge=1, description="transformer: blocks")
    external: WeightPath = Field(
        None,
        description="a local diffusers folder: an epsilon- or v-prediction UNet and its scheduler; "
        "nothing is trained then",
    )
    patch: int = Field(
        4,
        ge=1,
        le=8,
        description="pixels folded into channels first (space to depth); a token of the "
        "transformer: an eighth of the side",
    )
    weights: WeightPath = Field(
        None,
        description="a denoiser's folder to start from, phantom (shipped), or null: from scratch",
    )
    steps: int = Field(2000, ge=0, description="optimizer steps; 0: the weights as they were given")
    batch_size: int = Field(64, ge=1, description="images of an optimizer step")
    lr: float = Field(1e-3, gt=0, description="peak of AdamW's learning rate")
    warmup: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of the steps with a rising learning rate; cosine after it",
    )
    ema: float = Field(
        0.995,
        ge=0,
        lt=1,
        description="decay of the weights' moving average; not used where ema_width is given",
    )
    ema_width: float | None = Field(
        None,
        gt=0,
        lt=0.29,
        description="relative width of a power-function average (Karras et al. 2024, equation 123 "
        "and algorithm 2)",
    )
    loss: Literal["edm", "min_snr", "uncertainty"] = Field(
        "edm",
        description="weight of a noise level: 1/c_out^2; min-SNR (Hang et al. 2023); learned "
        "(Karras et al. 2024, eq. 15)",
    )
    min_snr: float = Field(5.0, gt=0, description="min_snr: gamma")
    sigma_data: float = Field(
        0.5, gt=0, description="EDM: standard deviation of the data, scaled to [-1, 1]"
    )
    p_mean: float = Field(-0.8, description="EDM: mean of ln sigma in training")
    p_std: float = Field(1.2, gt=0, description="EDM: standard deviation of ln sigma in training")
    null_probability: float = Field(
        0.15, ge=0, lt=1, description="share of labels replaced by the null class"
    )
    balance: float = Field(
        0.5, ge=0, le=1, description="0: images drawn as they come; 1: every class equally often"
    )
    flips: bool = Field(True, description="mirror images and quarter turns: a lesion has no up")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    amp: Amp = Field("auto", description=AMP)
    compile: bool = Field(
        False, description="torch.compile: minutes at the start, faster after; for GPUs"
    )
    sample_steps: int = Field(
        0, ge=0, description="a grid of samples every so many steps; 0: only at the end"
    )
    checkpoint_steps: int = Field(
        200, ge=1, description="training state is committed every so many steps"
    )
