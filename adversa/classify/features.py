"""Features of images for comparing sets of them: the embedding of a network, without augmentation,
in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import timm
import torch

from adversa.classify import model
from adversa.classify.score import forward
from adversa.config import Classifier
from adversa.storage import files
from adversa.storage.path import StoragePath
from adversa.storage.weights import CONFIG
from adversa.types import UserError


@dataclass(frozen=True)
class FeatureSpace:
    """Whose embedding. folder: of a trained classifier; else config: a timm model with its weights,
    nothing of it trained here.
    """

    name: str
    folder: StoragePath | None = None
    config: Classifier | None = None


def pretrained(name: str, weights: str) -> FeatureSpace:
    """A timm model with given weights, which sees images at its own size. UserError for an unknown
    tag; see `network`.
    """
    known = timm.is_model(name.split(".")[0])
    try:
        settings = timm.models.get_pretrained_cfg(name) if known else None
    except RuntimeError as e:
        tags = ", ".join(timm.list_pretrained(name.split(".")[0])) or "none: leave the tag out"
        raise UserError(f"quality.features {name}: {e} Known: {tags}") from None
    size = settings.input_size[-1] if settings is not None else None
    return FeatureSpace(
        name, config=Classifier(model=name, model_args={}, weights=weights, input_size=size)
    )


def network(space: FeatureSpace, resolution: int) -> model.Network:
    """The network of a space, on the CPU. UserError: the folder holds no classifier, or the model
    or its weights cannot be had.
    """
    try:
        if space.folder is not None:
            meta = files.read_json(space.folder / CONFIG)
            if meta is not None and meta.get("kind") != "classifier":
                kind = f"a model of kind {meta.get('kind')!r}"
                raise UserError(
                    f"{space.folder} holds {kind}; give the folder of a classifier, or a "
                    "timm model by name"
                )
            return model.load(space.folder)[0]
        assert space.config is not None
        plain = space.config.model_copy(update={"amp": False})
        with torch.random.fork_rng(
            devices=[]
        ):  # the head's initial weights are drawn; no feature hangs on them
            return model.build(plain, 2, resolution).eval()
    except UserError as e:
        raise UserError(f"the feature space of quality.features cannot be had: {e}") from None


def make_features(space: FeatureSpace, resolution: int) -> Callable[[np.ndarray], np.ndarray]:
    """Load the network once; the callable maps uint8 [N, R, R, 3] to float32 [N, D], image by image
    whatever the neighbours.
    """
    loaded = network(space, resolution).to("cuda" if torch.cuda.is_available() else "cpu")

    def features(images: np.ndarray) -> np.ndarray:
        return forward(loaded, images, amp=False)[1]

    return features
