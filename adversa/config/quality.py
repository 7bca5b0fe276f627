"""How the generator is judged."""

from __future__ import annotations

from pydantic import (
    Field,
    model_validator,
)

from adversa.config.base import Section, WeightPath


class Quality(Section):
    """How good the denoiser's samples are: distances between features of samples and of held-out
    real images.
    """

    features: WeightPath = Field(
        None,
        description="whose embedding: a timm model with `weights` below, or a trained classifier's "
        "folder; null: the classifier's "
        "pretrained weights as they were given, or the run's own classifier of arm real "
        "where it starts from scratch",
    )
    weights: WeightPath = Field(
        None,
        description="imagenet or a local safetensors file, where `features` names a timm model",
    )
    images: int = Field(
        2000, ge=20, description="samples drawn, classes in the proportions of the real images"
    )
    guidance: float = Field(
        1.0,
        ge=0,
        description="classifier-free scale of the samples; 1: none, what the denoiser learned",
    )
    neighbours: int = Field(
        5, ge=1, description="k of precision, recall, density and coverage (Naeem et al. 2020)"
    )
    subsets: int = Field(100, ge=2, description="KID: random subsets (Binkowski et al. 2018)")
    subset_size: int = Field(500, ge=2, description="KID: images a subset, at most the smaller set")

    @model_validator(mode="after")
    def _whose(self) -> Quality:
        if self.weights is not None and self.features is None:
            raise ValueError(
                f"weights {self.weights} of what? name a timm model in quality.features"
            )
        return self
