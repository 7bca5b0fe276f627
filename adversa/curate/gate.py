"""A verdict for each synthetic image: may it enter training, and if not, why not.

Two passes. `inspect` looks at each image by itself: a number and a limit for each check, the first
check that is not passed is the reason. `settle` then looks at all of a round's verdicts: near
twins, and a quota for each source image. Both fail closed: a number that is not known does not
pass, and what `inspect` passed is not kept before `settle` has seen it. Neither depends on the
order of images or on how they are divided into parts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adversa.types import Verdict

KEPT, NOT_PAINTED, NOT_FINITE, DISAGREES, NEAR_COPY = (
    "kept",
    "not painted",
    "not finite",
    "judge disagrees",
    "near copy",
)
FLAT, CLIPPED, TRIVIAL, UNREAL, UNREAL_2 = (
    "flat",
    "out of range",
    "trivial",
    "unlike real images",
    "unlike real images (second)",
)
NEAR_COPY_2, PENDING, TWIN, QUOTA = (
    "near copy in features",
    "not settled",
    "near twin",
    "over quota",
)
EVERY_REASON = (
    KEPT,
    NOT_PAINTED,
    NOT_FINITE,
    FLAT,
    CLIPPED,
    DISAGREES,
    TRIVIAL,
    UNREAL,
    UNREAL_2,
    NEAR_COPY,
    NEAR_COPY_2,
    PENDING,
    TWIN,
    QUOTA,
)


@dataclass(frozen=True)
class Limits:
    """What an image must keep to. None turns a check off (its number is still written where it is
    known).

    agreement: the judge's p[label] must lie in [least, most] (least None: there is no judge). What
    lies above is trivial: surer than real images are. realism, realism_2: largest ratio to the
    manifold in each feature space, one number a class [K] (`realism.limits`). near_copy,
    near_copy_features, twin: similarity from which on (`NearCopy.threshold`,
    `NearFeatures.threshold`). contrast: least standard deviation of brightness, grey levels;
    clipped: largest share of values that are 0 or 255. quota: images kept of one source image,
    within an arm.
    """

    near_copy: float | None
    least_agreement: float | None = 0.2
    most_agreement: float = 1.0
    contrast: float | None = 2.0
    clipped: float | None = 0.5
    realism: tuple[float, ...] | None = None
    realism_2: tuple[float, ...] | None = None
    near_copy_features: float | None = None
    twin: float | None = None
    quota: int | None = None

    def __post_init__(self) -> None:
        numbers = [
            self.least_agreement,
            self.most_agreement,
            self.contrast,
            self.clipped,
            self.near_copy,
            self.near_copy_features,
        ]
        numbers += [self.twin, self.quota, *(self.realism or ()), *(self.realism_2 or ())]
        assert all(np.isfinite(x) for x in numbers if x is not None), self


@dataclass(frozen=True)
class Painted:
    """What is asked about N images, in their order. None: nobody measured it.

    images uint8 [N, H, W, 3]; probs: the judge's distributions [N, K]; ratio, ratio_2:
    `realism.Manifold.ratio` in two feature spaces [N]; similarity, nearest: of `NearCopy.nearest`;
    similarity_2, nearest_2: of `NearFeatures.nearest`. finite: the sampler met no number that is
    not finite; faults: why it could not paint the image.
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


# In the order in which they are given as the reason. Each holds where the check is passed; with NaN
# none does.
CHECKS: tuple[tuple[str, Callable[[Verdict], bool]], ...] = (
    (FLAT, lambda f: f.contrast_limit is None or f.contrast >= f.contrast_limit),
    (CLIPPED, lambda f: f.clipped_limit is None or f.clipped <= f.clipped_limit),
    (DISAGREES, lambda f: f.agreement_least is None or f.agreement >= f.agreement_least),
    (TRIVIAL, lambda f: f.agreement_least is None or f.agreement <= f.agreement_most),
    (UNREAL, lambda f: f.realism_limit is None or f.realism <= f.realism_limit),
    (UNREAL_2, lambda f: f.realism_2_limit is None or f.realism_2 <= f.realism_2_limit),
    (NEAR_COPY, lambda f: f.similarity_limit is None or f.similarity < f.similarity_limit),
    (NEAR_COPY_2, lambda f: f.similarity_2_limit is None or f.similarity_2 < f.similarity_2_limit),
)


def inspect(painted: Painted, limits: Limits) -> list[Verdict]:
    """The first pass: each image by itself. What passes every check is "not settled", and not kept,
    until `settle`.
    """
    n = len(painted.request_ids)
    for name, value in vars(painted).items():
        assert value is None or len(value) == n, (name, n)
    grey = painted.images.reshape(n, -1, 3).mean(axis=2)
    contrast = grey.std(axis=1)
    ends = (painted.images == 0) | (painted.images == 255)
    clipped = ends.reshape(n, -1).mean(axis=1) if n else np.zeros(0)
    out = []
    for i in range(n):
        label = int(painted.labels[i])
        found = Verdict(
            request_id=painted.request_ids[i],
            arm=painted.arms[i],
            label=label,
            strategy=painted.strategies[i],
            source=painted.sources[i],
            keep=False,
            reason=PENDING,
            contrast=float(contrast[i]),
            contrast_limit=limits.contrast,
            clipped=float(clipped[i]),
            clipped_limit=limits.clipped,
            agreement=_agreement(painted.probs, i, label),
            agreement_least=limits.least_agreement,
            agreement_most=limits.most_agreement,
            realism=_number(painted.ratio, i),
            realism_limit=_of_class(limits.realism, label),
            realism_2=_number(painted.ratio_2, i),
            realism_2_limit=_of_class(limits.realism_2, label),
            nearest=painted.nearest[i] if painted.nearest else "",
            similarity=_number(painted.similarity, i),
            similarity_limit=limits.near_copy,
            nearest_2=painted.nearest_2[i] if painted.nearest_2 else "",
            similarity_2=_number(painted.similarity_2, i),
            similarity_2_limit=limits.near_copy_features,
            twin_limit=limits.twin,
            quota=limits.quota,
        )
        if painted.faults[i]:
            reason = NOT_PAINTED
        elif painted.finite[i] is None or not painted.finite[i]:
            reason = NOT_FINITE
        else:
            reason = next((word for word, passed in CHECKS if not passed(found)), PENDING)
        out.append(replace(found, reason=reason))
    return out


def settle(
    found: Sequence[Verdict],
    searched: Iterable[str],
    twins: Iterable[tuple[str, str, float]],
    limits: Limits,
) -> list[Verdict]:
    """The second pass, over all verdicts of a round, in their order; those that `inspect` rejected
    stay as they are.

    searched: request ids that were compared with the rest of their arm; twins: the (id, id,
    similarity) found (`NearCopy.pairs`). Of pictures of one arm that twins link the first by
    request id is kept. With the twin check on, one that was not searched is a "near twin". Then, of
    each source in each arm, the first `quota` by request id.
    """
    ids = [f.request_id for f in found]
    assert len(set(ids)) == len(ids), "one verdict for each request"
    waiting = {f.request_id: f for f in found if f.reason == PENDING}
    seen, parent, closest = set(searched), {i: i for i in waiting}, dict.fromkeys(waiting, -1.0)

    def first(i: str) -> str:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for a, b, similarity in twins if limits.twin is not None else ():
        if (
            a in waiting
            and b in waiting
            and waiting[a].arm == waiting[b].arm
            and not similarity < limits.twin
        ):
            low, high = sorted((first(a), first(b)))
            parent[high] = low
            for i in (a, b):
                closest[i] = max(closest[i], similarity) if np.isfinite(similarity) else np.nan
    taken: Counter[tuple[str, str]] = Counter()
    settled: dict[str, Verdict] = {}
    for i in sorted(waiting):
        f, reason, twin = waiting[i], KEPT, first(i)
        if limits.twin is not None and (twin != i or i not in seen):
            reason = TWIN
        if reason == KEPT and f.source is not None:
            taken[f.arm, f.source] += 1
            if limits.quota is not None and taken[f.arm, f.source] > limits.quota:
                reason = QUOTA
        similarity = closest[i] if i in seen else np.nan
        place = taken[f.arm, f.source] if f.source is not None and reason != TWIN else 0
        settled[i] = replace(
            f,
            keep=reason == KEPT,
            reason=reason,
            twin="" if twin == i else twin,
            twin_similarity=similarity,
            place=place,
            twin_limit=limits.twin,
            quota=limits.quota,
        )
    return [settled.get(f.request_id, f) for f in found]


def acceptance(
    found: Iterable[Verdict], classes: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Counts {arm: {class name: {"generated": n, "accepted": n, "rejected": {reason: n}}}}.

    Arms are sorted, classes in the order of `classes` (indexed by a verdict's label). Every class
    appears under every arm that has a verdict, with zeros where nothing was painted.
    """
    found = list(found)
    counts: dict[str, dict[str, dict[str, Any]]] = {
        arm: {name: _nothing() for name in classes} for arm in sorted({v.arm for v in found})
    }
    _count(found, lambda v: counts[v.arm][classes[v.label]])
    return counts


def acceptance_by_strategy(
    found: Iterable[Verdict], classes: Sequence[str]
) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Counts {arm: {class name: {strategy: {"generated", "accepted", "rejected": {reason: n}}}}},
    of what was painted.
    """
    found = sorted(found, key=lambda v: (v.arm, v.label, v.strategy))
    counts: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(_nothing)))
    _count(found, lambda v: counts[v.arm][classes[v.label]][v.strategy])
    return {
        arm: {name: dict(rows) for name, rows in of_class.items()}
        for arm, of_class in counts.items()
    }


def _count(found: Iterable[Any], cell: Callable[[Any], dict[str, Any]]) -> None:
    for v in found:
        cell(
            v
        )  # cells appear in the order of arms, classes and strategies; reasons in that of checks
    for v in sorted(found, key=lambda v: EVERY_REASON.index(v.reason)):
        row = cell(v)
        row["generated"] += 1
        if v.keep:
            row["accepted"] += 1
        else:
            row["rejected"][v.reason] = row["rejected"].get(v.reason, 0) + 1


def _nothing() -> dict[str, Any]:
    return {"generated": 0, "accepted": 0, "rejected": {}}


def _number(values: np.ndarray | None, i: int) -> float:
    """NaN where it is missing or not finite: no check is passed with it."""
    value = np.nan if values is None or values[i] is None else float(values[i])
    return value if np.isfinite(value) else np.nan


def _of_class(limits: tuple[float, ...] | None, label: int) -> float | None:
    return None if limits is None else float(limits[label])


def _agreement(probs: np.ndarray | None, i: int, label: int) -> float:
    """p[label], or NaN where the row is no distribution (missing, not finite, negative, not adding
    up to 1).
    """
    row = None if probs is None else np.asarray(probs[i], np.float64)
    if row is None or not np.isfinite(row).all() or (row < 0).any() or abs(row.sum() - 1) > 1e-2:
        return np.nan
    return float(row[label])
