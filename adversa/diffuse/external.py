"""Diffusion models trained elsewhere, behind denoiser(x, sigma, label) -> x0_hat: UNets of
diffusers that predict epsilon, v or x0.

They are of the variance-preserving kind (Ho et al. 2020):  x_vp = sqrt(abar_t) x0 + sqrt(1 -
abar_t) n  at a timestep t. With sigma = sqrt((1 - abar) / abar)  that is our  x = x0 + sigma n
divided by sqrt(1 + sigma^2) = 1 / sqrt(abar)  (Karras et al. 2022, Table 1, "VP"), so that x0_hat =
a x_vp + b F(x_vp; t)  with

    epsilon   a = sqrt(1 + sigma^2)      b = -sigma
    v         a = 1 / sqrt(1 + sigma^2)  b = -sigma / sqrt(1 + sigma^2) (Salimans & Ho 2022, app. D)
    sample    a = 0                      b = 1

A sigma between two timesteps gets the t between them, linear in log sigma over the model's own
table. One beyond the table's ends is taken as the end's, s: the network sees the same x_vp (its
variance is the right one at any sigma) and a, b are the end's too, so that x0_hat(x; sigma) =
x0_hat(x sqrt(1 + s^2) / sqrt(1 + sigma^2); s). With the true sigma in b, any error of the network
would be blown up by sigma / s. Above the table x is almost nothing but noise; a run that starts at
a generate.sigma_max above it spends its first steps shrinking that noise, which costs time and no
more.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from adversa.diffuse import pretrained
from adversa.storage import once, weights
from adversa.storage.path import StoragePath
from adversa.types import Json, UserError

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

KIND = "external"
EMBEDDINGS = "class_embeddings.safetensors"
SCHEDULER = "scheduler_config.json"
TABLE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# What a UNet2DConditionModel may ask for beside its embeddings, and nothing here gives.
CONDITIONS = (
    "class_embed_type",
    "addition_embed_type",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)


class ExternalDenoiser(nn.Module):
    """x [B, C, h, w] float32 = x0 + sigma n, sigma [B] > 0, label int64 [B] to x0_hat [B, C, h, w]
    float32.

    The last label, num_classes, is the null class where `has_null`. sigmas [T]: the model's table,
    rising, float64.
    """

    log_sigmas: Tensor
    embeddings: Tensor | None

    def __init__(
        self,
        unet: ModelMixin,
        sigmas: Tensor,
        prediction: str,
        num_classes: int,
        embeddings: Tensor | None,
        has_null: bool,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        assert prediction in PREDICTIONS and sigmas.dtype == torch.float64, (
            prediction,
            sigmas.dtype,
        )
        self.unet, self.prediction, self.num_classes, self.has_null, self.clip = (
            unet,
            prediction,
            num_classes,
            has_null,
            clip,
        )
        self.register_buffer("log_sigmas", sigmas.log())
        self.register_buffer("embeddings", embeddings)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        assert x.dtype == torch.float32 and sigma.shape == label.shape == x.shape[:1], (
            x.dtype,
            x.shape,
            sigma.shape,
            label.shape,
        )
        total = (1 + sigma.double() ** 2).sqrt()
        s, t = self.timestep(sigma)
        x_vp = _rows(1 / total) * x
        a, b = self.combination(s)
        x0 = _rows(a) * x_vp + _rows(b) * self._network(x_vp, t, label)
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def timestep(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """sigma [B] to (sigma held within the table, its fractional timestep), both float64 [B]."""
        table = self.log_sigmas
        level = sigma.double().log().clamp(table[0], table[-1])
        above = torch.searchsorted(table, level).clamp(1, len(table) - 1)
        below = above - 1
        return level.exp(), below + (level - table[below]) / (table[above] - table[below])

    def combination(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """a, b of the header, float64 [B]."""
        total = (1 + s**2).sqrt()
        if self.prediction == "epsilon":
            return total, -s
        return (
            (1 / total, -s / total)
            if self.prediction == "v_prediction"
            else (torch.zeros_like(s), torch.ones_like(s))
        )

    def _network(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        condition = (
            {"class_labels": label}
            if self.embeddings is None
            else {"encoder_hidden_states": self.embeddings[label]}
        )
        out = self.unet(x, t.float(), return_dict=False, **condition)[0]
        found: Tensor = out[
            :, : x.shape[1]
        ].float()  # the rest is a learned variance, which no solver of the ODE asks for
        return found


def _rows(v: Tensor) -> Tensor:
    return v.float().view(-1, 1, 1, 1)


def read(path: str, num_classes: int) -> ExternalDenoiser:
    """The model of a folder. UserError where it is none that can generate `num_classes` classes.

    The folder is a pipeline's (unet/, scheduler/scheduler_config.json) or flat (the UNet's files
    beside scheduler_config.json). A UNet2DModel must have class labels: num_classes of them, or one
    more, the last being the null class. A UNet2DConditionModel needs `class_embeddings.safetensors`
    at the top: one tensor [num_classes, T, D] of what its attention reads for each class (a
    prompt's text embedding, say), or [num_classes + 1, T, D], the last being the null class's (the
    empty prompt's).
    """
    unet_folder, scheduler = places(path)
    unet = pretrained.load(
        str(unet_folder), "denoiser.external", ["UNet2DModel", "UNet2DConditionModel"], local=True
    )
    settings, c = _settings(scheduler, path), unet.config
    prediction = settings.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS or settings.get("use_flow_sigmas"):
        _refuse(path, f"predicts {prediction}", f"a model that predicts {' or '.join(PREDICTIONS)}")
    sigmas = table(settings, path)
    if c.time_embedding_type != "positional":
        _refuse(
            path,
            f"has {c.time_embedding_type} time embeddings",
            "a model with timesteps (time_embedding_type positional)",
        )
    learned = str(settings.get("variance_type", "")).startswith("learned")
    if c.out_channels != c.in_channels * (2 if learned else 1):
        _refuse(
            path,
            f"maps {c.in_channels} channels to {c.out_channels}",
            "one with as many out as in (no inpainting model)",
        )
    if settings.get("thresholding"):
        _refuse(
            path,
            "uses dynamic thresholding",
            f"one without, or set thresholding to false in its {SCHEDULER}",
        )
    embeddings, have = None, c.num_class_embeds
    if type(unet).__name__ == "UNet2DConditionModel":
        if requested := [k for k in CONDITIONS if c.get(k) is not None]:
            _refuse(path, f"asks for {', '.join(requested)}", "one that reads its embeddings alone")
        embeddings = _embeddings(Path(path) / EMBEDDINGS, c.cross_attention_dim)
        have = len(embeddings)
    if have not in (num_classes, num_classes + 1) or c.class_embed_type is not None:
        wanted = f"{num_classes} classes, or {num_classes + 1} with the null class"
        _refuse(path, f"has {have or 'no'} class labels", f"one with the run's {wanted}")
    clip = float(settings.get("clip_sample_range", 1.0)) if settings.get("clip_sample") else None
    return ExternalDenoiser(
        unet, sigmas, prediction, num_classes, embeddings, have == num_classes + 1, clip
    )


def table(settings: Json, path: str = "") -> Tensor:
    """The noise levels sigma_t = sqrt((1 - abar_t) / abar_t) of every timestep, float64 [T],
    rising; diffusers computes abar.

    At a terminal abar of 0 (Lin et al. 2024) sigma is infinite; 2^-24 stands for it, as in
    diffusers' EulerDiscreteScheduler.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    if (
        not {"beta_schedule", "trained_betas"} & settings.keys()
        or settings.get("timestep_type", "discrete") != "discrete"
    ):
        _refuse(
            path,
            f"has a {settings.get('_class_name')} without betas over timesteps",
            "one of the DDPM family",
        )
    try:
        abar: Tensor = DDPMScheduler(
            **{k: settings[k] for k in TABLE if settings.get(k) is not None}
        ).alphas_cumprod.double()
    except (NotImplementedError, TypeError, ValueError) as e:
        _refuse(path, f"has a noise schedule that cannot be read ({e})", "another")
    if abar[-1] <= 0:
        abar[-1] = 2**-24
    sigmas = ((1 - abar) / abar).sqrt()
    if not bool((sigmas.diff() > 0).all()) or not bool(sigmas.isfinite().all()) or sigmas[0] <= 0:
        _refuse(path, "has noise levels that do not rise with the timestep", "another")
    return sigmas


def places(path: str) -> tuple[Path, Path]:
    """(folder of the UNet, file of its scheduler's settings). UserError where one of the files is
    missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"denoiser.external {path}: no such folder; give a local diffusers folder")
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = next(
        (p for p in (folder / "scheduler" / SCHEDULER, folder / SCHEDULER) if p.is_file()), None
    )
    for found, name in (
        (unet / weights.CONFIG, "the UNet's config.json"),
        (unet / pretrained.WEIGHTS, pretrained.WEIGHTS),
    ):
        if not found.is_file():
            raise UserError(
                f"denoiser.external {path} lacks {name}; give a folder with unet/ and "
                "scheduler/, or both in one"
            )
    if scheduler is None:
        raise UserError(
            f"denoiser.external {path} lacks {SCHEDULER}; its noise levels and prediction "
            "type are read from there"
        )
    return unet, scheduler


def fingerprint(path: str) -> str:
    """One hash over everything that makes the model what it is: weights, configs, class
    embeddings.
    """
    unet, scheduler = places(path)
    files = [unet / weights.CONFIG, unet / pretrained.WEIGHTS, scheduler, Path(path) / EMBEDDINGS]
    return pretrained.hashed([f for f in files if f.is_file()])


def _embeddings(path: Path, width: int) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = list(load_file(path).values())
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"{path} cannot be read ({e}); a UNet2DConditionModel needs it: one tensor "
            "[classes + 1, T, D]"
        ) from None
    if (
        len(tensors) != 1
        or tensors[0].ndim != 3
        or tensors[0].shape[2] != width
        or not bool(tensors[0].isfinite().all())
    ):
        shapes = [tuple(t.shape) for t in tensors]
        raise UserError(
            f"{path} holds {shapes}; it must be one finite tensor [classes + 1, T, "
            f"{width}] (cross_attention_dim)"
        )
    return tensors[0].float()


def check(denoiser: ExternalDenoiser, path: str, channels: int, side: int, guidance: float) -> None:
    """UserError where the model does not fit the space [channels, side, side] it is to diffuse, or
    cannot be guided.
    """
    c = denoiser.unet.config
    if c.in_channels != channels:
        _refuse(
            path,
            f"has {c.in_channels} channels, and what is diffused has {channels}",
            "another, or another codec",
        )
    if side % 2 ** (len(c.block_out_channels) - 1):
        _refuse(
            path,
            f"halves its side {len(c.block_out_channels) - 1} times, and it is {side}",
            "another data.resolution",
        )
    if guidance != 1 and not denoiser.has_null:
        raise UserError(
            f"generate.guidance {guidance:g}: denoiser.external {path} has no null class "
            "to guide against; set generate.guidance=1"
        )


def describe(
    denoiser: ExternalDenoiser,
    path: str,
    classes: list[str],
    resolution: int,
    channels: int,
    **extra: Any,
) -> Json:
    """The config.json that stands for the model: nothing is copied, its folder must stay where it
    is, as it is.
    """
    return {
        "kind": KIND,
        "classes": list(classes),
        "resolution": resolution,
        "channels": channels,
        "external": str(Path(path).resolve()),
        "weights": fingerprint(path),
        "prediction": denoiser.prediction,
        "null": denoiser.has_null,
        **extra,
    }


def load(
    folder: StoragePath, device: torch.device | str = "cpu"
) -> tuple[ExternalDenoiser, Json, str]:
    """(denoiser in eval mode, config.json, fingerprint) of a folder that `describe` was written to.

    UserError where the weights it stands for have changed.
    """
    text = once.read_bytes(folder / weights.CONFIG)
    meta = json.loads(text)
    path = meta["external"]
    denoiser = read(path, len(meta["classes"]))
    if fingerprint(path) != meta["weights"]:
        raise UserError(
            f"denoiser.external {path} has changed since this run began; put it back, or "
            "start another run"
        )
    return denoiser.to(device).eval(), meta, hashlib.sha256(text).hexdigest()[:32]


def _settings(scheduler: Path, path: str) -> Json:
    """What the scheduler's file says, and the defaults of its class for what it does not: files of
    earlier versions lack keys, and diffusers' defaults differ from class to class (DDPM and DDIM
    clip x0 to [-1, 1], Heun's scheduler does not).
    """
    import diffusers

    said = _json(scheduler)
    kind = getattr(diffusers, str(said.get("_class_name")), None)
    if isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin):
        known = inspect.signature(kind.__init__).parameters.values()
        return {p.name: p.default for p in known if p.default is not p.empty} | said
    if "clip_sample" not in said:
        why = (
            f"has a scheduler of class {said.get('_class_name')}, unknown to diffusers, that "
            "does not say whether it clips"
        )
        _refuse(path, why, f"one with clip_sample, true or false, in its {SCHEDULER}")
    return said


def _json(path: Path) -> Json:
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(
            f"{path} is not valid JSON ({e}); save the model again with diffusers"
        ) from None
    if not isinstance(found, dict):
        raise UserError(
            f"{path} holds a {type(found).__name__}, not an object of settings; save the "
            "model again with diffusers"
        )
    return found


def _refuse(path: str, why: str, fix: str) -> NoReturn:
    raise UserError(f"denoiser.external {path} {why}; give {fix}")
