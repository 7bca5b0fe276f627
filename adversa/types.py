"""The nouns that steps hand to each other. Plain frozen dataclasses; `storage.tables` says how each
lies on disk.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# What is told as a JSON object: keys are its names.
Json: TypeAlias = "dict[str, Any]"
Floats: TypeAlias = "NDArray[np.float64]"
Ints: TypeAlias = "NDArray[np.int64]"
Pixels: TypeAlias = "NDArray[np.uint8]"

ROLES = ("train", "mine", "select", "test")
ARMS = ("real", "resample", "replay", "unguided", "guided")
# the classifiers of arm `real` before the first round, where folded images change that arm
BEFORE = "before"
GENERATED = ("unguided", "guided")  # the arms that have synthetic images
FILLING = (
    "inpaint",
    "outpaint",
    "inout",
)  # the strategies that generate one part of a picture and keep the other
STRATEGIES = ("sample", "img2img", "inpaint", "outpaint", "inout", "interpolate")


class UserError(ValueError):
    """A fault that is fixable by the user. The message is one line: what, the value, the fix. The
    command exits with 2.
    """


def digest(*parts: object, size: int = 16) -> str:
    """Hex digest (2 * `size` characters) of the parts' text; parts are separated, so ("ab", "c")
    differs from ("a", "bc").
    """
    h = hashlib.blake2b(digest_size=size)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()


def seed_of(*parts: object) -> int:
    """A 63-bit seed made from the parts: the same on any machine, in any order of calls."""
    return int(digest(*parts, size=8), 16) >> 1


def share_of(size: int, rank: int, world: int) -> slice:
    """Worker `rank`'s rows of a batch of `size`: contiguous, all `world` workers' together the
    whole.

    Cut between pairs of rows, so that rows 2 i and 2 i + 1 lie on one worker (what partners are in
    classify/mixing.py) and shares differ by 2 at most. Only a batch of fewer pairs than workers is
    cut anywhere, with shares that differ by 1 at most: each worker has a row as long as there are
    as many rows as workers, and with fewer the first workers have none.
    """
    unit = 2 if (size + 1) // 2 >= world else 1
    units = -(-size // unit)  # of an odd batch the last pair is one row
    first, last = (min(size, unit * (units * r // world)) for r in (rank, rank + 1))
    return slice(first, last)


@dataclass(frozen=True)
class Example:
    """A real image. `image` is lossless PNG at the run's resolution; `mask` likewise (one channel,
    0 or 255) or None.
    """

    id: str
    source: str
    label: int
    group: str
    patient: str
    attributes: dict[str, str] = field(default_factory=dict)
    image: bytes = b""
    mask: bytes | None = None


@dataclass(frozen=True)
class HardCase:
    """A real image of the mine role that the classifier gets wrong, or nearly. loss in nats; margin
    = p[label] - max other p.
    """

    example: str
    label: int
    predicted: int
    loss: float
    margin: float
    reason: str  # "misclassified" or "near miss"
    rank: int  # 0 is the first taken


@dataclass(frozen=True)
class GenerationRequest:
    """One image to generate. `example` is the hard case it starts from or stands for; None for
    unguided requests.

    sigma_start is the EDM noise level (in units of data scaled to [-1, 1]) at which sampling
    starts; guidance is the classifier-free scale w in  x_uncond + w (x_cond - x_uncond): 1 means no
    guidance. partner: the second hard case of `interpolate`. classifier_guidance,
    reference_guidance: how strongly it is steered towards what the target classifier finds
    hard, and towards its hard case; 0 means not at all. classifier: fingerprint of the one that
    found the hard case and steers, trained in the round classifier_round: the guidance is as many
    rounds stale as lie between. "" and 0 where no classifier had a say.
    """

    request_id: str
    round: int
    arm: str
    strategy: str
    label: int
    example: str | None
    sigma_start: float
    guidance: float
    seed: int
    partner: str | None = None
    classifier_guidance: float = 0.0
    reference_guidance: float = 0.0
    classifier: str = ""
    classifier_round: int = 0


@dataclass(frozen=True)
class SyntheticImage:
    request_id: str
    arm: str
    label: int
    image: bytes
    finite: bool
    denoiser: str  # fingerprint of the denoiser that generated it
    evaluations: int = 0  # rows of the denoiser it took
    skipped: int = 0  # steering gradients that were not finite
    fault: str | None = None  # why it could not be generated


@dataclass(frozen=True)
class Scorecard:
    """The metrics of one classifier on one role. intervals: 95%, by a bootstrap clustered by
    lesion; absent where not computed.
    """

    arm: str
    seed: int
    round: int
    role: str
    n: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def request_id(run: str, round: int, arm: str, example: str, strategy: str, replicate: int) -> str:
    """The id of a request: a pure function of what is asked, so that any machine, any order, any
    batch agrees on it.
    """
    return digest(run, round, arm, example, strategy, replicate, size=10)
