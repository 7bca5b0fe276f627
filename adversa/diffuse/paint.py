"""Requests to images. The same request gives the same noise in any batch, in any order, on any machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adversa import config as cfg
from adversa.diffuse.edm import DenoiserFn, to_images, to_tensor
from adversa.diffuse.guidance import classifier_free
from adversa.diffuse.solver import SOLVERS, karras_sigmas
from adversa.types import GenerationRequest


def noise(request: GenerationRequest, shape: tuple[int, ...]) -> Tensor:
    """Unit normal noise of a request: its own generator, on the CPU, seeded by request.seed alone."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(request.seed))


def paint(
    denoiser: DenoiserFn,
    requests: Sequence[GenerationRequest],
    start_images: dict[str, np.ndarray],
    config: cfg.Generate,
    meta: dict[str, Any],
    device: torch.device | str = "cpu",
    encode: Callable[[np.ndarray], Tensor] = to_tensor,
    decode: Callable[[Tensor], np.ndarray] = to_images,
) -> list[tuple[str, np.ndarray, bool]]:
    """Paint every request: (request_id, uint8 [R, R, 3], finite), in the order asked; a row that is not finite is black.

    `sample` starts from noise at config.sigma_max; `vary` from start_images[request.example] (uint8 [R, R, 3]) plus
    request.sigma_start times noise. Batches have config.batch_size rows always (a short one is filled with copies of its first), so
    that no result depends on how many images were asked for. meta: the denoiser's config.json (resolution and channels of the
    space it diffuses, classes). encode, decode: uint8 images [B, R, R, 3] to that space [B, C, h, w] and back (a codec's `to_space`
    and `decode`); pixels by default.
    """
    device = torch.device(device)
    images: list[tuple[str, np.ndarray, bool]] = []
    for first in range(0, len(requests), config.batch_size):
        batch = list(requests[first : first + config.batch_size])
        rows = batch + [batch[0]] * (config.batch_size - len(batch))
        x = _solve(denoiser, rows, start_images, config, meta, device, encode)
        finite = torch.isfinite(x).flatten(1).all(1)
        pictures = decode(torch.where(finite.view(-1, 1, 1, 1), x, torch.zeros_like(x)))  # all rows: as many as ever, see above
        pictures[~finite.cpu().numpy()] = 0
        images += [(r.request_id, picture, ok) for r, picture, ok in zip(batch, pictures, finite.tolist(), strict=False)]
    return images


@torch.no_grad()
def _solve(
    denoiser: DenoiserFn,
    rows: list[GenerationRequest],
    start_images: dict[str, np.ndarray],
    config: cfg.Generate,
    meta: dict[str, Any],
    device: torch.device,
    encode: Callable[[np.ndarray], Tensor],
) -> Tensor:
    """One full batch in the diffused space: [batch_size, C, h, w]."""
    shape, classes = (meta.get("channels", 3), meta["resolution"], meta["resolution"]), len(meta["classes"])
    assert all(0 <= r.label < classes for r in rows), "label out of range"
    start = torch.tensor([r.sigma_start if r.strategy == "vary" else config.sigma_max for r in rows])
    x = torch.stack([noise(r, shape) for r in rows]) * start.view(-1, 1, 1, 1)
    assert all(r.strategy == "sample" or (r.strategy == "vary" and r.example is not None) for r in rows), "an unknown strategy"
    varied = sorted({r.example for r in rows if r.strategy == "vary" and r.example is not None})
    if varied:
        places = dict(zip(varied, encode(np.stack([start_images[e] for e in varied])).cpu(), strict=True))
        for i, r in enumerate(rows):
            if r.strategy == "vary" and r.example is not None:
                x[i] += places[r.example]
    scale = torch.tensor([r.guidance for r in rows], device=device)
    guided = classifier_free(denoiser, scale, classes, config.guidance_low, config.guidance_high)
    sigmas = karras_sigmas(start.to(device), config.sigma_min, config.rho, config.steps)
    label = torch.tensor([r.label for r in rows], device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
        return SOLVERS[config.solver](guided, x.to(device), sigmas, label)
