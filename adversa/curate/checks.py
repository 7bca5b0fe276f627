"""The table of the filter's checks: the columns of a verdict, the decision, the cards and the
report are made from it.

To add a check, write the function that measures it and add a row to CHECKS.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from adversa.config.curate import Curate
from adversa.types import Floats

SIDES = {"at least": ("\u2265", operator.ge), "at most": ("\u2264", operator.le)} | {
    "below": ("<", operator.lt)
}
# By the column of the limit; a tuple has one number a class [K], None turns the check off.
Thresholds = Mapping[str, float | tuple[float, ...] | None]


@dataclass(frozen=True)
class Candidates:
    """N generated images and what was measured of them, in one order. None: nobody measured it.

    Attributes:
        request_ids: Their requests'.
        arms: Those that they are of.
        labels: The classes that they were asked for as, by number.
        strategies: How they were made.
        sources: The examples that they start from or stand for; None: none.
        finite: Whether the sampler met finite numbers only.
        faults: Why an image could not be generated.
        images: uint8 [N, H, W, 3].
        probs: The verifier's distributions [N, K].
        ratio: `realism.Manifold.ratio` in the classifier's features [N].
        ratio_2: The same in the verifier's features [N].
        similarity: To the nearest real image in pixels [N] (`NearCopy.nearest`).
        nearest: Its id.
        similarity_2: To the nearest real image in features [N] (`NearFeatures.nearest`).
        nearest_2: Its id.
    """

    request_ids: Sequence[str]
    arms: Sequence[str]
    labels: Sequence[int]
    strategies: Sequence[str]
    sources: Sequence[str | None]
    finite: Sequence[bool]
    faults: Sequence[str | None]
    images: np.ndarray
    probs: np.ndarray | None = None
    ratio: np.ndarray | None = None
    ratio_2: np.ndarray | None = None
    similarity: np.ndarray | None = None
    nearest: Sequence[str] | None = None
    similarity_2: np.ndarray | None = None
    nearest_2: Sequence[str] | None = None


@dataclass(frozen=True)
class Check:
    """One check: a number of each image, the limit it is held to, and how both are named.

    Attributes:
        reason: The verdict's reason where the check fails.
        number: Column of the number; checks that stand together may share it.
        side: Where the number must lie of its limit.
        limit: Column of the limit.
        threshold: The limit, from the settings and what was measured on real images
            (thresholds.json).
        measure: The numbers [N] of candidates; None: `filter.finalize` finds them.
        what: What the number is, on a card.
        title: Name of the number in the gallery.
        digits: Its digits there.
        off: What is not checked where the check is off, in the report; "": it is never off.
        mark: How the gallery marks an image that failed.
        neighbour: Column of the id of the image that it was compared with.
        kind: Type of both columns, as it is annotated.
        nothing: The number that stands for none.
        needs: Column of another limit, without which this check is off.
        vacuous: A limit that rejects nothing.
    """

    reason: str
    number: str
    side: Literal["at least", "at most", "below"]
    limit: str
    threshold: Callable[[Curate, Mapping[str, Any]], float | list[float] | tuple[float, ...] | None]
    measure: Callable[[Candidates], np.ndarray | None] | None
    what: str
    title: str
    digits: int
    off: str
    mark: str = "none"
    neighbour: str = ""
    kind: Literal["float", "int"] = "float"
    nothing: float | None = None
    needs: str = ""
    vacuous: float | None = None

    def bound(self, verdict: Mapping[str, Any]) -> float | None:
        """The limit that a verdict's number was held to; None: the check was off."""
        off = self.needs and verdict.get(self.needs) is None
        return None if off else verdict.get(self.limit)

    def passed(self, verdict: Mapping[str, Any]) -> bool:
        """Whether a verdict's number keeps to its limit; NaN never does."""
        bound = self.bound(verdict)
        return bound is None or bool(SIDES[self.side][1](verdict[self.number], bound))

    @property
    def sign(self) -> str:
        return SIDES[self.side][0]


def contrast(candidates: Candidates) -> Floats:
    """Standard deviation of brightness, grey levels [N]."""
    grey = candidates.images.reshape(len(candidates.images), -1, 3).mean(axis=2)
    found: Floats = grey.std(axis=1)
    return found


def clipped(candidates: Candidates) -> Floats:
    """Share of values that are 0 or 255 [N]."""
    ends = (candidates.images == 0) | (candidates.images == 255)
    share: Floats = ends.reshape(len(ends), -1).mean(axis=1)
    return share


def agreement(candidates: Candidates) -> np.ndarray | None:
    """The verifier's p[label] [N]; NaN where a row is no distribution (missing, not finite,
    negative, not adding up to 1).
    """
    if candidates.probs is None:
        return None
    p = np.asarray(candidates.probs, np.float64)
    valid = np.isfinite(p).all(axis=1) & (p >= 0).all(axis=1) & (abs(p.sum(axis=1) - 1) <= 1e-2)
    return np.where(valid, p[np.arange(len(p)), candidates.labels], np.nan)


# In the order in which they are given as the reason.
CHECKS: tuple[Check, ...] = (
    Check(
        reason="flat",
        number="contrast",
        side="at least",
        limit="contrast_limit",
        threshold=lambda config, _: config.min_contrast,
        measure=contrast,
        what="standard deviation of brightness, grey levels",
        title="contrast",
        digits=1,
        off="flat images",
        mark="broken",
    ),
    Check(
        reason="out of range",
        number="clipped",
        side="at most",
        limit="clipped_limit",
        threshold=lambda config, _: config.max_clipped,
        measure=clipped,
        what="share of values that are 0 or 255",
        title="clipped",
        digits=2,
        off="images out of range",
        mark="broken",
    ),
    Check(
        reason="judge disagrees",
        number="agreement",
        side="at least",
        limit="agreement_least",
        threshold=lambda config, _: config.min_agreement if config.folds else None,
        measure=agreement,
        what="verifier's probability of the label",
        title="verifier",
        digits=2,
        off="",
        mark="disagrees",
    ),
    Check(  # what lies above is surer than real images are
        reason="trivial",
        number="agreement",
        side="at most",
        limit="agreement_most",
        threshold=lambda config, real: (
            1.0 if config.trivial_quantile is None else real["most_agreement"]
        ),
        measure=agreement,
        what="verifier's probability of the label",
        title="verifier",
        digits=2,
        off="images that are trivial to the verifier",
        mark="disagrees",
        needs="agreement_least",
        vacuous=1.0,
    ),
    Check(
        reason="unlike real images",
        number="realism",
        side="at most",
        limit="realism_limit",
        threshold=lambda config, real: None if config.realism_quantile is None else real["realism"],
        measure=lambda candidates: candidates.ratio,
        what="distance to real images, first feature space",
        title="realism",
        digits=2,
        off="distance to the real images, first feature space",
    ),
    Check(
        reason="unlike real images (second)",
        number="realism_2",
        side="at most",
        limit="realism_2_limit",
        threshold=lambda config, real: (
            None if config.realism_quantile is None else real["realism_2"]
        ),
        measure=lambda candidates: candidates.ratio_2,
        what="distance to real images, second feature space",
        title="realism, second",
        digits=2,
        off="distance to the real images, second feature space",
    ),
    Check(
        reason="near copy",
        number="similarity",
        side="below",
        limit="similarity_limit",
        threshold=lambda _, real: real["near_copy"],
        measure=lambda candidates: candidates.similarity,
        what="similarity to the nearest real image in pixels",
        title="pixels",
        digits=3,
        off="near copies in pixels",
        mark="copy",
        neighbour="nearest",
    ),
    Check(
        reason="near copy in features",
        number="similarity_2",
        side="below",
        limit="similarity_2_limit",
        threshold=lambda _, real: real["near_copy_features"],
        measure=lambda candidates: candidates.similarity_2,
        what="similarity to the nearest real image in features",
        title="features",
        digits=3,
        off="near copies in features",
        mark="copy",
        neighbour="nearest_2",
    ),
    Check(
        reason="near twin",
        number="twin_similarity",
        side="below",
        limit="twin_limit",
        threshold=lambda config, real: real["near_copy"] if config.twins else None,
        measure=None,
        what="similarity to another image of the arm",
        title="twin",
        digits=3,
        off="near-duplicates among the synthetic images",
        mark="copy",
        neighbour="twin",
        nothing=-1,
    ),
    Check(
        reason="over quota",
        number="place",
        side="at most",
        limit="quota",
        threshold=lambda config, _: config.quota,
        measure=None,
        what="images of one hard case, an arm and round",
        title="of its source",
        digits=0,
        off="quota of a source image",
        kind="int",
        nothing=0,
    ),
)
FIRST = tuple(c for c in CHECKS if c.measure)  # of each image by itself
FINAL = tuple(c for c in CHECKS if not c.measure)  # over all images of a round


class Column(NamedTuple):
    """A column of a verdict: its type as it is annotated, and its default."""

    name: str
    kind: str
    default: float | str | None


def columns(checks: Sequence[Check] = CHECKS) -> list[Column]:
    """What checks add to a verdict, each column once: neighbours, numbers, limits; integers last.

    A number is NaN where it is not known, a limit None where the check is off.
    """
    found = [Column(c.neighbour, "str", "") for c in checks if c.neighbour]
    found += [Column(c.number, c.kind, 0 if c.kind == "int" else np.nan) for c in checks]
    found += [Column(c.limit, f"{c.kind} | None", None) for c in checks]
    unique = {c.name: c for c in found}.values()
    return sorted(unique, key=lambda c: c.kind.startswith("int"))


def thresholds(config: Curate, measured: Mapping[str, Any]) -> Thresholds:
    """The limit of each check. measured: on real images (thresholds.json)."""
    found = {c.limit: c.threshold(config, measured) for c in CHECKS}
    return {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in found.items()}
