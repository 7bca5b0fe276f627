"""The generation pipeline: requests to images. A request gives the same noise in any batch, in any
order, on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adversa import config as cfg
from adversa.diffuse import batch as batching
from adversa.diffuse import strategy
from adversa.diffuse.edm import DenoiserFn, to_images, to_tensor
from adversa.diffuse.guidance import GradientFn
from adversa.diffuse.strategy import DiffusedSpace, Sources
from adversa.types import GenerationRequest, Json

DECODED = 16  # finished rows that are decoded together


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image: uint8 [R, R, 3], black where it is not finite.

    evaluations: rows of the denoiser that it took; skipped: guidance gradients that were not
    finite.
    """

    request: GenerationRequest
    image: np.ndarray
    finite: bool
    evaluations: int
    skipped: int


@dataclass(frozen=True)
class Steering:
    """The models that guide, beside the denoiser's own classes.

    Attributes:
        gradient: Of classifier guidance.
        features: Pixels [B, 3, R, R] in [0, 1] to [B, D], for reference guidance in features.
        pixels: The diffused space to such pixels.
        weak: The denoiser of autoguidance.
    """

    gradient: GradientFn | None = None
    features: Callable[[Tensor], Tensor] | None = None
    pixels: Callable[[Tensor], Tensor] | None = None
    weak: DenoiserFn | None = None


@dataclass
class GenerationPipeline:
    """A denoiser, the space it diffuses, and a batch for each stream of requests.

    meta: the denoiser's config.json. encode, decode: uint8 images [B, R, R, 3] to the diffused
    space [B, C, h, w] and back; pixels by default.
    """

    denoiser: DenoiserFn
    meta: Json
    config: cfg.Generate
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    encode: Callable[[np.ndarray], Tensor] = to_tensor
    decode: Callable[[Tensor], np.ndarray] = to_images
    steering: Steering = Steering()

    def stream(
        self, requests: Iterable[GenerationRequest], sources: Sources
    ) -> Iterator[GeneratedImage]:
        """Yield the image of every request in the order in which they finish; the next is taken
        when there is room for it.
        """
        requested: dict[int, GenerationRequest] = {}
        side, classes = self.meta["resolution"], len(self.meta["classes"])
        names = list(sources.images)
        places = (
            self.encode(np.stack([sources.images[n] for n in names])).float().cpu() if names else ()
        )
        space = DiffusedSpace(
            (self.meta.get("channels", 3), side, side), dict(zip(names, places, strict=True))
        )

        def rows() -> Iterator[batching.BatchRow]:
            for key, request in enumerate(requests):
                assert 0 <= request.label < classes, (request.label, classes)
                requested[key] = request
                yield strategy.row(
                    key, request, sources, space, self.config, self._reference(sources)
                )

        batch = batching.Batch(
            self.denoiser,
            space.shape,
            self.config.batch_size,
            classes,
            self.device,
            self.config.amp,
            self.steering.weak,
            self.steering.gradient,
            self.config.reference_guidance_factor,
            self.steering.features,
            self.steering.pixels,
        )
        waiting: list[batching.Finished] = []
        for done in batch.run(rows()):
            waiting.append(done)
            if len(waiting) == DECODED:
                yield from self._decoded(waiting, requested, sources)
                waiting = []
        if waiting:
            yield from self._decoded(waiting, requested, sources)

    def _reference(self, sources: Sources) -> Callable[[str], Tensor] | None:
        """Example id to its features, for reference guidance in features; else None."""
        features = self.steering.features
        if features is None:
            return None

        def reference(example: str) -> Tensor:
            pixels = torch.from_numpy(sources.images[example]).permute(2, 0, 1).float()[None] / 255
            with torch.no_grad():
                return features(pixels.to(self.device))[0]

        return reference

    def _decoded(
        self,
        done: Sequence[batching.Finished],
        requested: dict[int, GenerationRequest],
        sources: Sources,
    ) -> Iterator[GeneratedImage]:
        x = torch.stack([d.x0 for d in done])
        finite = torch.isfinite(x).flatten(1).all(1)
        pictures = self.decode(torch.where(finite.view(-1, 1, 1, 1), x, torch.zeros_like(x)))
        for d, picture, ok in zip(done, pictures, finite.tolist(), strict=True):
            request = requested.pop(d.key)
            image = strategy.composed(picture, request, sources) if ok else np.zeros_like(picture)
            yield GeneratedImage(request, image, ok, d.evaluations, d.skipped)


def generate(
    denoiser: DenoiserFn,
    requests: Sequence[GenerationRequest],
    sources: Sources,
    config: cfg.Generate,
    meta: Json,
    device: torch.device | str = "cpu",
    **space: Any,
) -> list[GeneratedImage]:
    """The images of all requests, in their order.

    space: encode, decode and steering of GenerationPipeline.
    """
    pipeline = GenerationPipeline(denoiser, meta, config, torch.device(device), **space)
    found = {p.request.request_id: p for p in pipeline.stream(requests, sources)}
    return [found[r.request_id] for r in requests]
