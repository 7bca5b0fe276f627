"""What a user may set. Pydantic at this border only: inside, each component is given its own section, never the whole.

A default lives here and nowhere else. An unknown key stops the run and names the nearest valid one.
"""

from __future__ import annotations

import difflib
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from adversa.texts import load_yaml, shortened, unsigned
from adversa.types import PAINTED, UserError


def _local(value: str | None) -> str | None:
    if value is not None and "://" in value:
        raise ValueError("must be a path: images are read from file systems, not from object stores")
    return value


WeightPath = Annotated[str | None, AfterValidator(lambda v: os.path.expanduser(v) if v else v)]
Tracker = Literal["tensorboard", "mlflow", "wandb"]
Trackers = Annotated[list[Tracker], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
AUTO = "auto"


def _ratio(value: Any) -> float | str:
    """One fault in words, where pydantic would tell what each side of the union has against a value."""
    try:
        number = None if isinstance(value, bool | bytes) else float(value)  # YAML reads 1e-3 as text
    except (TypeError, ValueError, OverflowError):
        number = None
    if value == AUTO:
        return AUTO
    if number is None or not math.isfinite(number) or number < 0:
        raise ValueError("must be a finite number of at least 0, or auto")
    return number


def _ratios(values: list[float]) -> list[float]:
    if len(set(values)) != len(values):
        raise ValueError("names a ratio twice")
    if 0 not in values or len(values) < 2:
        raise ValueError("must hold 0, which asks whether images help at all, and at least one other ratio")
    return sorted(abs(v) for v in values)  # -0 is 0


Ratios = Annotated[list[Annotated[float, Field(ge=0)]], AfterValidator(_ratios)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Phantom(Section):
    """The built-in procedural pictures (source: phantom)."""

    images: int = Field(1600, ge=50, description="number of pictures")
    seed: int = Field(0, ge=0, description="seed of the pictures; the run's own seed does not change them")
    tail: float = Field(0.55, gt=0, le=1, description="each class has this share of the one before it")
    rare: float = Field(0.25, ge=0, le=1, description="share of the planted atypical sub-mode within its class")
    images_per_lesion: float = Field(1.5, ge=1, le=10, description="mean number of pictures of one lesion")


class Columns(Section):
    """Names of columns of the metadata table (source: csv). Every other column becomes an attribute."""

    path: str = "path"
    label: str = "label"
    group: str | None = Field("group", description="lesion; null: every image is its own group")
    patient: str | None = Field(None, description="carried along; the split keeps lesions apart, not patients")
    mask: str | None = Field(None, description="path of a lesion mask")
    id: str | None = Field(None, description="an id of the user's own; must be unique")


class Split(Section):
    """Shares of the groups by role, within each class."""

    train: float = Field(0.55, gt=0, lt=1)
    mine: float = Field(0.15, gt=0, lt=1)
    select: float = Field(0.15, gt=0, lt=1)
    test: float = Field(0.15, gt=0, lt=1)
    seed: int = Field(0, ge=0, description="seed of the split; the run's own seed does not change it")

    @model_validator(mode="after")
    def _sum(self) -> Split:
        total = self.train + self.mine + self.select + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + mine + select + test is {total:g}; make the four shares add up to 1")
        return self


class Data(Section):
    source: Literal["phantom", "ham10000", "csv", "folder"] = "phantom"
    path: Annotated[str | None, AfterValidator(_local)] = Field(None, description="folder, .zip or .csv; not used by phantom")
    resolution: int = Field(32, ge=16, le=1024, multiple_of=8, description="side of the square images, in pixels")
    crop: Literal["center", "pad", "squash"] = Field(
        "center", description="how a picture becomes square: central square, black bars, or changed proportions"
    )
    on_error: Literal["fail", "skip"] = Field("fail", description="a picture that cannot be read: stop, or skip and count")
    max_pixels: int = Field(100_000_000, ge=1, description="a larger picture is refused as a decompression bomb")
    phantom: Phantom = Phantom()
    columns: Columns = Columns()
    labels: list[str] | None = Field(None, description="the classes, in order; null: those found, sorted by name")
    group_regex: str | None = Field(None, description="folder source: first capture group, searched in the path, is the group")
    grouped: bool = Field(True, description="false ignores lesions in the split; for showing the leak, never for results")
    near_duplicate_bits: int = Field(
        8,
        ge=-1,
        le=16,
        description="look-alikes whose 64-bit perceptual hashes differ in at most so many bits are one group; -1: off",
    )
    split: Split = Split()
    part_rows: int = Field(512, ge=1, description="images a Parquet part")


class Augment(Section):
    """Batched augmentation of the classifier's training images; a strength of 0 turns one kind off."""

    flips: bool = Field(True, description="mirror images and quarter turns: a lesion has no up")
    rotate: float = Field(20.0, ge=0, le=180, description="degrees, uniform in +-; 180: any angle")
    zoom: float = Field(0.15, ge=0, lt=1, description="log of the scale, uniform in +-")
    shift: float = Field(0.06, ge=0, lt=1, description="of the side, uniform in +-, each way")
    brightness: float = Field(0.15, ge=0, lt=1, description="factor, uniform in 1 +-")
    contrast: float = Field(0.2, ge=0, lt=1, description="about the image's mean, factor uniform in 1 +-")
    saturation: float = Field(0.2, ge=0, lt=1, description="about the pixel's grey, factor uniform in 1 +-")
    tint: float = Field(
        0.04, ge=0, lt=1, description="gain of each channel, uniform in 1 +-: dermatoscopes differ in white balance"
    )
    erase: float = Field(0.0, ge=0, le=1, description="probability that a random rectangle is erased (Zhong et al. 2020)")


class Classifier(Section):
    model: str = Field("resnet10t", description="a timm model by name")
    model_args: dict[str, Any] = Field(
        {"channels": [32, 64, 128, 256]}, description="passed on to timm.create_model; {} when only `model` is given"
    )
    weights: WeightPath = Field(None, description="imagenet (from the hub), a local safetensors file, or null: from scratch")
    input_size: int | None = Field(
        None, ge=16, le=1024, description="images are resized to this before the model; null: as they are"
    )
    first_size: int | None = Field(
        None,
        ge=16,
        le=1024,
        description="progressive resizing: training images grow from this side to input_size, or data.resolution; null: off",
    )
    steps: int = Field(600, ge=1, description="optimizer steps; the same in every arm")
    batch_size: int = Field(64, ge=2)
    lr: float = Field(2e-3, gt=0, description="peak of AdamW's learning rate")
    weight_decay: float = Field(0.05, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with a rising learning rate; cosine after it")
    ema: float = Field(0.99, ge=0, lt=1, description="decay of the weights' moving average; 0: off")
    balance: float = Field(0.7, ge=0, le=1, description="0: images drawn as they come; 1: every class equally often")
    label_smoothing: float = Field(0.05, ge=0, lt=1)
    loss: Literal["cross_entropy", "logit_adjusted", "effective_number"] = Field(
        "cross_entropy", description="logit_adjusted: Menon et al. 2021; effective_number: Cui et al. 2019"
    )
    adjust: float = Field(1.0, gt=0, description="logit_adjusted: tau, the power of the class prior that is added to the logits")
    effective_beta: float = Field(0.999, ge=0, lt=1, description="effective_number: beta; 0: every class the same weight")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup's Beta(alpha, alpha) (Zhang et al. 2018); 0: off")
    cutmix: float = Field(0.0, ge=0, description="alpha of CutMix's Beta(alpha, alpha) (Yun et al. 2019); 0: off")
    augment: Augment | None = Field(Augment(), description="null: none")
    head_steps: int = Field(0, ge=0, description="the first so many steps train the head alone, on a frozen trunk")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="each group of layers below the head learns at this times the rate of the one above"
    )
    freeze_norm: bool = Field(False, description="BatchNorm keeps the statistics of the pretrained weights")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    amp: bool = Field(True, description="bf16 autocast")
    views: Literal[1, 2, 4, 8] = Field(1, description="scoring averages the logits over so many symmetries of the square")
    patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations without a better one; null: all steps, which matched arms need"
    )
    evaluations: int = Field(5, ge=1, description="how often `select` is scored to choose the checkpoint")
    checkpoint_steps: int = Field(100, ge=1, description="training state is committed every so many steps")

    @model_validator(mode="before")
    @classmethod
    def _other_model(cls, data: Any) -> Any:
        """Another model, and no arguments given for it: none, for the default ones are the default model's."""
        default = cls.model_fields["model"].default
        if isinstance(data, dict) and data.get("model", default) != default:
            return {"model_args": {}, **data}
        return data


class Codec(Section):
    """The space that is diffused: pixels, or the latents of an autoencoder, computed once and kept in Parquet."""

    kind: Literal["pixels", "tiny", "kl"] = Field("pixels", description="tiny: diffusers' AutoencoderTiny; kl: its AutoencoderKL")
    path: WeightPath = Field(
        None, description="a local diffusers folder, or a hub id; null (tiny only): fitted on the run's own images"
    )
    views: Literal[1, 2, 4, 8] = Field(
        8,
        description="latents kept of so many symmetries of a training image: a latent cannot be turned; 1 without denoiser.flips",
    )
    width: int = Field(32, ge=8, multiple_of=8, description="fitted codec: channels of every level")
    halvings: int = Field(2, ge=1, le=5, description="fitted codec: levels below the full resolution; each halves the side")
    blocks: int = Field(1, ge=1, description="fitted codec: residual blocks of a level below the full resolution")
    latent_channels: int = Field(4, ge=1, description="fitted codec")
    steps: int = Field(2000, ge=1, description="fitted codec: optimizer steps")
    batch_size: int = Field(32, ge=1)
    lr: float = Field(2e-3, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    clip: float = Field(1.0, gt=0)
    amp: bool = Field(True, description="bf16 autocast")
    checkpoint_steps: int = Field(200, ge=1)

    @model_validator(mode="after")
    def _source(self) -> Codec:
        if self.kind == "kl" and self.path is None:
            raise ValueError("kind kl needs a path (a local diffusers folder or a hub id); only tiny is fitted here")
        if self.kind == "pixels" and self.path is not None:
            raise ValueError(f"path {self.path} is given, but kind is pixels; set codec.kind to tiny or kl")
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether the run fits its own autoencoder."""
        return self.kind == "tiny" and self.path is None


class Denoiser(Section):
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
        description="a local diffusers folder: an epsilon- or v-prediction UNet and its scheduler; nothing is trained then",
    )
    patch: int = Field(
        4,
        ge=1,
        le=8,
        description="pixels folded into channels first (space to depth); a token of the transformer: an eighth of the side",
    )
    weights: WeightPath = Field(None, description="a denoiser's folder to start from, phantom (shipped), or null: from scratch")
    steps: int = Field(2000, ge=0)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(1e-3, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    ema: float = Field(0.995, ge=0, lt=1, description="decay of the weights' moving average; not used where ema_width is given")
    ema_width: float | None = Field(
        None,
        gt=0,
        lt=0.29,
        description="relative width of a power-function average (Karras et al. 2024, equation 123 and algorithm 2)",
    )
    loss: Literal["edm", "min_snr", "uncertainty"] = Field(
        "edm",
        description="weight of a noise level: 1/c_out^2; min-SNR (Hang et al. 2023); learned (Karras et al. 2024, eq. 15)",
    )
    min_snr: float = Field(5.0, gt=0, description="min_snr: gamma")
    sigma_data: float = Field(0.5, gt=0, description="EDM: standard deviation of the data, scaled to [-1, 1]")
    p_mean: float = Field(-0.8, description="EDM: mean of ln sigma in training")
    p_std: float = Field(1.2, gt=0, description="EDM: standard deviation of ln sigma in training")
    null_probability: float = Field(0.15, ge=0, lt=1, description="share of labels replaced by the null class")
    balance: float = Field(0.5, ge=0, le=1, description="0: images drawn as they come; 1: every class equally often")
    flips: bool = Field(True, description="mirror images and quarter turns: a lesion has no up")
    clip: float = Field(1.0, gt=0)
    amp: bool = Field(True, description="bf16 autocast")
    compile: bool = Field(False, description="torch.compile: minutes at the start, faster after; for GPUs")
    sample_steps: int = Field(0, ge=0, description="a grid of samples every so many steps; 0: only at the end")
    checkpoint_steps: int = Field(200, ge=1)


class Mine(Section):
    budget: int = Field(64, ge=1, description="hard cases a round, shared among classes by their error")
    near_margin: float = Field(0.1, ge=0, le=1, description="right, but p[label] leads by less than this: nearly misclassified")
    candidates: int = Field(4, ge=1, description="farthest-first picks among so many times the class's budget, hardest first")
    scorer: Literal["loss", "margin", "entropy", "bald", "forgetting"] = Field(
        "loss",
        description="what hardest means; bald: over the seeds' classifiers; forgetting: right in one round, wrong in the next",
    )
    temperature: float | None = Field(
        None, gt=0, description="budget of a class: softmax of its error over this; null: in proportion to its error"
    )
    ratio_cap: float | None = Field(None, ge=1, description="largest over smallest class's share of the budget, at most")
    modes: int = Field(8, ge=1, description="failure modes of a class, at most")
    alpha: float = Field(0.05, gt=0, lt=1, description="probability that any attribute is named by chance")


class Generate(Section):
    strategy: Literal["sample", "vary", "inpaint", "outpaint", "inout", "blend"] = Field(
        "vary", description="of the guided arm; the unguided one always samples"
    )
    per_case: int = Field(6, ge=1, le=1000, description="images for each hard case")
    sigma_start: float = Field(2.0, gt=0, description="vary, blend: noise put on the hard case, images scaled to [-1, 1]")
    adaptive: bool = Field(
        False,
        description="vary: for each hard case the largest of `levels` at which the judge still sees the label, else the least",
    )
    levels: list[float] = Field([0.5, 1.0, 2.0, 4.0, 8.0], min_length=1, description="adaptive: noise levels that are tried")
    adaptive_agreement: float = Field(0.5, gt=0, lt=1, description="adaptive: probability the judge must give the label")
    fill_sigma: float = Field(
        4.0, gt=0, description="inpaint, outpaint, inout: noise to start from; more keeps less of the old colours, sigma_max none"
    )
    margin: float = Field(0.06, ge=0, le=0.5, description="inpaint, outpaint: the lesion's mask is grown by this share of the side")
    feather: float = Field(0.06, ge=0, le=0.5, description="inpaint, outpaint: width of the blended seam, a share of the side")
    guidance: float = Field(2.0, ge=0, description="classifier-free scale; 1: none")
    guidance_low: float = Field(0.2, ge=0, description="guidance acts at noise levels above this only")
    guidance_high: float = Field(10.0, gt=0, description="and below this (Kynkaanniemi et al. 2024)")
    weak: WeightPath = Field(
        None,
        description="folder of an under-trained denoiser that guidance steers away from, not the null class (Karras et al. 2024)",
    )
    hardness: float = Field(
        0.0,
        ge=0,
        description="guided arm: push towards what the classifier under attack finds hard, in classifier-free corrections",
    )
    hardness_kind: Literal["loss", "entropy", "margin"] = Field("margin", description="what is pushed up")
    hardness_every: int = Field(4, ge=1, description="a push every so many evaluations")
    hardness_low: float = Field(0.2, ge=0, description="hardness and likeness act at noise levels above this only")
    hardness_high: float = Field(5.0, gt=0, description="and up to this")
    likeness: float = Field(0.0, ge=0, description="guided arm: pull towards the hard case; pixels: 1 takes its low frequencies")
    likeness_kind: Literal["pixels", "features"] = Field("pixels", description="features: of the classifier under attack")
    likeness_pull: int = Field(4, ge=2, description="pixels: low frequencies are means over so many pixels of the diffused side")
    solver: Literal["dpmpp_2m", "heun"] = "dpmpp_2m"
    steps: int = Field(16, ge=2, le=1000, description="from sigma_max; a start below it takes its share of them")
    sigma_min: float = Field(0.02, gt=0)
    sigma_max: float = Field(40.0, gt=0)
    rho: float = Field(
        7.0, gt=0, allow_inf_nan=True, description="Karras et al. 2022, equation 5; .inf: evenly spaced in the logarithm"
    )
    batch_size: int = Field(64, ge=2, description="evaluations of the denoiser at a time; the same size gives the same images")
    part_size: int = Field(256, ge=1, description="images a part: what one worker does at a time, and a kill may lose")
    amp: bool = True
    compile: bool = Field(
        False, description="torch.compile of the denoiser: half a minute at each sampler's start, then up to twice as fast"
    )

    @model_validator(mode="after")
    def _order(self) -> Generate:
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} must be below sigma_max {self.sigma_max:g}")
        starts = [("sigma_start", self.sigma_start), ("fill_sigma", self.fill_sigma)]
        for name, start in starts + [("levels", level) for level in self.levels]:
            if not self.sigma_min < start <= self.sigma_max:
                raise ValueError(f"{name} {start:g} must lie in (sigma_min, sigma_max] = ({self.sigma_min:g}, {self.sigma_max:g}]")
        if self.adaptive and self.strategy != "vary":
            raise ValueError(f"adaptive is for strategy vary, not {self.strategy}; set adaptive to false")
        if self.batch_size % 2:
            raise ValueError(f"batch_size {self.batch_size} must be even: a guided image takes two evaluations at a time")
        return self


class Curate(Section):
    min_agreement: float = Field(0.2, ge=0, le=1, description="least probability an independent judge gives the asked label")
    trivial_quantile: float | None = Field(
        0.99,
        gt=0.5,
        le=1,
        description="trivial: the judge is surer of the asked label than it is of this share of held-out real images; null: off",
    )
    near_copy_quantile: float = Field(
        0.993,
        gt=0.5,
        le=1,
        description="closer to a real image than this share of different lesions are to each other: a near copy",
    )
    realism_quantile: float | None = Field(
        0.98,
        gt=0.5,
        le=1,
        description="farther from the manifold of real images than this share of held-out real ones: unlike them; null: off",
    )
    min_contrast: float | None = Field(2.0, ge=0, description="least standard deviation of brightness, grey levels; null: off")
    max_clipped: float | None = Field(0.5, ge=0, le=1, description="largest share of values that are 0 or 255; null: off")
    twins: bool = Field(True, description="of near copies among the synthetic images of an arm the first by id is kept")
    quota: int | None = Field(None, ge=1, description="images kept of one hard case, an arm and round; null: all")
    folds: int = Field(2, ge=2, le=10, description="judges, each trained without one fold of the lesions of train")
    judge: Classifier | None = Field(
        None, description="the judges' own classifier section; null: as the classifier, from scratch, of another architecture"
    )


class Mix(Section):
    arms: list[Literal["real", "resample", "replay", "unguided", "guided"]] = Field(
        ["real", "replay", "unguided", "guided"], min_length=1, description="what classifiers are trained on, and compared"
    )
    synthetic_ratio: Annotated[float | Literal["auto"], BeforeValidator(_ratio)] = Field(
        0.5,
        description="at most so many synthetic images (or repeats) a real training image; auto: chosen on select in every round",
    )
    ratios: Ratios = Field([0.0, 0.5, 1.0, 2.5, 5.0], description="auto: the ratios that are tried")
    patience: int | None = Field(
        2,
        ge=1,
        description="auto: a class gets no more images after so many rounds in a row in which they did not help it; null: never "
        "stops",
    )
    fold_mined: Literal["all", "none"] = Field("all", description="the mined real images enter training in every arm, or in none")

    @property
    def paints(self) -> bool:
        """Whether any arm has synthetic images."""
        return any(arm in PAINTED for arm in self.arms)

    @property
    def mines(self) -> bool:
        """Whether there is a round: more than the classifiers of the arm `real`."""
        return any(arm != "real" for arm in self.arms)

    def recipe(self) -> dict[str, Any]:
        """For a run's recipe: without what only auto reads where the ratio is a number, as before there was auto."""
        unread = set() if self.synthetic_ratio == AUTO else {"ratios", "patience"}
        return self.model_dump(mode="json", exclude=unread)


class Evaluate(Section):
    seeds: int = Field(1, ge=1, le=100, description="classifiers an arm, paired by seed across arms")
    bootstrap: int = Field(1000, ge=100, description="resamples of the lesions for intervals")
    groups: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(
        {}, description="name: classes of a group, told from the rest at fixed specificities, e.g. malignant: [mel, bcc]"
    )
    specificities: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.8, 0.9, 0.95], description="of groups: thresholds are set on select"
    )
    floor: float = Field(0.8, ge=0, lt=1, description="of groups: partial AUC above this sensitivity (ISIC 2024)")
    subgroups: list[str] = Field(
        ["age", "sex", "localization", "site", "fitzpatrick", "mode"],
        description="attributes to give figures by, where known",
    )


class Quality(Section):
    """How good the denoiser's samples are: distances between features of samples and of held-out real images."""

    features: WeightPath = Field(
        None,
        description="whose embedding: a timm model with `weights` below, or a trained classifier's folder; null: the classifier's "
        "pretrained weights as they were given, or the run's own classifier of arm real where it starts from scratch",
    )
    weights: WeightPath = Field(None, description="imagenet or a local safetensors file, where `features` names a timm model")
    images: int = Field(2000, ge=20, description="samples drawn, classes in the proportions of the real images")
    guidance: float = Field(1.0, ge=0, description="classifier-free scale of the samples; 1: none, what the denoiser learned")
    neighbours: int = Field(5, ge=1, description="k of precision, recall, density and coverage (Naeem et al. 2020)")
    subsets: int = Field(100, ge=2, description="KID: random subsets (Binkowski et al. 2018)")
    subset_size: int = Field(500, ge=2, description="KID: images a subset, at most the smaller set")

    @model_validator(mode="after")
    def _whose(self) -> Quality:
        if self.weights is not None and self.features is None:
            raise ValueError(f"weights {self.weights} of what? name a timm model in quality.features")
        return self


class Search(Section):
    """`adversa sweep` as an ordinary search of Ray Tune: one cell, one arm, trials drawn from a space."""

    space: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="dotted key of classifier or generate, or ratio: {choice: [..]}, {loguniform: [a, b]}, ...: ray.tune's names",
    )
    samples: int = Field(20, ge=1, description="trials")
    searcher: str = Field("random", description="a searcher of Ray Tune by name; most need a package of their own")
    searcher_args: dict[str, Any] = {}
    scheduler: str = Field("fifo", description="a scheduler of Ray Tune by name: fifo, asha, median_stopping_rule, ...")
    scheduler_args: dict[str, Any] = {}


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str | int | float) and not isinstance(value, bool) else value


Count = Annotated[int, Field(ge=1, strict=True)] | Literal["all"]
Ratio = Annotated[float, Field(ge=0)]


class Sweep(Section):
    """`adversa sweep`: how much synthetic data helps, by the number of real images, the ratio and the arm."""

    real: Annotated[list[Count], BeforeValidator(_one_or_many), Field(min_length=1)] = Field(
        [1, 8, 16, 32, 64, 128, "all"], description="real images of train a class; each smaller set is part of the larger ones"
    )
    scarce: Literal["fail", "all"] = Field("fail", description="a class with fewer images than asked: stop, or take all it has")
    ratios: Annotated[list[Ratio], BeforeValidator(_one_or_many), Field(min_length=1)] = Field(
        [0, 1, 2.5, 5, 10, 20, 50], description="synthetic images (or repeats) a real one, in each class; 0 is the arm real"
    )
    arms: Annotated[list[Literal["replay", "unguided", "guided"]], BeforeValidator(_one_or_many), Field(min_length=1)] = [
        "replay", "unguided", "guided",
    ]  # fmt: skip
    strategies: Annotated[
        list[Literal["sample", "vary", "inpaint", "outpaint", "inout", "blend"]] | None, BeforeValidator(_one_or_many)
    ] = Field(None, description="of the guided arm, each an arm of its own; null: generate.strategy")
    denoiser_sees: Annotated[list[Literal["subset", "all"]], BeforeValidator(_one_or_many), Field(min_length=1)] = Field(
        ["subset"],
        description="real images a cell's denoiser is trained on: the cell's own, all of train (Sagers et al. 2023), or both",
    )
    seeds: int = Field(3, ge=1, le=100, description="classifiers a point of the grid, paired by seed")
    subset_seed: int = Field(0, ge=0, description="which real images a cell has")
    overdraw: float = Field(1.5, ge=1, le=100, description="images painted for each one wanted: the gate turns some down")
    metric: Literal["balanced_accuracy", "accuracy", "auroc_macro", "worst_class"] = "balanced_accuracy"
    bootstrap: int = Field(2000, ge=200, description="resamples of seeds and lesions for bands and intervals")
    max_trials: int = Field(1000, ge=1, description="a larger grid is refused")
    keep_models: bool = Field(False, description="keep every trial's classifier; false: its predictions alone")
    search: Search | None = Field(None, description="null: the grid")

    @model_validator(mode="after")
    def _grid(self) -> Sweep:
        for name in ("real", "ratios", "arms", "strategies", "denoiser_sees"):
            values = getattr(self, name)
            if values is not None and len(set(values)) != len(values):
                raise ValueError(f"{name} {values} names a value twice")
        if self.strategies is not None and "guided" not in self.arms:
            raise ValueError(f"strategies {self.strategies} are of the arm guided, which is not in arms {self.arms}; add it")
        return self


class Cluster(Section):
    """How work is spread. No part of a run's recipe: it may change between attempts.

    The ids, the noise and what is asked do not depend on it. The number of threads changes the last bits of a training, so
    it is recorded in the model's manifest; keep it for a result that is the same to the bit.
    """

    cpus: int | None = Field(None, ge=1, description="of the embedded Ray; null: all of this machine")
    object_store_mb: int = Field(512, ge=100)
    training_threads: int | None = Field(None, ge=1, description="torch threads of a training worker; null: all CPUs it may use")
    samplers: int | None = Field(None, ge=1, description="sampler actors; null: as many as the GPUs, or the CPUs, have room for")
    gpus_per_sampler: float = Field(1.0, gt=0, description="where there are GPUs: 0.5 puts two sampler actors on each")
    training_workers: int = Field(1, ge=1, description="workers of a training; each batch is shared among them")
    training_workers_min: int | None = Field(None, ge=1, description="go on with as few when workers are lost; null: wait for all")
    training_attempts: int = Field(3, ge=1, description="starts of a training whose workers die before the run fails")
    sampler_threads: int = Field(1, ge=1, description="torch threads of a sampler on CPUs")
    trials: int | None = Field(None, ge=1, description="trials of a sweep at a time; null: as many as the GPUs, or CPUs, allow")
    gpus_per_trial: float = Field(1.0, gt=0, le=1, description="where there are GPUs: 0.5 puts two trials on each")
    pin_samplers: bool = Field(False, description="keep each sampler on cores of its own (Linux); where nothing else runs there")
    attempts: int = Field(3, ge=1, description="tries a part of generation before each of its requests is tried by itself")

    @model_validator(mode="after")
    def _workers(self) -> Cluster:
        if self.gpus_per_sampler > 1 and not self.gpus_per_sampler.is_integer():
            raise ValueError(f"gpus_per_sampler {self.gpus_per_sampler:g} must be a whole number, or at most 1")
        if (self.training_workers_min or 1) > self.training_workers:
            raise ValueError(f"training_workers_min {self.training_workers_min} is above training_workers {self.training_workers}")
        return self


class Config(Section):
    seed: int = Field(0, ge=0)
    rounds: int = Field(1, ge=1, le=100)
    data: Data = Data()
    classifier: Classifier = Classifier()
    codec: Codec = Codec()
    denoiser: Denoiser = Denoiser()
    mine: Mine = Mine()
    generate: Generate = Generate()
    curate: Curate = Curate()
    mix: Mix = Mix()
    evaluate: Evaluate = Evaluate()
    quality: Quality = Quality()
    tracking: Trackers = Field([], description="metrics of every training, sent there as well; one name, or a list of them")
    sweep: Sweep = Sweep()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        self._check_side()
        if self.denoiser.external and self.denoiser.weights:
            raise ValueError(
                f"denoiser.external {self.denoiser.external} is used as it is; set denoiser.weights {self.denoiser.weights} to null"
            )
        if self.denoiser.external and self.codec.is_fitted:
            raise ValueError("denoiser.external knows no latents of a codec fitted here; give its autoencoder as codec.path")
        if self.denoiser.weights == "phantom" and self.codec.kind != "pixels":
            raise ValueError(f"denoiser.weights phantom is for codec.kind pixels, not {self.codec.kind}; take null or a folder")
        if self.data.source != "phantom" and not self.data.path:
            raise ValueError(f"data.path is missing; data.source {self.data.source} needs one, say --set data.path=FOLDER")
        self._check_architecture()
        if self.denoiser.weights == "phantom" and self.data.source != "phantom":
            raise ValueError(f"denoiser.weights phantom is for data.source phantom, not {self.data.source}; take null or a folder")
        if len(set(self.mix.arms)) != len(self.mix.arms):
            raise ValueError(f"mix.arms {self.mix.arms} names an arm twice")
        if "real" not in self.mix.arms:
            raise ValueError("mix.arms must contain real: it is what the other arms are compared with")
        self._check_ratio()
        if self.mine.scorer == "bald" and self.evaluate.seeds < 2:
            raise ValueError(f"mine.scorer bald measures how seeds disagree; set evaluate.seeds {self.evaluate.seeds} to 2 or more")
        if "replay" in self.mix.arms and self.mix.fold_mined == "none":
            raise ValueError("mix.arms replay repeats the mined images, which fold_mined none keeps out; set mix.fold_mined=all")
        self._check_classifier("classifier", self.classifier)
        if self.curate.judge is not None:
            self._check_classifier("curate.judge", self.curate.judge)
        self._check_null()
        self._check_shares()
        if self.classifier.patience is not None and len(self.mix.arms) > 1:
            raise ValueError(
                f"classifier.patience {self.classifier.patience} would stop the arms {self.mix.arms} at different steps; "
                "take null, or one arm"
            )
        return self

    def _check_ratio(self) -> None:
        ratio, others = self.mix.synthetic_ratio, [arm for arm in self.mix.arms if arm != "real"]
        if ratio == AUTO and not others:
            raise ValueError(
                "mix.synthetic_ratio auto chooses how many images are added, and mix.arms [real] adds none; give a number, or add "
                "an arm such as guided"
            )
        if ratio == 0 and others:
            raise ValueError(
                f"mix.synthetic_ratio 0 leaves the arms {', '.join(others)} without images; give a ratio above 0, auto, or "
                "mix.arms=[real]"
            )

    def _check_classifier(self, name: str, section: Classifier) -> None:
        """Here and not in the section: what a trained model was given is read again with `weights` null (classify.model.load)."""
        if section.head_steps >= section.steps:
            raise ValueError(
                f"{name}.head_steps {section.head_steps} leaves none of {name}.steps {section.steps} to train the trunk; take fewer"
            )
        gentle = {
            "head_steps": section.head_steps > 0, "layer_decay": section.layer_decay < 1, "freeze_norm": section.freeze_norm,
        }  # fmt: skip
        if section.weights is None and (key := next((k for k, on in gentle.items() if on), None)):
            raise ValueError(
                f"{name}.{key} {str(getattr(section, key)).lower()} keeps what pretrained layers know, but {name}.weights is null: "
                f"these would be random; give weights, or leave {key} out"
            )
        if section.first_size is None:
            return
        last = section.input_size or self.data.resolution
        if section.first_size % 16:
            raise ValueError(f"{name}.first_size {section.first_size} must be a multiple of 16, as every size on the way up is")
        if section.first_size > last:
            full = "data.resolution" if section.input_size is None else f"{name}.input_size"
            raise ValueError(f"{name}.first_size {section.first_size} is above {full} {last}: nothing to grow to")
        if 2 * section.first_size < self.data.resolution:
            raise ValueError(
                f"{name}.first_size {section.first_size} is below half of data.resolution {self.data.resolution}: images "
                "shrunk so far as they are augmented would lose detail to aliasing; take at least half"
            )
        if section.augment is None:
            raise ValueError(f"{name}.first_size needs augmentation on: the images are resized as they are augmented")

    def _check_architecture(self) -> None:
        """A width for the other architecture would do nothing, and look as if it did."""
        c = self.denoiser
        other, keys = {"unet": ("transformer", ("width", "depth")), "transformer": ("unet", ("channels", "layers", "attention"))}[
            c.architecture
        ]
        for key in keys:
            if (value := getattr(c, key)) != Denoiser.model_fields[key].default:
                raise ValueError(
                    f"denoiser.{key} {value} belongs to architecture {other}, this is {c.architecture}; "
                    f"set denoiser.architecture={other}, or leave {key} out"
                )
        if c.architecture == "unet" and any(n % 8 for n in c.channels):
            raise ValueError(f"denoiser.channels {c.channels} must be multiples of 8")

    def _check_null(self) -> None:
        """Guidance pushes away from the null class, which a denoiser from scratch learns from labels that are dropped."""
        if self.denoiser.null_probability or self.denoiser.external or self.denoiser.weights or not self.mix.paints:
            return
        for key, guidance in (("generate", self.generate.guidance), ("quality", self.quality.guidance)):
            if guidance != 1:
                raise ValueError(
                    f"denoiser.null_probability 0 teaches no null class, which {key}.guidance {guidance:g} steers away from; "
                    f"set {key}.guidance=1, or a null_probability such as 0.15"
                )

    def _check_shares(self) -> None:
        """Every worker of a training needs a row of each batch."""
        workers, paints = self.cluster.training_workers, self.mix.paints
        trained = {
            "classifier": self.classifier, "curate.judge": judge_of(self) if paints else None,
            "denoiser": self.denoiser if paints and not self.denoiser.external else None,
            "codec": self.codec if paints and self.codec.is_fitted else None,
        }  # fmt: skip
        for name, section in trained.items():
            if section is not None and section.batch_size < workers:
                raise ValueError(
                    f"{name}.batch_size {section.batch_size} cannot be shared among cluster.training_workers {workers}; "
                    "take fewer workers or a larger batch"
                )

    def _check_side(self) -> None:
        """The side that is diffused must divide by the denoiser's patch and levels; a given codec's is known once it is read."""
        resolution, halvings = self.data.resolution, self.codec.halvings if self.codec.is_fitted else 0
        if resolution % 2**halvings:
            raise ValueError(f"data.resolution {resolution} must be a multiple of 2^codec.halvings = {2**halvings}")
        if self.denoiser.external or (self.codec.kind != "pixels" and not self.codec.is_fitted):
            return
        unet = self.denoiser.architecture == "unet"
        factor = self.denoiser.patch * (2 ** (len(self.denoiser.channels) - 1) if unet else 1)
        if (resolution >> halvings) % factor:
            latents = f", its latents' side {resolution >> halvings}," if halvings else ""
            levels = " * 2^(levels - 1)" if unet else ""
            raise ValueError(f"data.resolution {resolution}{latents} must be a multiple of denoiser.patch{levels} = {factor}")


def judge_of(config: Config) -> Classifier:
    """The judges' section: as given, or the classifier's with another architecture that suits a judge from scratch.

    A ConvNeXt of four narrow stages (depth-wise convolutions, layer normalisation) beside a residual network; beside a ConvNeXt the
    classifier's own default.
    """
    if config.curate.judge is not None:
        return config.curate.judge
    default = {name: Classifier.model_fields[name].default for name in Classifier.model_fields}
    kept = {k: v for k, v in config.classifier if k not in _OF_PRETRAINED}
    if config.classifier.model.startswith("convnext"):
        return Classifier(**kept | {k: default[k] for k in ("model", "model_args", "lr")})
    stem = 2 if config.data.resolution <= 48 else 4
    args = {"depths": [1, 1, 2, 1], "dims": [32, 64, 128, 256], "patch_size": stem}
    return Classifier(**kept | {"model": "convnext_atto", "model_args": args, "lr": default["lr"]})


# Of the classifier's section, what says how a pretrained network is tuned, and what fits one architecture alone.
_OF_PRETRAINED = ("model", "model_args", "weights", "input_size", "first_size", "lr", "layer_decay", "head_steps", "freeze_norm")


def packaged(name: str) -> Path:
    """The path of a configuration that comes with adversa: `configs/` in a checkout, `adversa/configs/` when installed."""
    here = Path(__file__).parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"no packaged configuration {name}; known: {', '.join(sorted(p.name for p in (here.parent / 'configs').glob('*.yaml')))}"
    )


def load(path: Path | None, overrides: list[str] | tuple[str, ...] = (), **top: Any) -> Config:
    """Read a YAML file (None: the packaged demo), apply `key.sub=value` overrides, check everything. UserError on any fault."""
    path = packaged("demo.yaml") if path is None else path
    try:
        tree = load_yaml(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no configuration at {path}; give a YAML file, or none for the demo") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    except yaml.YAMLError as e:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections (key: value), but holds a {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    tree.update({k: v for k, v in top.items() if v is not None})
    return check(tree, str(path))


def check(tree: dict[str, Any], where: str) -> Config:
    """A tree of plain values to a Config; UserError with every fault, the nearest valid key for an unknown one."""
    try:
        return Config.model_validate(tree)
    except ValidationError as e:
        raise UserError(f"{where}: " + "; ".join(explain(err) for err in e.errors())) from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML, sections in order."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key."""
    found = []
    for name, info in model.model_fields.items():
        found.append(prefix + name)
        if (sub := _section(info.annotation)) is not None:
            found += keys(sub, f"{prefix}{name}.")
    return found


def _section(annotation: Any) -> type[BaseModel] | None:
    for kind in getattr(annotation, "__args__", (annotation,)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _override(tree: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--set {text}: write key.sub=value, for example data.resolution=64")
    try:
        parsed = load_yaml(value)
    except yaml.YAMLError:
        raise UserError(f"--set {text}: the value is not valid YAML; quote it") from None
    *sections, last = name.split(".")
    for i, section in enumerate(sections):
        node = tree.setdefault(section, {})
        if node is None:
            node = tree[section] = {}
        if not isinstance(node, dict):
            raise UserError(f"--set {text}: {'.'.join(sections[: i + 1])} is not a section")
        tree = node
    tree[last] = parsed


def explain(err: Any, model: type[BaseModel] = Config, listed: str = "`adversa config show` lists the keys") -> str:
    """One of pydantic's faults in words; for an unknown key the nearest of the model's, or where they are listed."""
    key = ".".join(str(p) for p in err["loc"])
    if err["type"] == "extra_forbidden":
        valid = keys(model)
        near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5) or [
            k for k in valid if k.rsplit(".")[-1] == key.rsplit(".")[-1]
        ][:1]  # fmt: skip
        return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else f"; {listed}")
    message = err["msg"].removeprefix("Value error, ")
    return unsigned(
        f"{key} = {shortened(repr(err['input']))}: {message}"
        if key and not isinstance(err["input"], dict)
        else f"{key + ': ' if key else ''}{message}"
    )
