"""A verdict for each synthetic image: may it enter training, and if not, why not.

Two passes. `inspect` looks at each image by itself: the first of the checks (`checks.CHECKS`) that
it does not pass is the reason. `finalize` then looks at all of a round's verdicts: near-duplicates,
and a quota for each source image. Both fail closed: a number that is not known does not pass, and
what `inspect` passed is not kept before `finalize` has seen it. Neither depends on the order of
images or on how they are divided into parts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypedDict, TypeVar

import numpy as np

from adversa.curate.checks import CHECKS, FINAL, FIRST, Candidates, Check, Thresholds, columns

KEPT, NOT_GENERATED, NOT_FINITE, PENDING = "kept", "not painted", "not finite", "not settled"
NEAR_DUPLICATE, QUOTA = (c.reason for c in FINAL)
T = TypeVar("T")
EVERY_REASON = (
    *(KEPT, NOT_GENERATED, NOT_FINITE),
    *(c.reason for c in FIRST),
    *(PENDING, NEAR_DUPLICATE, QUOTA),
)


def _with_columns(cls: type[T]) -> type[T]:
    """A frozen dataclass that has the columns of the checks after its own fields."""
    for column in columns(CHECKS):
        cls.__annotations__[column.name] = column.kind
        setattr(cls, column.name, column.default)
    return dataclass(frozen=True)(cls)


@_with_columns
class Verdict:
    """Whether a generated image may enter training, and why not, with every check's number and
    limit.
    """

    request_id: str
    arm: str
    label: int
    strategy: str
    source: str | None
    keep: bool
    reason: str

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

        def __init__(self, *values: Any, **named: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...


class Decision(NamedTuple):
    """What acceptance counts of a verdict: reading 20,000 whole ones takes seconds, these five
    columns do not.
    """

    arm: str
    label: int
    strategy: str
    keep: bool
    reason: str


class Acceptance(TypedDict):
    """How many images were generated, and how many of them accepted and, by reason, rejected."""

    generated: int
    accepted: int
    rejected: dict[str, int]


def inspect(candidates: Candidates, thresholds: Thresholds) -> list[Verdict]:
    """The first pass: a verdict for each image by itself. What passes every check is "not settled",
    and not kept, until `finalize`.
    """
    n = len(candidates.request_ids)
    for name, value in vars(candidates).items():
        assert value is None or len(value) == n, (name, n)
    _assert_finite(thresholds)
    numbers = {c.number: _numbers(c, candidates) for c in FIRST}
    neighbours = {c.neighbour: getattr(candidates, c.neighbour) for c in FIRST if c.neighbour}
    found = []
    for i, label in enumerate(map(int, candidates.labels)):
        verdict = Verdict(
            request_id=candidates.request_ids[i],
            arm=candidates.arms[i],
            label=label,
            strategy=candidates.strategies[i],
            source=candidates.sources[i],
            keep=False,
            reason=PENDING,
            **{name: float(values[i]) for name, values in numbers.items()},
            **{name: ids[i] if ids else "" for name, ids in neighbours.items()},
            **{c.limit: _of_class(thresholds[c.limit], label) for c in CHECKS},
        )
        if candidates.faults[i]:
            reason = NOT_GENERATED
        elif not candidates.finite[i]:
            reason = NOT_FINITE
        else:
            row = vars(verdict)
            reason = next((c.reason for c in FIRST if not c.passed(row)), PENDING)
        found.append(replace(verdict, reason=reason))
    return found


def _numbers(check: Check, candidates: Candidates) -> np.ndarray:
    """float64 [N]; NaN where it is missing or not finite: no check is passed with it."""
    assert check.measure is not None
    values = check.measure(candidates)
    if values is None:
        return np.full(len(candidates.request_ids), np.nan)
    numbers = np.asarray(values, np.float64)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _of_class(limit: float | tuple[float, ...] | None, label: int) -> float | None:
    return float(limit[label]) if isinstance(limit, tuple) else limit


def finalize(
    found: Sequence[Verdict],
    searched: Iterable[str],
    pairs: Iterable[tuple[str, str, float]],
    thresholds: Thresholds,
) -> list[Verdict]:
    """The second pass, over all verdicts of a round, in their order; those that `inspect` rejected
    stay as they are.

    Of near-duplicates within an arm the first by request id is kept. With that check on, an image
    that was not searched is rejected by it. Then, of each source in each arm, the first `quota` by
    request id are kept.

    Args:
        found: Verdicts of `inspect`.
        searched: Request ids that were compared with the rest of their arm.
        pairs: (id, id, similarity) of near-duplicates (`NearCopy.pairs`).
        thresholds: The limits of the checks.

    Returns:
        The verdicts as they stand, none of them pending.
    """
    _assert_finite(thresholds)
    limit, quota = thresholds["twin_limit"], thresholds["quota"]
    assert not isinstance(limit, tuple) and not isinstance(quota, tuple)
    assert len({f.request_id for f in found}) == len(found), "one verdict for each request"
    waiting = {f.request_id: f for f in found if f.reason == PENDING}
    first, closest = _near_duplicates(waiting, pairs, limit)
    seen, taken = set(searched), Counter[tuple[str, str | None]]()
    final: dict[str, Verdict] = {}
    for i in sorted(waiting):
        f, reason, original = waiting[i], KEPT, first(i)
        if limit is not None and (original != i or i not in seen):
            reason = NEAR_DUPLICATE
        if reason == KEPT and f.source is not None:
            taken[f.arm, f.source] += 1
            if quota is not None and taken[f.arm, f.source] > quota:
                reason = QUOTA
        counted = f.source is not None and reason != NEAR_DUPLICATE
        final[i] = replace(
            f,
            keep=reason == KEPT,
            reason=reason,
            twin="" if original == i else original,
            twin_similarity=closest[i] if i in seen else np.nan,
            place=taken[f.arm, f.source] if counted else 0,
            twin_limit=limit,
            quota=quota,
        )
    return [final.get(f.request_id, f) for f in found]


def _near_duplicates(
    waiting: Mapping[str, Verdict], pairs: Iterable[tuple[str, str, float]], limit: float | None
) -> tuple[Callable[[str], str], dict[str, float]]:
    """(id -> the first id of its near-duplicates, id -> similarity to the most similar of them; -1
    where there is none).
    """
    parent, closest = {i: i for i in waiting}, dict.fromkeys(waiting, -1.0)

    def first(i: str) -> str:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    if limit is None:
        return first, closest
    for a, b, similarity in pairs:
        one_arm = a in waiting and b in waiting and waiting[a].arm == waiting[b].arm
        if one_arm and not similarity < limit:
            low, high = sorted((first(a), first(b)))
            parent[high] = low
            for i in (a, b):
                closest[i] = max(closest[i], similarity) if np.isfinite(similarity) else np.nan
    return first, closest


def _assert_finite(thresholds: Thresholds) -> None:
    known = [limit for limit in thresholds.values() if limit is not None]
    assert all(np.isfinite(limit).all() for limit in known), thresholds


def acceptance(
    found: Iterable[Verdict | Decision], classes: Sequence[str]
) -> dict[str, dict[str, Acceptance]]:
    """Counts {arm: {class name: {"generated": n, "accepted": n, "rejected": {reason: n}}}}.

    Arms are sorted, classes in the order of `classes` (indexed by a verdict's label). Every class
    appears under every arm that has a verdict, with zeros where nothing was generated.
    """
    found = list(found)
    counts = {arm: {name: _nothing() for name in classes} for arm in sorted({v.arm for v in found})}
    _count(found, lambda v: counts[v.arm][classes[v.label]])
    return counts


def acceptance_by_strategy(
    found: Iterable[Verdict | Decision], classes: Sequence[str]
) -> dict[str, dict[str, dict[str, Acceptance]]]:
    """Counts {arm: {class name: {strategy: {"generated", "accepted", "rejected": {reason: n}}}}} of
    what was generated.
    """
    found = sorted(found, key=lambda v: (v.arm, v.label, v.strategy))
    counts: dict[str, dict[str, dict[str, Acceptance]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(_nothing))
    )
    _count(found, lambda v: counts[v.arm][classes[v.label]][v.strategy])
    return {
        arm: {name: dict(rows) for name, rows in of_class.items()}
        for arm, of_class in counts.items()
    }


def _count(
    found: Sequence[Verdict | Decision], cell: Callable[[Verdict | Decision], Acceptance]
) -> None:
    for v in found:  # cells in the order of arms, classes and strategies; reasons in that of checks
        cell(v)
    for v in sorted(found, key=lambda v: EVERY_REASON.index(v.reason)):
        row = cell(v)
        row["generated"] += 1
        if v.keep:
            row["accepted"] += 1
        else:
            row["rejected"][v.reason] = row["rejected"].get(v.reason, 0) + 1


def _nothing() -> Acceptance:
    return {"generated": 0, "accepted": 0, "rejected": {}}
