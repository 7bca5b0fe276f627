"""A timm model without its head, plus a linear head: images to logits and embedding in one pass."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import timm
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from adversa.classify.depthwise import fast_depthwise
from adversa.config import Classifier
from adversa.storage import hub
from adversa.storage.path import StoragePath
from adversa.storage.weights import read_model
from adversa.training.device import to_device
from adversa.training.precision import enabled
from adversa.types import Json, UserError


class Network(nn.Module):
    """pixels [B, 3, H, W] in [0, 1] -> (logits [B, K], embedding [B, D]).

    Resizing to `input_size` (unless `resize` is False) with the interpolation of the model's own
    data configuration (bilinear or bicubic, antialiased) and normalisation by its mean and standard
    deviation happen inside, so that no caller can get them wrong. The trunk is built with
    num_classes=0: every timm model then returns its embedding.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, trunk: nn.Module, width: int, num_classes: int, input_size: int | None
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.input_size = input_size
        statistics = timm.data.resolve_model_data_config(trunk)
        self.interpolation = "bilinear" if statistics["interpolation"] == "bilinear" else "bicubic"
        for name in ("mean", "std"):
            self.register_buffer(
                name, torch.tensor(statistics[name]).view(1, 3, 1, 1), persistent=False
            )

    def forward(self, pixels: Tensor, resize: bool = True) -> tuple[Tensor, Tensor]:
        if (
            resize
            and self.input_size is not None
            and pixels.shape[-2:] != (self.input_size, self.input_size)
        ):
            pixels = F.interpolate(
                pixels, (self.input_size, self.input_size), mode=self.interpolation, antialias=True
            )
            pixels = pixels.clamp(0, 1).contiguous(memory_format=torch.channels_last)
        embedding = self.trunk((pixels - self.mean) / self.std)
        return self.head(embedding), embedding


def to_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [0, 1], channels last in memory (which is how it
    lay already).
    """
    assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3, (
        images.dtype,
        images.shape,
    )
    images = (
        images
        if images.flags.writeable and images.flags.c_contiguous
        else np.array(images, order="C")
    )
    found = to_device(torch.from_numpy(images), torch.device(device))
    return found.permute(0, 3, 1, 2).float().div_(255)


def build(config: Classifier, num_classes: int, resolution: int) -> Network:
    """The untrained (or ImageNet) network, channels last, on the CPU. Weights are drawn from
    torch's global generator.

    UserError: unknown model (with the nearest names), arguments the model does not take, weights
    that are not this model's (with the first mismatches), a model that cannot take images of this
    size.
    """
    trunk = _trunk(config)
    if config.weights is not None:
        _load_trunk(trunk, config)
    width = _width(trunk, config, config.input_size or resolution)
    if config.first_size is not None:
        _width(
            trunk, config, config.first_size
        )  # the smallest images of the training must fit as well
    if enabled(config.amp):
        fast_depthwise(trunk)
    network = Network(trunk, width, num_classes, config.input_size)
    return network.to(memory_format=torch.channels_last)


def load(folder: StoragePath, device: torch.device | str = "cpu") -> tuple[Network, Json, str]:
    """(network in eval mode, meta, fingerprint) of a folder written by `fit`; meta is its
    config.json.
    """
    state, meta, fingerprint = read_model(folder)
    try:
        config = Classifier.model_validate({**meta["config"], "weights": None})
        num_classes, resolution = int(meta["num_classes"]), int(meta["resolution"])
    except (KeyError, TypeError, ValueError, ValidationError) as e:
        what = " ".join(str(e).split())
        raise UserError(
            f"{folder} holds no classifier this version can read ({what}); train it anew"
        ) from None
    with torch.random.fork_rng(
        devices=[]
    ):  # the initial weights are thrown away: leave the caller's generator alone
        network = build(config, num_classes, resolution)
    _check(state, network.state_dict(), f"{folder}", config.model)
    network.load_state_dict(state)
    return network.to(device).eval(), meta, fingerprint


def _trunk(config: Classifier) -> nn.Module:
    name = config.model
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        hint = (
            f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() has the names"
        )
        raise UserError(f"classifier.model {name!r} is no timm model{hint}")
    if asked := [k for k in config.model_args if k.startswith(("pretrained", "checkpoint"))]:
        raise UserError(
            f"classifier.model_args {asked[0]}: weights are given as classifier.weights, "
            "which checks that they fit"
        )
    try:
        return timm.create_model(name, **{**config.model_args, "num_classes": 0})
    except (
        OSError,
        TypeError,
        ValueError,
        AssertionError,
        KeyError,
        IndexError,
        RuntimeError,
    ) as e:
        what = (
            f"classifier.model_args {config.model_args}"
            if config.model_args
            else f"classifier.model {name!r}"
        )
        raise UserError(
            f"{what}: timm cannot build {name}: {_line(e)}; arguments are a model's own"
        ) from None


def _width(trunk: nn.Module, config: Classifier, size: int) -> int:
    """D of the embedding, found by a dry run in eval mode (which leaves BatchNorm's statistics
    alone).
    """
    training = trunk.training
    starved: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, x: starved.append(name) if x[0].shape[-2:] == (1, 1) else None

    strided = [
        (k, m) for k, m in trunk.named_modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)
    ]
    hooks = [m.register_forward_pre_hook(watch(k)) for k, m in strided]
    try:
        with torch.inference_mode():
            embedding = trunk.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as e:
        raise UserError(
            f"classifier.model {config.model!r} cannot take images of {size} px ({_line(e)}); "
            "set classifier.input_size, or classifier.model_args.img_size where the model has one"
        ) from None
    finally:
        trunk.train(training)
        for hook in hooks:
            hook.remove()
    if starved:
        # Nothing is left to learn there; and oneDNN 3.13's bf16 weight gradient of such a
        # convolution reads memory that nobody wrote: NaN now and then, silently wrong otherwise.
        raise UserError(
            f"classifier.model {config.model!r} shrinks images of {size} px to one pixel "
            f"and goes on ({starved[0]}); "
            f"set classifier.input_size to {2 * size} or more, or choose a model with fewer strides"
        )
    if not isinstance(embedding, Tensor) or embedding.ndim != 2:
        shape = (
            tuple(embedding.shape) if isinstance(embedding, Tensor) else type(embedding).__name__
        )
        raise UserError(
            f"classifier.model {config.model!r} gives no embedding but {shape}; choose an "
            "image classifier"
        )
    return embedding.shape[1]


def _load_trunk(trunk: nn.Module, config: Classifier) -> None:
    """Put pretrained weights into the trunk, without their head. timm itself would load a foreign
    file in silence.
    """
    where = str(config.weights)
    state = _imagenet(config) if where == "imagenet" else _local(Path(where))
    heads = cast(Json, trunk.pretrained_cfg).get("classifier") or ()
    classifiers = (heads,) if isinstance(heads, str) else tuple(heads)
    state = {k: v for k, v in state.items() if not any(k.startswith(f"{c}.") for c in classifiers)}
    expected = trunk.state_dict()
    for name in expected:  # a counter nobody reads; old files lack it
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, expected[name])
    _check(state, expected, f"classifier.weights {where}", config.model)
    trunk.load_state_dict(state)


def _imagenet(config: Classifier) -> dict[str, Tensor]:
    try:
        with hub.quiet():
            return timm.create_model(config.model, pretrained=True, num_classes=0).state_dict()
    except (
        Exception
    ) as e:  # whatever the hub's client raises: no network, no such weights, no space left
        why = "it cannot be reached from here" if hub.unreachable(e) else _line(e)
        raise UserError(
            f"classifier.weights imagenet: cannot get {config.model} from the hub ({why}); "
            "give a local safetensors file, or null to train from scratch"
        ) from e


def _local(path: Path) -> dict[str, Tensor]:
    """A safetensors file, or a folder written by `fit`: then its trunk, for the head is of other
    classes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.is_dir():
        state = read_model(path)[0]
        if not any(k.startswith("trunk.") for k in state):
            raise UserError(
                f"classifier.weights {path}: the folder holds no classifier; give one, or "
                "a safetensors file"
            )
        return {k.removeprefix("trunk."): v for k, v in state.items() if k.startswith("trunk.")}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"classifier.weights {path}: no readable safetensors file ({_line(e)})"
        ) from None


def _check(state: dict[str, Tensor], expected: dict[str, Tensor], where: str, model: str) -> None:
    faults = [f"{k} is missing" for k in expected if k not in state]
    faults += [f"{k} is unknown" for k in state if k not in expected]
    faults += [
        f"{k} is {tuple(state[k].shape)}, not {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{where} does not fit {model}: {'; '.join(faults[:3])}{more}")


def _line(e: BaseException) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__
