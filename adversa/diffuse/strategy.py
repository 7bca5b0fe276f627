"""From a request to the row that paints it: where it starts, what is kept, and what is asked at
each noise level.

| strategy | starts from | paints |
| --- | --- | --- |
| sample | noise | all |
| vary | the hard case and noise of `sigma_start` | all |
| inpaint | noise inside the lesion | a new lesion on the same skin |
| outpaint | noise outside of the lesion | the same lesion on new skin |
| inout | as inpaint, and its result then as outpaint | a new lesion, then new skin around it |
| blend | two hard cases of one class, mixed, and noise | all |

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
from adversa.diffuse.batch import Course, Row
from adversa.diffuse.solver import SOLVERS, karras_sigmas, share_of_steps
from adversa.types import FILLING, STRATEGIES, GenerationRequest, seed_of

MIXED = (0.3, 0.7)  # of `blend`: the range of the second case's share


@dataclass(frozen=True)
class Sources:
    """What requests refer to by an example's id: images uint8 [R, R, 3]; inside, outside float32
    [R, R] in [0, 1]: what inpainting and outpainting paint, 0 where a pixel is kept exactly.
    """

    images: dict[str, np.ndarray] = field(default_factory=dict)
    inside: dict[str, np.ndarray] = field(default_factory=dict)
    outside: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Space:
    """The diffused space: shape (C, h, w), and where in it the examples lie, float32 [C, h, w] on
    the CPU.
    """

    shape: tuple[int, int, int]
    places: dict[str, Tensor] = field(default_factory=dict)


def generator_of(request: GenerationRequest) -> Generator:
    return torch.Generator("cpu").manual_seed(request.seed)


def course(request: GenerationRequest, start: float, config: cfg.Generate) -> Course:
    """Noise levels from `start` down, and which guidance acts where. A start below sigma_max takes
    its share of the steps.
    """
    count = share_of_steps(start, config.sigma_max, config.sigma_min, config.rho, config.steps)
    plan = SOLVERS[config.solver](karras_sigmas(start, config.sigma_min, config.rho, count))
    sigma = plan.sigma
    steers = (sigma > config.hardness_low) & (sigma <= config.hardness_high)
    due = steers & ((np.cumsum(steers) - 1) % config.hardness_every == 0)
    hardness, likeness = (
        due * request.hardness,
        (steers if config.likeness_kind == "pixels" else due) * request.likeness,
    )
    active = (
        (sigma > config.guidance_low) & (sigma <= config.guidance_high) & (request.guidance != 1)
    )
    measured = (hardness > 0) | (
        (likeness > 0) & (config.likeness_kind == "features")
    )  # in classifier-free corrections
    return Course(
        plan, np.where(active, request.guidance, 1.0), active | measured, hardness, likeness
    )


def start_of(request: GenerationRequest, config: cfg.Generate) -> float:
    """The noise level at which a request's row starts."""
    return config.sigma_max if request.strategy == "sample" else request.sigma_start


def row(
    key: int,
    request: GenerationRequest,
    sources: Sources,
    space: Space,
    config: cfg.Generate,
    goal: Callable[[str], Tensor] | None = None,
) -> Row:
    """The row of a request. goal: of likeness, by example id (None: the example in the diffused
    space).
    """
    assert request.strategy in STRATEGIES, request.strategy
    generator, start = generator_of(request), start_of(request, config)
    noise = torch.randn(space.shape, generator=generator)
    made = Row(key, start * noise, course(request, start, config), request.label)
    if request.likeness:
        assert request.example is not None, "likeness to nothing"
        made.goal = goal(request.example) if goal is not None else space.places[request.example]
    if request.strategy == "sample":
        return made
    assert request.example is not None, f"{request.strategy} without an example"
    case = space.places[request.example]
    if request.strategy == "blend":
        assert request.partner is not None, "blend without a partner"
        share = MIXED[0] + (MIXED[1] - MIXED[0]) * float(torch.rand((), generator=generator))
        case = torch.lerp(case, space.places[request.partner], share)
    made.start = case + made.start
    if request.strategy in FILLING:
        made.known = case
        made.soft = _fit(
            (sources.outside if request.strategy == "outpaint" else sources.inside)[
                request.example
            ],
            space,
        )
    if request.strategy == "inout":
        made.then = _around(made, request, sources, space, config)
    return made


def _around(
    first: Row, request: GenerationRequest, sources: Sources, space: Space, config: cfg.Generate
) -> Callable[[Tensor], Row]:
    """The second half of `inout`: keeps the new lesion and paints new skin, with noise of its
    own.
    """
    assert request.example is not None
    again = replace(request, strategy="outpaint", seed=seed_of("inout", request.seed))
    soft = _fit(sources.outside[request.example], space)

    def then(end: Tensor) -> Row:
        known = end.cpu()
        noise = torch.randn(space.shape, generator=generator_of(again))
        sigma = start_of(again, config)
        return Row(
            first.key,
            known + sigma * noise,
            course(again, sigma, config),
            first.label,
            known,
            soft,
            first.goal,
        )

    return then


def _fit(soft: np.ndarray, space: Space) -> Tensor:
    """float32 [R, R] to the diffused side, [1, h, w]: means. A latent that touches a kept pixel is
    kept in part.
    """
    return F.adaptive_avg_pool2d(torch.from_numpy(soft)[None, None], space.shape[1:])[0]


def composed(painted: np.ndarray, request: GenerationRequest, sources: Sources) -> np.ndarray:
    """uint8 [R, R, 3]: what was painted over what is kept, which comes back exactly (a codec's way
    there and back does not).

    `inout` keeps nothing of the hard case.
    """
    if request.strategy not in ("inpaint", "outpaint"):
        return painted
    assert request.example is not None
    known = sources.images[request.example]
    soft = (sources.inside if request.strategy == "inpaint" else sources.outside)[request.example][
        ..., None
    ]
    return np.rint(known + soft * (painted.astype(np.float32) - known)).astype(np.uint8)
