"""What paints: a denoiser of any kind, with the codec of the space it diffuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adversa import config as cfg
from adversa import weights
from adversa.diffuse import codec, edm, external
from adversa.diffuse.paint import Canvas, Painted, Steering
from adversa.diffuse.strategy import Sources
from adversa.types import GenerationRequest, UserError


@dataclass(frozen=True)
class Painter:
    """codec: None where pixels are diffused. meta: the denoiser's config.json. fingerprint: of the denoiser."""

    denoiser: edm.DenoiserFn
    codec: codec.Codec | None
    meta: dict[str, Any]
    fingerprint: str
    device: torch.device

    @property
    def side(self) -> int:
        """Of the images, in pixels."""
        return self.meta["resolution"] * (1 if self.codec is None else self.codec.meta["factor"])

    def canvas(self, config: cfg.Generate, steering: Steering | None = None) -> Canvas:
        """Where requests are painted with these settings, in the space of this denoiser."""
        space = {} if self.codec is None else {"encode": self.codec.to_space, "decode": self.codec.decode}
        return Canvas(self.denoiser, self.meta, config, self.device, steering=steering or Steering(), **space)

    def pixels(self, x: Tensor) -> Tensor:
        """The diffused space [B, C, h, w] to pixels [B, 3, R, R] about [0, 1], for what looks at images while they are painted."""
        return (x + 1) / 2 if self.codec is None else self.codec.pixels(x)

    def check(self, requests: Sequence[GenerationRequest], config: cfg.Generate) -> None:
        """UserError for what steers away from the null class, or is measured in that, without one."""
        if self.meta.get("null", True) or config.weak:
            return
        if (guided := next((r for r in requests if r.guidance != 1), None)) is not None:
            raise UserError(f"guidance {guided.guidance:g}: the denoiser has no null class; set generate.guidance=1")
        if any(r.hardness or (r.likeness and config.likeness_kind == "features") for r in requests):
            key = "hardness" if any(r.hardness for r in requests) else "likeness"
            raise UserError(f"generate.{key} is measured in classifier-free guidance, and the denoiser has no null class; set 0")

    def paint(self, requests: Sequence[GenerationRequest], sources: Sources, config: cfg.Generate) -> list[Painted]:
        """Every request, in the order asked."""
        self.check(requests, config)
        found = {p.request.request_id: p for p in self.canvas(config).stream(requests, sources)}
        return [found[r.request_id] for r in requests]


def load(denoiser: Path, device: torch.device | str = "cpu", codec_folder: Path | None = None) -> Painter:
    """The painter of a denoiser's folder. codec_folder: its codec's; None: the folder `codec` beside it, as a run keeps them."""
    device = torch.device(device)
    try:
        kind = json.loads((Path(denoiser) / weights.CONFIG).read_text()).get("kind")
    except (OSError, json.JSONDecodeError) as e:
        raise UserError(f"{denoiser} holds no denoiser ({e}); give a denoiser's folder") from None
    model, meta, fingerprint = (external if kind == external.KIND else edm).load(Path(denoiser), device)
    space = meta.get("codec")
    found = None if space is None else codec.load(codec_folder or Path(denoiser).parent / "codec", device, space)
    return Painter(model, found, meta, fingerprint, device)
