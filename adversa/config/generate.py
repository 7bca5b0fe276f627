"""What is generated from each hard case, and how it is sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    model_validator,
)

from adversa.config.base import AMP, Amp, Section, WeightPath


class Generate(Section):
    """What is generated from each hard case, and how it is sampled."""

    strategy: Literal["sample", "img2img", "inpaint", "outpaint", "inout", "interpolate"] = Field(
        "img2img", description="of the guided arm; the unguided one always samples"
    )
    per_case: int = Field(6, ge=1, le=1000, description="images for each hard case")
    sigma_start: float = Field(
        2.0,
        gt=0,
        description="img2img, interpolate: noise put on the hard case, images scaled to [-1, 1]",
    )
    adaptive: bool = Field(
        False,
        description="img2img: for each hard case the largest of `levels` at which the verifier "
        "still sees the label, else the least",
    )
    levels: list[float] = Field(
        [0.5, 1.0, 2.0, 4.0, 8.0], min_length=1, description="adaptive: noise levels that are tried"
    )
    adaptive_agreement: float = Field(
        0.5, gt=0, lt=1, description="adaptive: probability the verifier must give the label"
    )
    fill_sigma: float = Field(
        4.0,
        gt=0,
        description="inpaint, outpaint, inout: noise to start from; more keeps less of the old "
        "colours, sigma_max none",
    )
    margin: float = Field(
        0.06,
        ge=0,
        le=0.5,
        description="inpaint, outpaint: the lesion's mask is grown by this share of the side",
    )
    feather: float = Field(
        0.06,
        ge=0,
        le=0.5,
        description="inpaint, outpaint: width of the blended seam, a share of the side",
    )
    guidance: float = Field(2.0, ge=0, description="classifier-free scale; 1: none")
    guidance_low: float = Field(
        0.2, ge=0, description="guidance acts at noise levels above this only"
    )
    guidance_high: float = Field(
        10.0, gt=0, description="and below this (Kynkaanniemi et al. 2024)"
    )
    weak: WeightPath = Field(
        None,
        description="folder of an under-trained denoiser that guidance steers away from, not the "
        "null class (Karras et al. 2024)",
    )
    classifier_guidance: float = Field(
        0.0,
        ge=0,
        description="guided arm: push towards what the target classifier finds hard, in "
        "classifier-free corrections",
    )
    classifier_guidance_objective: Literal["loss", "entropy", "margin"] = Field(
        "margin", description="what is pushed up"
    )
    classifier_guidance_every: int = Field(4, ge=1, description="a push every so many evaluations")
    classifier_guidance_low: float = Field(
        0.2,
        ge=0,
        description="classifier and reference guidance act at noise levels above this only",
    )
    classifier_guidance_high: float = Field(5.0, gt=0, description="and up to this")
    reference_guidance: float = Field(
        0.0,
        ge=0,
        description="guided arm: pull towards the hard case; pixels: 1 takes its low frequencies",
    )
    reference_guidance_space: Literal["pixels", "features"] = Field(
        "pixels", description="features: of the target classifier"
    )
    reference_guidance_factor: int = Field(
        4,
        ge=2,
        description="pixels: low frequencies are means over so many pixels of the diffused side",
    )
    solver: Literal["dpmpp_2m", "heun"] = Field(
        "dpmpp_2m",
        description="DPM-Solver++(2M) (Lu et al. 2022), or Heun's method (Karras et al. 2022)",
    )
    steps: int = Field(
        16, ge=2, le=1000, description="from sigma_max; a start below it takes its share of them"
    )
    sigma_min: float = Field(
        0.02, gt=0, description="noise level at which sampling ends, images scaled to [-1, 1]"
    )
    sigma_max: float = Field(
        40.0, gt=0, description="noise level at which sampling from noise starts"
    )
    rho: float = Field(
        7.0,
        gt=0,
        allow_inf_nan=True,
        description="Karras et al. 2022, equation 5; .inf: evenly spaced in the logarithm",
    )
    batch_size: int = Field(
        64,
        ge=2,
        description="evaluations of the denoiser at a time; the same size gives the same images",
    )
    part_size: int = Field(
        256, ge=1, description="images a part: what one worker does at a time, and a kill may lose"
    )
    amp: Amp = Field("auto", description=AMP)
    compile: bool = Field(
        False,
        description="torch.compile of the denoiser: half a minute at each sampler's start, then up "
        "to twice as fast",
    )

    @model_validator(mode="after")
    def _order(self) -> Generate:
        if not self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min {self.sigma_min:g} must be below sigma_max {self.sigma_max:g}"
            )
        starts = [("sigma_start", self.sigma_start), ("fill_sigma", self.fill_sigma)]
        for name, start in starts + [("levels", level) for level in self.levels]:
            if not self.sigma_min < start <= self.sigma_max:
                raise ValueError(
                    f"{name} {start:g} must lie in (sigma_min, sigma_max] = "
                    f"({self.sigma_min:g}, {self.sigma_max:g}]"
                )
        if self.adaptive and self.strategy != "img2img":
            raise ValueError(
                f"adaptive is for strategy img2img, not {self.strategy}; set adaptive to false"
            )
        if self.batch_size % 2:
            raise ValueError(
                f"batch_size {self.batch_size} must be even: a guided image takes two "
                "evaluations at a time"
            )
        return self
