"""The image generator: a denoiser of any kind, with the codec of the space it diffuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from adversa import config as cfg
from adversa.config.base import Amp
from adversa.diffuse import codec, edm, external
from adversa.diffuse.pipeline import GeneratedImage, GenerationPipeline, Steering
from adversa.diffuse.strategy import Sources
from adversa.storage import once, weights
from adversa.storage.path import StoragePath, storage_path
from adversa.training.precision import autocast
from adversa.types import GenerationRequest, Json, UserError


@dataclass(frozen=True)
class ImageGenerator:
    """A denoiser and its codec, loaded.

    codec: None where pixels are diffused. meta: the denoiser's config.json. fingerprint: of the
    denoiser.
    """

    denoiser: edm.DenoiserFn
    codec: codec.ImageCodec | None
    meta: Json
    fingerprint: str
    device: torch.device
    _compiled: dict[tuple[int, Amp], edm.DenoiserFn] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def side(self) -> int:
        """The side of the images, in pixels."""
        factor: int = 1 if self.codec is None else self.codec.meta["factor"]
        return factor * int(self.meta["resolution"])

    def pipeline(
        self, config: cfg.Generate, steering: Steering | None = None
    ) -> GenerationPipeline:
        """The pipeline that generates with these settings."""
        denoiser = self.compiled(config.batch_size, config.amp) if config.compile else self.denoiser
        found = GenerationPipeline(
            denoiser, self.meta, config, self.device, steering=steering or Steering()
        )
        if self.codec is None:
            return found
        return replace(found, encode=self.codec.to_space, decode=self.codec.decode)

    def compiled(self, rows: int, amp: Amp) -> edm.DenoiserFn:
        """The denoiser, compiled for so many rows. UserError where this machine cannot."""
        if (rows, amp) not in self._compiled:
            self._compiled[rows, amp] = compile_(self.denoiser, self.meta, self.device, rows, amp)
        return self._compiled[rows, amp]

    def pixels(self, x: Tensor) -> Tensor:
        """The diffused space [B, C, h, w] as pixels [B, 3, R, R] about [0, 1], for models that
        guide.
        """
        return (x + 1) / 2 if self.codec is None else self.codec.pixels(x)

    def check(self, requests: Sequence[GenerationRequest], config: cfg.Generate) -> None:
        """UserError where guidance needs a null class, and the denoiser has none."""
        if self.meta.get("null", True) or config.weak:
            return
        if (guided := next((r for r in requests if r.guidance != 1), None)) is not None:
            raise UserError(
                f"guidance {guided.guidance:g}: the denoiser has no null class; set "
                "generate.guidance=1"
            )
        if any(
            r.classifier_guidance
            or (r.reference_guidance and config.reference_guidance_space == "features")
            for r in requests
        ):
            key = (
                "classifier_guidance"
                if any(r.classifier_guidance for r in requests)
                else "reference_guidance"
            )
            raise UserError(
                f"generate.{key} is measured in classifier-free guidance, and the denoiser "
                "has no null class; set 0"
            )

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sources: Sources,
        config: cfg.Generate,
        steering: Steering | None = None,
    ) -> list[GeneratedImage]:
        """The images of all requests, in their order."""
        self.check(requests, config)
        found = {
            p.request.request_id: p
            for p in self.pipeline(config, steering).stream(requests, sources)
        }
        return [found[r.request_id] for r in requests]


def load(
    denoiser: StoragePath,
    device: torch.device | str = "cpu",
    codec_folder: StoragePath | None = None,
) -> ImageGenerator:
    """The image generator of a denoiser's folder.

    codec_folder: its codec's; None: the folder `codec` beside it, as a run keeps them.
    """
    device = torch.device(device)
    model, meta, fingerprint = read(storage_path(denoiser), device)
    space = meta.get("codec")
    found = (
        None
        if space is None
        else codec.load(codec_folder or storage_path(denoiser).parent / "codec", device, space)
    )
    return ImageGenerator(model, found, meta, fingerprint, device)


def read(folder: StoragePath, device: torch.device) -> tuple[edm.DenoiserFn, Json, str]:
    """(denoiser, its config.json, fingerprint) of a folder of any kind. UserError where it holds
    none.
    """
    load_ = external.load if _kind(folder) == external.KIND else edm.load
    return load_(folder, device)


def fingerprint(folder: StoragePath) -> str:
    """The fingerprint that `read` gives, without building the model."""
    if _kind(folder) == external.KIND:
        return hashlib.sha256(once.read_bytes(folder / weights.CONFIG)).hexdigest()[:32]
    return weights.read_model(folder)[2]


def _kind(folder: StoragePath) -> str | None:
    try:
        found: str | None = json.loads(once.read_bytes(folder / weights.CONFIG)).get("kind")
        return found
    except (OSError, json.JSONDecodeError) as e:
        raise UserError(f"{folder} holds no denoiser ({e}); give a denoiser's folder") from None


@torch.no_grad()
def compile_(
    denoiser: edm.DenoiserFn, meta: Json, device: torch.device, rows: int, amp: Amp
) -> edm.DenoiserFn:
    """The denoiser by torch.compile, for one static shape, with CUDA graphs on a GPU.

    It is compiled here, so that nothing later waits for it. UserError where this machine cannot.
    """
    from torch._dynamo.exc import TorchDynamoException

    graphs = device.type == "cuda"
    made = torch.compile(denoiser, dynamic=False, mode="reduce-overhead" if graphs else None)

    def run(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        answer = made(x, sigma, label)
        return answer.clone() if graphs else answer  # a graph writes its next answer over this one

    x = torch.zeros(
        rows, meta.get("channels", 3), meta["resolution"], meta["resolution"], device=device
    )
    sigma, label = (
        torch.ones(rows, device=device),
        torch.zeros(rows, dtype=torch.int64, device=device),
    )
    try:
        for _ in range(3 if graphs else 1):  # CUDA graphs are recorded after a warm-up
            with autocast(device, amp):
                run(x, sigma, label)
    except TorchDynamoException as e:
        cause = " ".join(str(e).split())[:200]
        fix = "set generate.compile=false, or install a C++ compiler"
        raise UserError(f"generate.compile: torch.compile fails here ({cause}); {fix}") from None
    return run
