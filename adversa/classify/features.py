"""Features of images for comparing sets of them: the embedding of a network, without augmentation, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch

from adversa.classify import model
from adversa.classify.score import forward
from adversa.config import Classifier
from adversa.types import UserError


@dataclass(frozen=True)
class Space:
    """Whose embedding. folder: of a trained classifier; else config: a timm model with its weights, nothing of it trained here."""

    name: str
    folder: Path | None = None
    config: Classifier | None = None


def pretrained(name: str, weights: str) -> Space:
    """A timm model with given weights, which sees images at its own size. UserError for an unknown one."""
    settings = timm.models.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    size = settings.input_size[-1] if settings is not None else None
    return Space(name, config=Classifier(model=name, model_args={}, weights=weights, input_size=size))


def make_features(space: Space, resolution: int) -> Callable[[np.ndarray], np.ndarray]:
    """Load the network once; the callable maps uint8 [N, R, R, 3] to float32 [N, D], image by image whatever the neighbours."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if space.folder is not None:
        network, _, _ = model.load(space.folder, device)
    else:
        assert space.config is not None
        plain = space.config.model_copy(update={"amp": False})
        try:
            with torch.random.fork_rng(devices=[]):  # the head's initial weights are drawn; no feature hangs on them
                network = model.build(plain, 2, resolution).to(device).eval()
        except UserError as e:
            raise UserError(f"the feature space of quality.features cannot be had: {e}") from None

    def features(images: np.ndarray) -> np.ndarray:
        return forward(network, images, amp=False)[1]

    return features
