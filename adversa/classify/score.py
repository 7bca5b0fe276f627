"""Logits and embeddings of images by a finished classifier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from adversa.classify.model import load, to_pixels

# Images scored together. Always this many (the last ones are padded): the kernels, and so the last bit, depend on the
# shape of the batch, and an image's logits must not depend on how many neighbours it came with.
CHUNK = 64

Scorer = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def make_scorer(folder: Path, embed: bool = False) -> Scorer:
    """Load the classifier of a folder once; the callable maps uint8 [N, H, W, 3] to (logits [N, K], embedding [N, D]).

    Both float32, in the order of the images; D = 0 unless `embed`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, meta, _ = load(folder, device)
    amp, num_classes = bool(meta["config"]["amp"]), int(meta["num_classes"])

    def score(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(images):
            width = network.head.in_features if embed else 0
            return np.zeros((0, num_classes), np.float32), np.zeros((0, width), np.float32)
        logits, embedding = forward(network, images, amp)
        return logits, embedding if embed else embedding[:, :0]

    return score


@torch.inference_mode()
def forward(network: nn.Module, images: np.ndarray, amp: bool) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, H, W, 3], N > 0 -> (logits [N, K], embedding [N, D]) float32, by a network in eval mode."""
    assert not network.training
    device = next(network.parameters()).device
    logits, embeddings = [], []
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        missing = CHUNK - len(chunk)
        if missing:
            chunk = np.concatenate([chunk, np.zeros((missing, *chunk.shape[1:]), np.uint8)])
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            z, e = network(to_pixels(chunk, device))
        logits.append(z.float().cpu().numpy()[: CHUNK - missing])
        embeddings.append(e.float().cpu().numpy()[: CHUNK - missing])
    return np.concatenate(logits), np.concatenate(embeddings)
