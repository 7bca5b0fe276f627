"""How fast each part of the network learns, and when it is looked at."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from timm.optim import param_groups_layer_decay

from adversa.classify.model import Network
from adversa.config import Classifier

GROWING = 0.7  # share of the steps until training images have their full size


def learning_rate(step: int, config: Classifier) -> float:
    """Of step 1 ... config.steps: linear to config.lr over the warm-up, then half a cosine to a
    hundredth of it.
    """
    rise = config.warmup * config.steps
    if step <= rise:
        return config.lr * step / rise
    share = (step - rise) / max(1.0, config.steps - rise)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def thaw(step: int, config: Classifier) -> float:
    """Factor of the trunk's rate: after config.head_steps frozen ones it has a warm-up of its own,
    for Adam's first steps are as long as the rate allows, whatever the gradient. 0 while frozen, 1
    throughout where nothing is frozen.
    """
    if not config.head_steps:
        return 1.0
    return min(1.0, max(0, step - config.head_steps) / max(1.0, config.warmup * config.steps))


def training_side(step: int, config: Classifier, resolution: int) -> int:
    """Side of the training images of step 1 ... config.steps, in pixels: from config.first_size
    evenly up to config.input_size (null: the resolution) over the first GROWING of the steps, in
    multiples of 16 (progressive learning, Tan & Le 2021, section 4.2). Without first_size the
    resolution: then the network resizes.
    """
    if config.first_size is None:
        return resolution
    last, share = config.input_size or resolution, (step - 1) / (GROWING * config.steps)
    side = 16 * round((config.first_size + share * (last - config.first_size)) / 16)
    return last if share >= 1 else min(last, max(16, side))


def parameter_groups(network: Network, config: Classifier) -> list[dict[str, Any]]:
    """AdamW's groups. lr_scale: of the group's rate; trunk: whether it is frozen during
    config.head_steps.

    The trunk's layers are grouped from the input up by timm (`group_matcher`), and the i-th group
    below the head learns at layer_decay^i of the head's rate (BEiT, Bao et al. 2022). Decay belongs
    to matrices and kernels; on biases, norms, layer scales and what the model itself names
    (positions, tokens) it only fights the fit.
    """
    exempt: Collection[str] = getattr(network.trunk, "no_weight_decay", tuple)()
    layers = param_groups_layer_decay(
        network.trunk,
        config.weight_decay,
        no_weight_decay_list=exempt,
        layer_decay=config.layer_decay,
    )
    merged: dict[
        tuple[float, float], list[torch.nn.Parameter]
    ] = {}  # without layer decay: two groups, not two a layer
    for group in layers:
        merged.setdefault(
            (group["lr_scale"] * config.layer_decay, group["weight_decay"]), []
        ).extend(group["params"])
    groups = [
        {"params": p, "lr_scale": s, "weight_decay": d, "trunk": True}
        for (s, d), p in merged.items()
    ]
    head = {"lr_scale": 1.0, "trunk": False}
    return [
        *groups,
        {"params": [network.head.weight], "weight_decay": config.weight_decay, **head},
        {"params": [network.head.bias], "weight_decay": 0.0, **head},
    ]


def set_rates(optimizer: torch.optim.Optimizer, config: Classifier, step: int) -> float:
    """The learning rate of this step, which each group is given its part of."""
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
        if group["trunk"]:
            group["lr"] *= thaw(step, config)
    return rate
