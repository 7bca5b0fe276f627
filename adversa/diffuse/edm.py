"""EDM preconditioning around a diffusers UNet (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
Models").

A denoiser is any callable  denoiser(x [B, C, H, W], sigma [B], label int64 [B]) -> x0_hat [B, C, H, W]  in float32, images scaled
to [-1, 1], one noise level a row. The class after the last (index num_classes) is the null class: "any of them".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversa import config as cfg
from adversa import weights
from adversa.types import UserError

DenoiserFn = Callable[[Tensor, Tensor, Tensor], Tensor]

KIND = "edm-unet2d"
SHIPPED = Path(__file__).parent / "phantom"  # pretrained on phantom pictures of another seed (tools/pretrain_phantom.py)
ARCHITECTURE = ("channels", "layers", "attention", "patch", "sigma_data")  # config keys that must agree for weights to fit

# The network's time input is TIME_SCALE * c_noise: c_noise spans about [-1, 1] and sinusoidal embeddings are made for hundreds.
TIME_SCALE = 100.0


class Coefficients(NamedTuple):
    skip: Tensor
    out: Tensor
    inp: Tensor
    noise: Tensor


def coefficients(sigma: Tensor, sigma_data: float) -> Coefficients:
    """c_skip, c_out, c_in, c_noise of Karras et al. 2022, Table 1 (column "Ours"); each the shape of `sigma` > 0."""
    total = sigma**2 + sigma_data**2
    return Coefficients(
        skip=sigma_data**2 / total,
        out=sigma * sigma_data / total.sqrt(),
        inp=1 / total.sqrt(),
        noise=sigma.log() / 4,
    )


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) = 1 / c_out^2 (Table 1): every noise level starts with the same weight on the network's own output."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)  (equation 7). float32 in and out; F runs in the ambient autocast dtype."""

    def __init__(self, unet: nn.Module, sigma_data: float, num_classes: int, patch: int = 1) -> None:
        super().__init__()
        self.unet, self.sigma_data, self.num_classes, self.patch = unet, sigma_data, num_classes, patch

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        assert x.dtype == torch.float32 and sigma.shape == label.shape == x.shape[:1], (x.dtype, x.shape, sigma.shape, label.shape)
        c = coefficients(sigma.float(), self.sigma_data)
        h = F.pixel_unshuffle(_rows(c.inp) * x, self.patch).to(memory_format=torch.channels_last)
        h = self.unet(h, TIME_SCALE * c.noise, label, return_dict=False)[0]
        return _rows(c.skip) * x + _rows(c.out) * F.pixel_shuffle(h.float(), self.patch)


def _rows(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1)


def build(config: cfg.Denoiser, num_classes: int, resolution: int) -> Denoiser:
    """A denoiser with fresh weights (the global torch generator's), ready for square `resolution` px RGB images."""
    from diffusers import UNet2DModel

    levels, side = len(config.channels), resolution // config.patch
    factor = config.patch * 2 ** (levels - 1)
    if resolution % factor:
        raise UserError(f"data.resolution {resolution} must be a multiple of {factor} = denoiser.patch * 2^(levels - 1)")
    common = math.gcd(*config.channels)
    if common % 8:
        raise UserError(f"denoiser.channels {config.channels} must all be multiples of 8")
    # At least 16 channels a group: below that torch's channels-last kernel loses its vector width and is ten times slower in bf16.
    groups = max(d for d in range(1, 33) if common % d == 0 and min(config.channels) // d >= min(16, min(config.channels)))
    head = max(d for d in (8, 16, 32) if config.channels[-1] % d == 0)
    down, up = ["DownBlock2D"] * levels, ["UpBlock2D"] * levels
    if config.attention:
        down[-1], up[0] = "AttnDownBlock2D", "AttnUpBlock2D"
    unet = UNet2DModel(
        sample_size=side, in_channels=3 * config.patch**2, out_channels=3 * config.patch**2,
        block_out_channels=tuple(config.channels), layers_per_block=config.layers, down_block_types=tuple(down),
        up_block_types=tuple(up), add_attention=config.attention, attention_head_dim=head, norm_num_groups=groups,
        resnet_time_scale_shift="scale_shift", time_embedding_dim=2 * config.channels[0], num_class_embeds=num_classes + 1,
    )  # fmt: skip
    _zero_outputs(unet)
    return Denoiser(unet.to(memory_format=torch.channels_last), config.sigma_data, num_classes, config.patch)


def _zero_outputs(unet: nn.Module) -> None:
    """Residual branches and the last layer begin at zero: D starts as c_skip x, the best linear guess for white data."""
    from diffusers.models.resnet import ResnetBlock2D

    ends = [m.conv2 for m in unet.modules() if isinstance(m, ResnetBlock2D)] + [unet.conv_out]
    for layer in ends:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def describe(config: cfg.Denoiser, classes: list[str], resolution: int, **extra: Any) -> dict[str, Any]:
    """The config.json that rebuilds a denoiser; `classes` fixes the meaning of labels, len(classes) is the null class."""
    return {"kind": KIND, "classes": list(classes), "resolution": resolution, "denoiser": config.model_dump(mode="json"), **extra}


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[Denoiser, dict[str, Any], str]:
    """(denoiser in eval mode, without gradients; its config.json; fingerprint). UserError where the folder holds none."""
    state, meta, fingerprint = weights.read_model(Path(folder))
    if meta.get("kind") != KIND:
        raise UserError(f"{folder} holds a model of kind {meta.get('kind')!r}, not a denoiser ({KIND}); give a denoiser's folder")
    denoiser = build(cfg.Denoiser.model_validate(meta["denoiser"]), len(meta["classes"]), meta["resolution"])
    _load_state(denoiser, state, folder)
    return denoiser.to(device).eval().requires_grad_(False), meta, fingerprint


def start_from(denoiser: Denoiser, config: cfg.Denoiser, classes: list[str], resolution: int) -> str:
    """Load `config.weights` into a fresh denoiser; returns where they came from ("scratch", "phantom" or the folder).

    UserError where the weights' classes, resolution or architecture are not the run's.
    """
    if config.weights is None:
        return "scratch"
    folder = SHIPPED if config.weights == "phantom" else Path(config.weights)
    state, meta, _ = weights.read_model(folder)
    if meta.get("kind") != KIND:
        raise UserError(f"denoiser.weights {config.weights} is of kind {meta.get('kind')!r}, not a denoiser ({KIND})")
    theirs, ours = meta["denoiser"], config.model_dump(mode="json")
    pairs = [("classes", meta["classes"], list(classes)), ("resolution", meta["resolution"], resolution)]
    pairs += [(f"denoiser.{k}", theirs.get(k), ours[k]) for k in ARCHITECTURE]
    for name, have, want in pairs:
        if have != want:
            mend = "set denoiser.weights to null (from scratch) or to a folder that fits"
            raise UserError(f"denoiser.weights {config.weights} has {name} {have}, this run {want}; {mend}")
    _load_state(denoiser, state, folder)
    return config.weights


def _load_state(denoiser: Denoiser, state: dict[str, Tensor], folder: Path) -> None:
    try:
        denoiser.load_state_dict({k: v.float() for k, v in state.items()})
    except RuntimeError as e:
        raise UserError(f"{folder}: the weights do not fit their own config.json ({' '.join(str(e).split())[:200]})") from None


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]."""
    assert images.dtype == np.uint8 and images.ndim == 4, (images.dtype, images.shape)
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(x: Tensor) -> np.ndarray:
    """The inverse: [B, 3, H, W] to uint8 [B, H, W, 3], clipped and rounded. Entries must be finite."""
    return ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
