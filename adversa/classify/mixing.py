"""Mixup and CutMix of a batch with itself: each image and its target with those of its partner, row
i with row i ^ 1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor

from adversa.classify.augment import ALL, rectangles
from adversa.training.device import to_device


def mix(
    pixels: Tensor,
    targets: Tensor,
    mixup: float,
    cutmix: float,
    generator: Generator,
    size: int | None = None,
    rows: slice = ALL,
) -> tuple[Tensor, Tensor]:
    """pixels [B, 3, S, S], targets [B, K] -> both mixed; alpha 0 turns a kind off, and of two kinds
    each batch gets one.

    Every row has its own lambda ~ Beta(alpha, alpha), the share it keeps of itself (Zhang et al.
    2018; Yun et al. 2019). size, rows: as for `augment`. Rows are random draws already, so the
    neighbour is as good a partner as any, and lies on the same worker (types.share_of cuts between
    pairs). A row without its partner stays alone: the last of an odd batch, and those that a cut
    has parted, which happens only in a batch of fewer pairs than workers.
    """
    if not (mixup or cutmix):
        return pixels, targets
    size = len(pixels) if size is None else size
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    cut = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    alpha = cutmix if cut else mixup
    keep, centre = rng.beta(alpha, alpha, size)[rows], rng.random((2, size))[:, rows]
    first, last, _ = rows.indices(size)
    partner = (np.arange(first, last) ^ 1) - first
    alone = (partner < 0) | (partner >= last - first)
    partners = torch.from_numpy(np.where(alone, np.arange(last - first), partner))
    keep = np.where(alone, 1.0, keep)
    if cut:
        inside, keep = _boxes(keep, centre, pixels.shape[-1])
        inside = to_device(inside, pixels.device)
        pixels = torch.where(inside, pixels[to_device(partners, pixels.device)], pixels)
    other = to_device(torch.from_numpy(1 - keep).float()[:, None], pixels.device)
    partners = to_device(partners, pixels.device)
    if not cut:
        pixels = torch.lerp(pixels, pixels[partners], other[:, :, None, None])
    return pixels, torch.lerp(targets, targets[partners], other)


def _boxes(keep: np.ndarray, centre: np.ndarray, side: int) -> tuple[Tensor, np.ndarray]:
    """keep [B], centre [2, B] -> (box [B, 1, S, S], the share outside it [B]), Yun et al. 2019,
    equation 2.

    The box has the share 1 - keep of the area, save what the border cuts off and rounding moves: so
    the share is counted anew.
    """
    half = np.sqrt(1 - keep) / 2
    top, left = np.rint(np.clip(centre - half, 0, 1) * side).astype(np.int64)
    bottom, right = np.rint(np.clip(centre + half, 0, 1) * side).astype(np.int64)
    area = (bottom - top) * (right - left)
    ends = [torch.from_numpy(v) for v in (top, bottom, left, right)]
    return rectangles(ends[0], ends[1], ends[2], ends[3], side), 1 - area / side**2
