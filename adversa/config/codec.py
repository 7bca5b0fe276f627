"""The space that is diffused."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    model_validator,
)

from adversa.config.base import AMP, Amp, Section, WeightPath


class Codec(Section):
    """The space that is diffused: pixels, or the latents of an autoencoder, computed once and kept
    in Parquet.
    """

    kind: Literal["pixels", "tiny", "kl"] = Field(
        "pixels", description="tiny: diffusers' AutoencoderTiny; kl: its AutoencoderKL"
    )
    path: WeightPath = Field(
        None,
        description="a local diffusers folder, or a hub id; null (tiny only): fitted on the run's "
        "own images",
    )
    views: Literal[1, 2, 4, 8] = Field(
        8,
        description="latents kept of so many symmetries of a training image: a latent cannot be "
        "turned; 1 without denoiser.flips",
    )
    width: int = Field(32, ge=8, multiple_of=8, description="fitted codec: channels of every level")
    halvings: int = Field(
        2,
        ge=1,
        le=5,
        description="fitted codec: levels below the full resolution; each halves the side",
    )
    blocks: int = Field(
        1, ge=1, description="fitted codec: residual blocks of a level below the full resolution"
    )
    latent_channels: int = Field(4, ge=1, description="fitted codec")
    steps: int = Field(2000, ge=1, description="fitted codec: optimizer steps")
    batch_size: int = Field(32, ge=1, description="fitted codec: images of an optimizer step")
    lr: float = Field(2e-3, gt=0, description="fitted codec: peak of AdamW's learning rate")
    warmup: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="fitted codec: share of the steps with a rising learning rate; cosine after it",
    )
    clip: float = Field(1.0, gt=0, description="fitted codec: largest norm of the gradient")
    amp: Amp = Field("auto", description=AMP)
    checkpoint_steps: int = Field(
        200, ge=1, description="fitted codec: training state is committed every so many steps"
    )

    @model_validator(mode="after")
    def _source(self) -> Codec:
        if self.kind == "kl" and self.path is None:
            raise ValueError(
                "kind kl needs a path (a local diffusers folder or a hub id); only tiny is "
                "fitted here"
            )
        if self.kind == "pixels" and self.path is not None:
            raise ValueError(
                f"path {self.path} is given, but kind is pixels; set codec.kind to tiny or kl"
            )
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether the run fits its own autoencoder."""
        return self.kind == "tiny" and self.path is None
