"""The space that is diffused: pixels, or the latents of an autoencoder (Rombach et al. 2022,
"High-Resolution Image Synthesis with Latent Diffusion Models").

A codec is a folder like every model: `model.safetensors` beside the `config.json` that rebuilds it,
whether it was fitted here (codec_fit.py) or came from elsewhere, so that no worker ever needs the
hub. What is diffused is  (latent - shift) * scale,  channel by channel: for a denoiser trained
here, shift and scale are measured on the train role and give zero mean and standard deviation
sigma_data; for an external one they are the autoencoder's own, which that denoiser was trained
with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from adversa import config as cfg
from adversa.diffuse import pretrained
from adversa.diffuse.edm import to_images, to_tensor
from adversa.storage import files, weights
from adversa.storage.path import StoragePath, storage_path
from adversa.types import Json, UserError

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

KIND = "codec"
CLASSES = {"tiny": "AutoencoderTiny", "kl": "AutoencoderKL"}
# Images a pass. Always so many (a short pass is filled up), so that no image's latent hangs on how
# many were asked for; and so few, that a Stable Diffusion autoencoder at 512 px stays within a few
# GB.
ROWS = 16
PROBE = 64  # side of the black picture that tells an autoencoder's channels and factor


@dataclass(frozen=True)
class ImageCodec:
    """Images to latents and back, in float32 whatever the ambient autocast. meta: the config.json;
    shift, scale [C].
    """

    model: ModelMixin
    meta: Json
    fingerprint: str
    shift: Tensor
    scale: Tensor
    device: torch.device

    def encode(self, images: np.ndarray) -> Tensor:
        """uint8 [B, R, R, 3] to raw latents, float32 [B, C, R / factor, R / factor], on the CPU.

        Of an AutoencoderKL the posterior's mean: its spread is far below any noise level that is
        generated with, and a mean needs no random draw, so that the same picture always has the
        same latent.
        """
        name = self.meta["class"]

        def run(x: Tensor) -> Tensor:
            found = self.model.encode(x)
            result: Tensor = found.latent_dist.mode() if name == "AutoencoderKL" else found.latents
            return result

        return self._passes(lambda part: run(to_tensor(part).to(self.device)), images)

    def to_space(self, images: np.ndarray) -> Tensor:
        """uint8 [B, R, R, 3] to the diffused space, float32 [B, C, h, w], on the CPU."""
        return (self.encode(images) - self.shift.view(-1, 1, 1)) * self.scale.view(-1, 1, 1)

    def decode(self, x: Tensor) -> np.ndarray:
        """The diffused space [B, C, h, w] to uint8 [B, R, R, 3]. Entries must be finite."""
        latents = x.detach().float().cpu() / self.scale.view(-1, 1, 1) + self.shift.view(-1, 1, 1)
        return to_images(
            self._passes(lambda z: self.model.decode(z.to(self.device)).sample, latents)
        )

    def pixels(self, x: Tensor) -> Tensor:
        """The diffused space [B, C, h, w] to pixels [B, 3, R, R] about [0, 1], not clipped:
        gradients go through.
        """
        shift, scale = (v.to(x.device).view(-1, 1, 1) for v in (self.shift, self.scale))
        found: Tensor = (self.model.decode(x / scale + shift).sample + 1) / 2
        return found

    @torch.no_grad()
    def _passes(self, run: Callable[[Any], Tensor], x: Any) -> Tensor:
        done = []
        for first in range(0, len(x), ROWS):
            places = [min(i, len(x) - 1) for i in range(first, first + ROWS)]
            with torch.autocast(self.device.type, enabled=False):
                done.append(run(x[places])[: len(x) - first].float().cpu())
        return torch.cat(done)


def build(config: cfg.Codec) -> ModelMixin:
    """The autoencoder that `fit_codec` fits, diffusers' AutoencoderTiny, with fresh weights (the
    global torch generator's).

    No residual block encodes at the full resolution and one decodes there: a block costs four times
    as much there as a level down.
    """
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    widths, inner = (config.width,) * (config.halvings + 1), (config.blocks,) * config.halvings
    found: ModelMixin = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(0, *inner),
        num_decoder_blocks=(*inner, 1),
        latent_channels=config.latent_channels,
    )
    return found


def describe(model: ModelMixin, source: str, **extra: Any) -> Json:
    """The config.json that rebuilds an autoencoder: its class and arguments, channels, factor and
    its own shift and scale.
    """
    known = inspect.signature(type(model).__init__).parameters
    arguments = {k: v for k, v in dict(model.config).items() if k in known}
    kind, rows = type(model).__name__, torch.zeros(1, 3, PROBE, PROBE)
    with torch.no_grad():
        found = model.encode(rows.to(next(model.parameters()).device))
    latent = found.latent_dist.mode() if kind == "AutoencoderKL" else found.latents
    meta = {
        "kind": KIND,
        "class": kind,
        "arguments": arguments,
        "source": source,
        "channels": latent.shape[1],
    }
    return (
        meta
        | {"factor": PROBE // latent.shape[2], "native": _native(arguments, latent.shape[1])}
        | extra
    )


def _native(arguments: Json, channels: int) -> dict[str, list[float]]:
    """The shift and scale [C] with which models of this autoencoder's latents are trained, as
    diffusers' pipelines apply them.

    (z - shift_factor) * scaling_factor, or (z - latents_mean) * scaling_factor / latents_std where
    those are given.
    """
    factor = float(arguments.get("scaling_factor") or 1.0)
    mean, std = arguments.get("latents_mean"), arguments.get("latents_std")
    if mean is not None and std is not None:
        return {"shift": [float(m) for m in mean], "scale": [factor / float(s) for s in std]}
    return {
        "shift": [float(arguments.get("shift_factor") or 0.0)] * channels,
        "scale": [factor] * channels,
    }


def measured(fingerprint: str, mean: list[float], std: list[float], sigma_data: float) -> Json:
    """The key `codec` of a denoiser's config.json: which codec it belongs to, and what its latents
    are scaled by.
    """
    return {"fingerprint": fingerprint, "shift": list(mean), "scale": [sigma_data / s for s in std]}


def load(
    folder: StoragePath, device: torch.device | str = "cpu", space: dict[str, Any] | None = None
) -> ImageCodec:
    """The codec of a folder, in eval mode. space: the key `codec` of a denoiser's config.json;
    None: the autoencoder's own scaling.

    UserError where the folder holds none, or another codec than the one the denoiser belongs to.
    """
    import diffusers

    state, meta, fingerprint = weights.read_model(storage_path(folder))
    if meta.get("kind") != KIND or meta.get("class") not in CLASSES.values():
        raise UserError(
            f"{folder} holds a model of kind {meta.get('kind')!r}, not a codec; give the "
            "folder of a codec"
        )
    if space is not None and space["fingerprint"] != fingerprint:
        raise UserError(
            f"{folder} is codec {fingerprint[:8]}, the denoiser belongs to "
            f"{space['fingerprint'][:8]}; give them as they were made"
        )
    try:
        model = getattr(diffusers, meta["class"])(**meta["arguments"])
        model.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(
            f"{folder}: the weights do not fit their own config.json "
            f"({' '.join(str(e).split())[:200]})"
        ) from None
    device, scaling = torch.device(device), space or meta["native"]
    shift, scale = (torch.tensor(scaling[k], dtype=torch.float32) for k in ("shift", "scale"))
    return ImageCodec(
        model.to(device).eval().requires_grad_(False), meta, fingerprint, shift, scale, device
    )


def scaled(codec: ImageCodec, space: dict[str, Any]) -> ImageCodec:
    """The same codec with another shift and scale."""
    shift, scale = (torch.tensor(space[k], dtype=torch.float32) for k in ("shift", "scale"))
    return replace(codec, shift=shift, scale=scale)


def fetch(config: cfg.Codec, resolution: int, out: StoragePath) -> str:
    """Copy the autoencoder that config.path names (a diffusers folder, a hub id, or a codec's
    folder) to `out`; its fingerprint.

    UserError where there is none, it is of another kind, or `resolution` does not divide by its
    factor.
    """
    assert config.path is not None and config.kind != "pixels", config
    folder = _folder(config.path)
    if folder is not None and (folder / weights.MODEL).is_file():
        codec = load(folder)
        model, meta = (
            codec.model,
            codec.meta,
        )  # as it is: a denoiser that belongs to it goes on belonging to it
    else:
        where = str(folder or config.path)
        model, meta = (
            pretrained.load(where, "codec.path", [CLASSES[config.kind]], local=folder is not None),
            None,
        )
    if model.config.in_channels != 3 or model.config.out_channels != 3:
        raise UserError(
            f"codec.path {config.path} encodes {model.config.in_channels} channels; pictures have 3"
        )
    meta = meta or describe(model, config.path)
    _fits(config, meta["class"], meta["factor"], resolution)
    return weights.save_model(out, model.state_dict(), meta)


def check(config: cfg.Codec, resolution: int) -> None:
    """What `fetch` would refuse of a local folder's class and factor, from its config.json alone,
    be it ours or diffusers'.
    """
    folder = _folder(config.path) if config.path else None
    meta = files.read_json(folder / weights.CONFIG) if folder else None
    if meta is None:
        return
    levels = (
        meta.get("block_out_channels") or meta.get("encoder_block_out_channels") or [0]
    )  # each but the first halves the side
    _fits(
        config,
        meta.get("class") or meta.get("_class_name"),
        meta.get("factor") or 2 ** (len(levels) - 1),
        resolution,
    )


def _fits(config: cfg.Codec, name: str | None, factor: int, resolution: int) -> None:
    if name != CLASSES[config.kind]:
        raise UserError(
            f"codec.path {config.path} is of class {name}; codec.kind {config.kind} wants "
            f"{CLASSES[config.kind]}"
        )
    if resolution % factor:
        raise UserError(
            f"data.resolution {resolution} must be a multiple of {factor}, the factor of "
            f"codec.path {config.path}"
        )


def source(config: cfg.Codec) -> dict[str, str]:
    """What a given codec's recipe says of its weights: their hash where they are local; a hub id
    stands for itself.
    """
    folder = _folder(config.path) if config.path else None
    if folder is None:
        return {}
    found = next(
        (
            folder / name
            for name in (weights.MODEL, pretrained.WEIGHTS)
            if (folder / name).is_file()
        ),
        None,
    )
    if found is None or not (folder / weights.CONFIG).is_file():
        raise UserError(
            f"codec.path {config.path} lacks {weights.CONFIG} or {pretrained.WEIGHTS}; "
            "give a diffusers folder with both"
        )
    return {"codec": pretrained.hashed([folder / weights.CONFIG, found])}


def _folder(path: str) -> Path | None:
    """The local folder of the autoencoder (itself, or `vae` of a pipeline); None for a hub id.
    UserError: no such folder.
    """
    folder = Path(path)
    if folder.is_dir():
        inner = folder / "vae"
        return inner if not (folder / weights.CONFIG).is_file() and inner.is_dir() else folder
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise UserError(
            f"codec.path {path}: no such folder; give a local diffusers folder, or a hub "
            "id such as OWNER/NAME"
        )
    return None


def psnr(images: np.ndarray, others: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, mean over images: uint8 [B, R, R, 3] twice. Equal images
    count as 100 dB.
    """
    error = ((images.astype(np.float64) - others) ** 2).reshape(len(images), -1).mean(1)
    return float(np.mean(np.minimum(10 * np.log10(255**2 / np.maximum(error, 1e-12)), 100.0)))
