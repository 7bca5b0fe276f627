"""The classifier and its augmentation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    model_validator,
)

from adversa.config.base import AMP, Amp, Section, WeightPath


class Augment(Section):
    """Batched augmentation of the classifier's training images; a strength of 0 turns one kind
    off.
    """

    flips: bool = Field(True, description="mirror images and quarter turns: a lesion has no up")
    rotate: float = Field(20.0, ge=0, le=180, description="degrees, uniform in +-; 180: any angle")
    zoom: float = Field(0.15, ge=0, lt=1, description="log of the scale, uniform in +-")
    shift: float = Field(0.06, ge=0, lt=1, description="of the side, uniform in +-, each way")
    brightness: float = Field(0.15, ge=0, lt=1, description="factor, uniform in 1 +-")
    contrast: float = Field(
        0.2, ge=0, lt=1, description="about the image's mean, factor uniform in 1 +-"
    )
    saturation: float = Field(
        0.2, ge=0, lt=1, description="about the pixel's grey, factor uniform in 1 +-"
    )
    tint: float = Field(
        0.04,
        ge=0,
        lt=1,
        description="gain of each channel, uniform in 1 +-: dermatoscopes differ in white balance",
    )
    erase: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability that a random rectangle is erased (Zhong et al. 2020)",
    )


class Classifier(Section):
    """The classifier that every arm trains."""

    model: str = Field("resnet10t", description="a timm model by name")
    model_args: dict[str, Any] = Field(
        {"channels": [32, 64, 128, 256]},
        description="passed on to timm.create_model; {} when only `model` is given",
    )
    weights: WeightPath = Field(
        None, description="imagenet (from the hub), a local safetensors file, or null: from scratch"
    )
    input_size: int | None = Field(
        None,
        ge=16,
        le=1024,
        description="images are resized to this before the model; null: as they are",
    )
    first_size: int | None = Field(
        None,
        ge=16,
        le=1024,
        description="progressive resizing: training images grow from this side to input_size, or "
        "data.resolution; null: off",
    )
    steps: int = Field(600, ge=1, description="optimizer steps; the same in every arm")
    batch_size: int = Field(64, ge=2, description="images of an optimizer step")
    lr: float = Field(2e-3, gt=0, description="peak of AdamW's learning rate")
    weight_decay: float = Field(0.05, ge=0, description="of AdamW")
    warmup: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of the steps with a rising learning rate; cosine after it",
    )
    ema: float = Field(0.99, ge=0, lt=1, description="decay of the weights' moving average; 0: off")
    balance: float = Field(
        0.7, ge=0, le=1, description="0: images drawn as they come; 1: every class equally often"
    )
    label_smoothing: float = Field(
        0.05, ge=0, lt=1, description="probability taken from the label and spread over all classes"
    )
    loss: Literal["cross_entropy", "logit_adjusted", "effective_number"] = Field(
        "cross_entropy",
        description="logit_adjusted: Menon et al. 2021; effective_number: Cui et al. 2019",
    )
    adjust: float = Field(
        1.0,
        gt=0,
        description="logit_adjusted: tau, the power of the class prior that is added to the logits",
    )
    effective_beta: float = Field(
        0.999, ge=0, lt=1, description="effective_number: beta; 0: every class the same weight"
    )
    mixup: float = Field(
        0.0, ge=0, description="alpha of mixup's Beta(alpha, alpha) (Zhang et al. 2018); 0: off"
    )
    cutmix: float = Field(
        0.0, ge=0, description="alpha of CutMix's Beta(alpha, alpha) (Yun et al. 2019); 0: off"
    )
    augment: Augment | None = Field(Augment(), description="null: none")
    head_steps: int = Field(
        0, ge=0, description="the first so many steps train the head alone, on a frozen trunk"
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="each group of layers below the head learns at this times the rate of the one "
        "above",
    )
    freeze_norm: bool = Field(
        False, description="BatchNorm keeps the statistics of the pretrained weights"
    )
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    amp: Amp = Field("auto", description=AMP)
    views: Literal[1, 2, 4, 8] = Field(
        1, description="scoring averages the logits over so many symmetries of the square"
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after so many evaluations without a better one; null: all steps, which "
        "matched arms need",
    )
    evaluations: int = Field(
        5, ge=1, description="how often `select` is scored to choose the checkpoint"
    )
    checkpoint_steps: int = Field(
        100, ge=1, description="training state is committed every so many steps"
    )

    @model_validator(mode="before")
    @classmethod
    def _other_model(cls, data: Any) -> Any:
        """Another model, and no arguments given for it: none, for the default ones are the default
        model's.
        """
        default = cls.model_fields["model"].default
        if isinstance(data, dict) and data.get("model", default) != default:
            return {"model_args": {}, **data}
        return data
