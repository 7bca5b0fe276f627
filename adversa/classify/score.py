"""Logits and embeddings of images by a finished classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adversa.classify.model import Network, load, to_pixels
from adversa.common.symmetry import symmetry
from adversa.config.base import Amp
from adversa.storage.path import StoragePath
from adversa.training import process_group
from adversa.training.precision import autocast

# Images scored together. Always this many (the last ones are padded): the kernels, and so the last
# bit, depend on the shape of the batch, and an image's logits must not depend on how many
# neighbours it came with.
CHUNK = 64

Scorer = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def make_scorer(folder: StoragePath, embed: bool = False) -> Scorer:
    """Load the classifier of a folder once; the callable maps uint8 [N, H, W, 3] to (logits [N, K],
    embedding [N, D]).

    Both float32, in the order of the images; D = 0 unless `embed`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, meta, _ = load(folder, device)
    amp, views, num_classes = (
        meta["config"]["amp"],
        int(meta["config"].get("views", 1)),
        int(meta["num_classes"]),
    )

    def score(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(images):
            width = network.head.in_features if embed else 0
            return np.zeros((0, num_classes), np.float32), np.zeros((0, width), np.float32)
        logits, embedding = forward(network, images, amp, views)
        return logits, embedding if embed else embedding[:, :0]

    return score


@torch.inference_mode()
def forward(
    network: nn.Module, images: np.ndarray, amp: Amp, views: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, H, W, 3], N > 0 -> (logits [N, K], embedding [N, D]) float32, by a network in eval
    mode.

    Both are means over the first `views` of the square's eight symmetries (common.symmetry): the
    image itself, mirrored left to right, both of these mirrored top to bottom, and those four
    transposed.
    """
    assert not network.training
    device = next(network.parameters()).device
    logits, embeddings = [], []
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        missing = CHUNK - len(chunk)
        if missing:
            chunk = np.concatenate([chunk, np.zeros((missing, *chunk.shape[1:]), np.uint8)])
        with autocast(device, amp):
            z, e = _mean(network, to_pixels(chunk, device), views)
        logits.append(z[: CHUNK - missing])
        embeddings.append(e[: CHUNK - missing])
    return torch.cat(logits).cpu().numpy(), torch.cat(embeddings).cpu().numpy()


def score_batches(
    network: Network, batches: Iterable[dict[str, Any]], amp: Amp, views: int
) -> tuple[np.ndarray, np.ndarray]:
    """(logits [N, K], labels [N]) of batches ("image", "label"), every worker's rows joined.

    CHUNK rows at a time, whatever the size of a batch, for `forward` pads what is shorter.
    """
    logits, labels = [np.zeros((0, network.head.out_features), np.float32)], [np.zeros(0, np.int64)]
    waiting: list[np.ndarray] = []
    for batch in batches:
        waiting.append(batch["image"])
        labels.append(np.asarray(batch["label"]))
        if sum(map(len, waiting)) >= CHUNK:
            images = np.concatenate(waiting)
            whole = len(images) // CHUNK * CHUNK
            logits.append(forward(network, images[:whole], amp, views)[0])
            waiting = [images[whole:]]
    if sum(map(len, waiting)):
        logits.append(forward(network, np.concatenate(waiting), amp, views)[0])
    return process_group.all_gather_rows(np.concatenate(logits)), process_group.all_gather_rows(
        np.concatenate(labels)
    )


def _mean(network: nn.Module, pixels: Tensor, views: int) -> tuple[Tensor, Tensor]:
    logits, embedding = (x.float() for x in network(pixels))
    for k in range(1, views):
        z, e = network(symmetry(pixels, k).contiguous(memory_format=torch.channels_last))
        logits, embedding = logits + z.float(), embedding + e.float()
    return logits / views, embedding / views
