"""From a request to its row of a batch: where it starts, what is kept, and which guidance acts at
each noise level.

| strategy | starts from | generates |
| --- | --- | --- |
| sample | noise | the whole image |
| img2img | the hard case with noise of `sigma_start` (SDEdit) | the whole image |
| inpaint | noise inside the lesion | a new lesion on the same skin |
| outpaint | noise outside of the lesion | the same lesion on new skin |
| inout | as inpaint, and its result then as outpaint | a new lesion, then new skin around it |
| interpolate | two hard cases of one class, mixed, with noise | the whole image |

All randomness comes from the request's own generator, on the CPU, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from adversa import config as cfg
from adversa.diffuse.batch import BatchRow, Schedule
from adversa.diffuse.solver import SOLVERS, karras_sigmas, share_of_steps
from adversa.types import FILLING, STRATEGIES, GenerationRequest, seed_of

MIXED = (0.3, 0.7)  # of `interpolate`: the range of the second case's share


@dataclass(frozen=True)
class Sources:
    """The images that requests name by their example's id.

    images: uint8 [R, R, 3]. inside, outside: float32 [R, R] in [0, 1], what inpainting and
    outpainting generate; 0 where a pixel is kept exactly.
    """

    images: dict[str, np.ndarray] = field(default_factory=dict)
    inside: dict[str, np.ndarray] = field(default_factory=dict)
    outside: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class DiffusedSpace:
    """The diffused space: its shape (C, h, w), and the examples encoded in it, float32 [C, h, w] on
    the CPU.
    """

    shape: tuple[int, int, int]
    encoded: dict[str, Tensor] = field(default_factory=dict)


def generator_of(request: GenerationRequest) -> Generator:
    """The random generator of a request, on the CPU."""
    return torch.Generator("cpu").manual_seed(request.seed)


def schedule(request: GenerationRequest, start: float, config: cfg.Generate) -> Schedule:
    """The noise levels from `start` down, and which guidance acts at each.

    A start below sigma_max takes its share of the steps.
    """
    count = share_of_steps(start, config.sigma_max, config.sigma_min, config.rho, config.steps)
    table = SOLVERS[config.solver](karras_sigmas(start, config.sigma_min, config.rho, count))
    sigma = table.sigma
    steers = (sigma > config.classifier_guidance_low) & (sigma <= config.classifier_guidance_high)
    due = steers & ((np.cumsum(steers) - 1) % config.classifier_guidance_every == 0)
    classifier_guidance, reference_guidance = (
        due * request.classifier_guidance,
        (steers if config.reference_guidance_space == "pixels" else due)
        * request.reference_guidance,
    )
    active = (
        (sigma > config.guidance_low) & (sigma <= config.guidance_high) & (request.guidance != 1)
    )
    measured = (classifier_guidance > 0) | (
        (reference_guidance > 0) & (config.reference_guidance_space == "features")
    )  # in classifier-free corrections
    return Schedule(
        table,
        np.where(active, request.guidance, 1.0),
        active | measured,
        classifier_guidance,
        reference_guidance,
    )


def start_of(request: GenerationRequest, config: cfg.Generate) -> float:
    """The noise level at which a request's row starts."""
    return config.sigma_max if request.strategy == "sample" else request.sigma_start


def row(
    key: int,
    request: GenerationRequest,
    sources: Sources,
    space: DiffusedSpace,
    config: cfg.Generate,
    reference: Callable[[str], Tensor] | None = None,
) -> BatchRow:
    """The row of a request.

    reference: example id to what reference guidance pulls towards; None: the example in the
    diffused space.
    """
    assert request.strategy in STRATEGIES, request.strategy
    generator, start = generator_of(request), start_of(request, config)
    noise = torch.randn(space.shape, generator=generator)
    made = BatchRow(key, start * noise, schedule(request, start, config), request.label)
    if request.reference_guidance:
        assert request.example is not None, "reference guidance without an example"
        made.reference = (
            reference(request.example) if reference is not None else space.encoded[request.example]
        )
    if request.strategy == "sample":
        return made
    assert request.example is not None, f"{request.strategy} without an example"
    case = space.encoded[request.example]
    if request.strategy == "interpolate":
        assert request.partner is not None, "interpolate without a partner"
        share = MIXED[0] + (MIXED[1] - MIXED[0]) * float(torch.rand((), generator=generator))
        case = torch.lerp(case, space.encoded[request.partner], share)
    made.start = case + made.start
    if request.strategy in FILLING:
        made.source = case
        made.mask = _fit(
            (sources.outside if request.strategy == "outpaint" else sources.inside)[
                request.example
            ],
            space,
        )
    if request.strategy == "inout":
        made.then = _around(made, request, sources, space, config)
    return made


def _around(
    first: BatchRow,
    request: GenerationRequest,
    sources: Sources,
    space: DiffusedSpace,
    config: cfg.Generate,
) -> Callable[[Tensor], BatchRow]:
    """What makes the second row of `inout`: it keeps the new lesion and generates new skin."""
    assert request.example is not None
    again = replace(request, strategy="outpaint", seed=seed_of("inout", request.seed))
    mask = _fit(sources.outside[request.example], space)

    def then(end: Tensor) -> BatchRow:
        source = end.cpu()
        noise = torch.randn(space.shape, generator=generator_of(again))
        sigma = start_of(again, config)
        return BatchRow(
            first.key,
            source + sigma * noise,
            schedule(again, sigma, config),
            first.label,
            source,
            mask,
            first.reference,
        )

    return then


def _fit(mask: np.ndarray, space: DiffusedSpace) -> Tensor:
    """A mask float32 [R, R] as means over the diffused side, [1, h, w]: a latent that touches a
    kept pixel is kept in part.
    """
    return F.adaptive_avg_pool2d(torch.from_numpy(mask)[None, None], space.shape[1:])[0]


def composed(generated: np.ndarray, request: GenerationRequest, sources: Sources) -> np.ndarray:
    """The image uint8 [R, R, 3] with its kept pixels put back exactly, which a codec would not do.

    `inout` keeps nothing of the hard case.
    """
    if request.strategy not in ("inpaint", "outpaint"):
        return generated
    assert request.example is not None
    source = sources.images[request.example]
    mask = (sources.inside if request.strategy == "inpaint" else sources.outside)[request.example][
        ..., None
    ]
    mixed: np.ndarray = np.rint(source + mask * (generated.astype(np.float32) - source))
    return mixed.astype(np.uint8)
