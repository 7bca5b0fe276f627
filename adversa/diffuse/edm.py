"""EDM preconditioning around a network (Karras et al. 2022, "Elucidating the Design Space of
Diffusion-Based Generative Models").

A denoiser is any callable  denoiser(x [B, C, H, W], sigma [B], label int64 [B]) -> x0_hat [B, C, H,
W]  in float32, one noise level a row; x holds images scaled to [-1, 1], or latents of zero mean and
standard deviation sigma_data. The class after the last (index num_classes) is the null class: "any
of them".
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from adversa import config as cfg
from adversa.diffuse.network import build_network
from adversa.storage import weights
from adversa.storage.path import StoragePath, storage_path
from adversa.training.device import CPU, to_device
from adversa.types import Json, UserError

DenoiserFn = Callable[[Tensor, Tensor, Tensor], Tensor]

KIND = "edm-unet2d"
SHIPPED = (
    Path(__file__).parent / "phantom"
)  # pretrained on phantom pictures of another seed (tools/pretrain_phantom.py)
# Config keys that must agree for weights to fit, by architecture.
ARCHITECTURE = {
    "unet": ("architecture", "channels", "layers", "attention", "patch", "sigma_data"),
    "transformer": ("architecture", "width", "depth", "patch", "sigma_data"),
}

# The network's time input is TIME_SCALE * c_noise: c_noise spans about [-1, 1] and sinusoidal
# embeddings are made for hundreds.
TIME_SCALE = 100.0


class Coefficients(NamedTuple):
    skip: Tensor
    out: Tensor
    inp: Tensor
    noise: Tensor


def coefficients(sigma: Tensor, sigma_data: float) -> Coefficients:
    """c_skip, c_out, c_in, c_noise of Karras et al. 2022, Table 1 (column "Ours"); each the shape
    of `sigma` > 0.
    """
    total = sigma**2 + sigma_data**2
    return Coefficients(
        skip=sigma_data**2 / total,
        out=sigma * sigma_data / total.sqrt(),
        inp=1 / total.sqrt(),
        noise=sigma.log() / 4,
    )


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) = 1 / c_out^2 (Table 1): every noise level starts with the same weight on the
    network's own output.
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


class EDMDenoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)  (equation 7). float32 in and out; F runs
    in the ambient autocast dtype.
    """

    def __init__(
        self, network: nn.Module, sigma_data: float, num_classes: int, patch: int = 1
    ) -> None:
        super().__init__()
        self.network, self.sigma_data, self.num_classes, self.patch = (
            network,
            sigma_data,
            num_classes,
            patch,
        )

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        assert x.dtype == torch.float32 and sigma.shape == label.shape == x.shape[:1], (
            x.dtype,
            x.shape,
            sigma.shape,
            label.shape,
        )
        c = coefficients(sigma.float(), self.sigma_data)
        h = F.pixel_unshuffle(_rows(c.inp) * x, self.patch).to(memory_format=torch.channels_last)
        h = self.network(h, TIME_SCALE * c.noise, label, return_dict=False)[0]
        return _rows(c.skip) * x + _rows(c.out) * F.pixel_shuffle(h.float(), self.patch)


def _rows(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1)


def build(
    config: cfg.Denoiser, num_classes: int, resolution: int, channels: int = 3
) -> EDMDenoiser:
    """A denoiser with fresh weights (the global torch generator's) of a space of `channels` x
    `resolution` x `resolution`.
    """
    network = build_network(config, channels, resolution, num_classes)
    return EDMDenoiser(network, config.sigma_data, num_classes, config.patch)


def describe(
    config: cfg.Denoiser, classes: list[str], resolution: int, channels: int = 3, **extra: Any
) -> Json:
    """The config.json that rebuilds a denoiser; `classes` fixes the meaning of labels, len(classes)
    is the null class.

    resolution, channels: of the space that is diffused. extra["codec"], where that is a codec's
    latents, tells which.
    """
    space = {"resolution": resolution, "channels": channels}
    return {
        "kind": KIND,
        "classes": list(classes),
        **space,
        "denoiser": config.model_dump(mode="json"),
        **extra,
    }


def load(folder: StoragePath, device: torch.device | str = "cpu") -> tuple[EDMDenoiser, Json, str]:
    """(denoiser in eval mode, without gradients; its config.json; fingerprint). UserError where the
    folder holds none.
    """
    state, meta, fingerprint = weights.read_model(storage_path(folder))
    if meta.get("kind") != KIND:
        raise UserError(
            f"{folder} holds a model of kind {meta.get('kind')!r}, not a denoiser "
            f"({KIND}); give a denoiser's folder"
        )
    with torch.random.fork_rng(
        devices=[]
    ):  # the initial weights are thrown away: leave the caller's generator alone
        denoiser = build(
            _config(meta, folder), len(meta["classes"]), meta["resolution"], meta.get("channels", 3)
        )
    _load_state(denoiser, state, folder)
    return denoiser.to(device).eval().requires_grad_(False), meta, fingerprint


def start_from(
    denoiser: EDMDenoiser,
    config: cfg.Denoiser,
    classes: list[str],
    resolution: int,
    channels: int = 3,
    codec: Json | None = None,
) -> str:
    """Load `config.weights` into a fresh denoiser; returns where they came from ("scratch",
    "phantom" or the folder).

    UserError where the weights' classes, space or architecture are not the run's. codec: as in
    `describe`.
    """
    if config.weights is None:
        return "scratch"
    folder = SHIPPED if config.weights == "phantom" else Path(config.weights)
    state, meta, _ = weights.read_model(folder)
    if meta.get("kind") != KIND:
        raise UserError(
            f"denoiser.weights {config.weights} is of kind {meta.get('kind')!r}, not a "
            f"denoiser ({KIND})"
        )
    theirs, ours = (c.model_dump(mode="json") for c in (_config(meta, folder), config))
    pairs = [
        ("classes", meta["classes"], list(classes)),
        ("resolution", meta["resolution"], resolution),
    ]
    pairs += [
        ("channels", meta.get("channels", 3), channels),
        ("codec", _codec(meta.get("codec")), _codec(codec)),
    ]
    pairs += [(f"denoiser.{k}", theirs[k], ours[k]) for k in ARCHITECTURE[config.architecture]]
    for name, have, want in pairs:
        if have != want:
            fix = "set denoiser.weights to null (from scratch) or to a folder that fits"
            raise UserError(
                f"denoiser.weights {config.weights} has {name} {have}, this run {want}; {fix}"
            )
    _load_state(denoiser, state, folder)
    return config.weights


def _config(meta: Json, folder: StoragePath) -> cfg.Denoiser:
    try:
        return cfg.Denoiser.model_validate(
            {"architecture": "unet", **meta["denoiser"]}
        )  # older folders do not name theirs
    except (KeyError, ValidationError) as e:
        raise UserError(
            f"{folder} holds no denoiser this version can read "
            f"({' '.join(str(e).split())}); train it anew"
        ) from None


def _codec(described: Json | None) -> str:
    return "pixels" if described is None else described["fingerprint"]


def _load_state(denoiser: EDMDenoiser, state: dict[str, Tensor], folder: StoragePath) -> None:
    """Into the network; weights of before there was more than one architecture, the shipped ones
    among them, call it `unet`.
    """
    named = {
        ("network." + k.removeprefix("unet.") if k.startswith("unet.") else k): v.float()
        for k, v in state.items()
    }
    try:
        denoiser.load_state_dict(named)
    except RuntimeError as e:
        raise UserError(
            f"{folder}: the weights do not fit their own config.json "
            f"({' '.join(str(e).split())[:200]})"
        ) from None


def to_tensor(images: np.ndarray, device: torch.device = CPU) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1], computed on the device."""
    assert images.dtype == np.uint8 and images.ndim == 4, (images.dtype, images.shape)
    x = to_device(torch.from_numpy(np.ascontiguousarray(images)), device)
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(x: Tensor) -> np.ndarray:
    """The inverse: [B, 3, H, W] to uint8 [B, H, W, 3], clipped and rounded. Entries must be
    finite.
    """
    return (
        ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5)
        .round()
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .contiguous()
        .numpy()
    )
