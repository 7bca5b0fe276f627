"""The whole configuration, and the rules that hold between its sections."""

from __future__ import annotations

from pydantic import (
    Field,
    model_validator,
)

from adversa.config.base import Section
from adversa.config.classifier import Classifier
from adversa.config.cluster import Cluster
from adversa.config.codec import Codec
from adversa.config.curate import Curate
from adversa.config.data import Data
from adversa.config.denoiser import Denoiser
from adversa.config.evaluate import Evaluate
from adversa.config.generate import Generate
from adversa.config.mine import Mine
from adversa.config.mix import Mix
from adversa.config.quality import Quality
from adversa.config.sweep import Sweep
from adversa.config.tracking import Trackers


class Config(Section):
    """The whole configuration."""

    seed: int = Field(0, ge=0, description="seed of every training and every generated image")
    rounds: int = Field(
        1, ge=1, le=100, description="times that the loop mines, generates, retrains"
    )
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
    tracking: Trackers = Field(
        [], description="metrics of every training, sent there as well; one name, or a list of them"
    )
    sweep: Sweep = Sweep()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        self._check_side()
        if self.denoiser.external and self.denoiser.weights:
            raise ValueError(
                f"denoiser.external {self.denoiser.external} is used as it is; set "
                f"denoiser.weights {self.denoiser.weights} to null"
            )
        if self.denoiser.external and self.codec.is_fitted:
            raise ValueError(
                "denoiser.external knows no latents of a codec fitted here; give its "
                "autoencoder as codec.path"
            )
        if self.denoiser.weights == "phantom" and self.codec.kind != "pixels":
            raise ValueError(
                "denoiser.weights phantom is for codec.kind pixels, not "
                f"{self.codec.kind}; take null or a folder"
            )
        if self.data.source != "phantom" and not self.data.path:
            raise ValueError(
                f"data.path is missing; data.source {self.data.source} needs one, say "
                "--set data.path=FOLDER"
            )
        self._check_architecture()
        if self.denoiser.weights == "phantom" and self.data.source != "phantom":
            raise ValueError(
                "denoiser.weights phantom is for data.source phantom, not "
                f"{self.data.source}; take null or a folder"
            )
        if len(set(self.mix.arms)) != len(self.mix.arms):
            raise ValueError(f"mix.arms {self.mix.arms} names an arm twice")
        if "real" not in self.mix.arms:
            raise ValueError(
                "mix.arms must contain real: it is what the other arms are compared with"
            )
        self._check_ratio()
        if self.mine.scorer == "bald" and self.evaluate.seeds < 2:
            raise ValueError(
                "mine.scorer bald measures how seeds disagree; set evaluate.seeds "
                f"{self.evaluate.seeds} to 2 or more"
            )
        if "replay" in self.mix.arms and self.mix.fold_mined == "none":
            raise ValueError(
                "mix.arms replay repeats the mined images, which fold_mined none keeps "
                "out; set mix.fold_mined=all"
            )
        self._check_classifier("classifier", self.classifier)
        if self.curate.judge is not None:
            self._check_classifier("curate.judge", self.curate.judge)
        self._check_null()
        self._check_shares()
        if self.classifier.patience is not None and len(self.mix.arms) > 1:
            raise ValueError(
                f"classifier.patience {self.classifier.patience} would stop the arms "
                f"{self.mix.arms} at different steps; "
                "take null, or one arm"
            )
        return self

    def _check_ratio(self) -> None:
        others = [arm for arm in self.mix.arms if arm != "real"]
        if self.mix.sweeps and not others:
            raise ValueError(
                "mix.synthetic_ratio auto chooses how many images are added, and mix.arms "
                "[real] adds none; give a number, or add "
                "an arm such as guided"
            )
        if self.mix.synthetic_ratio == 0 and others:
            raise ValueError(
                f"mix.synthetic_ratio 0 leaves the arms {', '.join(others)} without "
                "images; give a ratio above 0, auto, or "
                "mix.arms=[real]"
            )

    def _check_classifier(self, name: str, section: Classifier) -> None:
        """Here and not in the section: what a trained model was given is read again with `weights`
        null (classify.model.load).
        """
        if section.head_steps >= section.steps:
            raise ValueError(
                f"{name}.head_steps {section.head_steps} leaves none of {name}.steps "
                f"{section.steps} to train the trunk; take fewer"
            )
        gentle = {
            "head_steps": section.head_steps > 0,
            "layer_decay": section.layer_decay < 1,
            "freeze_norm": section.freeze_norm,
        }
        if section.weights is None and (key := next((k for k, on in gentle.items() if on), None)):
            raise ValueError(
                f"{name}.{key} {str(getattr(section, key)).lower()} keeps what pretrained "
                f"layers know, but {name}.weights is null: "
                f"these would be random; give weights, or leave {key} out"
            )
        if section.first_size is None:
            return
        last = section.input_size or self.data.resolution
        if section.first_size % 16:
            raise ValueError(
                f"{name}.first_size {section.first_size} must be a multiple of 16, as "
                "every size on the way up is"
            )
        if section.first_size > last:
            full = "data.resolution" if section.input_size is None else f"{name}.input_size"
            raise ValueError(
                f"{name}.first_size {section.first_size} is above {full} {last}: nothing to grow to"
            )
        if 2 * section.first_size < self.data.resolution:
            raise ValueError(
                f"{name}.first_size {section.first_size} is below half of data.resolution "
                f"{self.data.resolution}: images "
                "shrunk so far as they are augmented would lose detail to aliasing; take "
                "at least half"
            )
        if section.augment is None:
            raise ValueError(
                f"{name}.first_size needs augmentation on: the images are resized as they "
                "are augmented"
            )

    def _check_architecture(self) -> None:
        """A width for the other architecture would do nothing, and look as if it did."""
        c = self.denoiser
        other, keys = {
            "unet": ("transformer", ("width", "depth")),
            "transformer": ("unet", ("channels", "layers", "attention")),
        }[c.architecture]
        for key in keys:
            if (value := getattr(c, key)) != Denoiser.model_fields[key].default:
                raise ValueError(
                    f"denoiser.{key} {value} belongs to architecture {other}, this is "
                    f"{c.architecture}; "
                    f"set denoiser.architecture={other}, or leave {key} out"
                )
        if c.architecture == "unet" and any(n % 8 for n in c.channels):
            raise ValueError(f"denoiser.channels {c.channels} must be multiples of 8")

    def _check_null(self) -> None:
        """Guidance pushes away from the null class, which a denoiser from scratch learns from
        labels that are dropped.
        """
        if (
            self.denoiser.null_probability
            or self.denoiser.external
            or self.denoiser.weights
            or not self.mix.generates
        ):
            return
        for key, guidance in (
            ("generate", self.generate.guidance),
            ("quality", self.quality.guidance),
        ):
            if guidance != 1:
                raise ValueError(
                    "denoiser.null_probability 0 teaches no null class, which "
                    f"{key}.guidance {guidance:g} steers away from; "
                    f"set {key}.guidance=1, or a null_probability such as 0.15"
                )

    def _check_shares(self) -> None:
        """Every worker of a training needs a row of each batch."""
        workers, generates = self.cluster.training_workers, self.mix.generates
        trained = {
            "classifier": self.classifier,
            "curate.judge": verifier_of(self) if generates else None,
            "denoiser": self.denoiser if generates and not self.denoiser.external else None,
            "codec": self.codec if generates and self.codec.is_fitted else None,
        }
        for name, section in trained.items():
            if section is not None and section.batch_size < workers:
                raise ValueError(
                    f"{name}.batch_size {section.batch_size} cannot be shared among "
                    f"cluster.training_workers {workers}; "
                    "take fewer workers or a larger batch"
                )

    def _check_side(self) -> None:
        """The side that is diffused must divide by the denoiser's patch and levels; a given codec's
        is known once it is read.
        """
        resolution, halvings = (
            self.data.resolution,
            self.codec.halvings if self.codec.is_fitted else 0,
        )
        if resolution % 2**halvings:
            raise ValueError(
                f"data.resolution {resolution} must be a multiple of 2^codec.halvings = "
                f"{2**halvings}"
            )
        if self.denoiser.external or (self.codec.kind != "pixels" and not self.codec.is_fitted):
            return
        unet = self.denoiser.architecture == "unet"
        factor = self.denoiser.patch * (2 ** (len(self.denoiser.channels) - 1) if unet else 1)
        if (resolution >> halvings) % factor:
            latents = f", its latents' side {resolution >> halvings}," if halvings else ""
            levels = " * 2^(levels - 1)" if unet else ""
            raise ValueError(
                f"data.resolution {resolution}{latents} must be a multiple of "
                f"denoiser.patch{levels} = {factor}"
            )


def verifier_of(config: Config) -> Classifier:
    """The verifiers' section: as given, or the classifier's with another architecture that suits a
    verifier from scratch.

    A ConvNeXt of four narrow stages (depth-wise convolutions, layer normalisation) beside a
    residual network; beside a ConvNeXt the classifier's own default.
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


# Of the classifier's section, what says how a pretrained network is tuned, and what fits one
# architecture alone.
_OF_PRETRAINED = (
    "model",
    "model_args",
    "weights",
    "input_size",
    "first_size",
    "lr",
    "layer_decay",
    "head_steps",
    "freeze_norm",
)
