"""Which picture plays which role: by group, within each class, from names and a seed, never from
the order of rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from adversa.common.rounding import largest_remainder
from adversa.config import Split
from adversa.types import ROLES, UserError, digest


def merge_groups(groups: Iterable[str], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """group -> the group it is part of after the pairs are joined, named after the smallest name in
    it.
    """
    parent = {g: g for g in groups}

    def root(g: str) -> str:
        parent.setdefault(g, g)
        while parent[g] != g:
            parent[g] = parent[parent[g]]
            g = parent[g]
        return g

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return {g: root(g) for g in list(parent)}


def split(
    labels: Sequence[str], groups: Sequence[str], config: Split, classes: Sequence[str]
) -> list[str]:
    """The role of each row. A group's class is its commonest label (of equals the first by name).

    Within a class the groups are put in the order of a hash of (seed, group) and dealt by the four
    shares, largest remainder, every role at least one. UserError where a class has fewer groups
    than roles.
    """
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for label, group in zip(labels, groups, strict=True):
        votes[group][label] += 1
    members: dict[str, list[str]] = {c: [] for c in classes}
    for group, count in votes.items():
        members[min(count, key=lambda c: (-count[c], c))].append(group)
    role: dict[str, str] = {}
    for label, found in members.items():
        if len(found) < len(ROLES):
            raise UserError(
                f"class {label!r} has {len(found)} groups (lesions), fewer than the "
                f"{len(ROLES)} roles; "
                "add pictures of other lesions, or leave the class out with data.labels "
                "and --set data.on_error=skip"
            )
        found.sort(key=lambda g: (digest(config.seed, g), g))
        counts = _deal(len(found), [getattr(config, r) for r in ROLES])
        dealt = [r for r, n in zip(ROLES, counts, strict=True) for _ in range(n)]
        role.update(zip(found, dealt, strict=True))
    return [role[g] for g in groups]


def _deal(n: int, shares: Sequence[float]) -> list[int]:
    """n split by shares that add up to 1: largest remainder, each at least 1. n >= len(shares)."""
    counts: list[int] = largest_remainder([n * s for s in shares], n).tolist()
    while min(counts) < 1:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(min(counts))] += 1
    return counts


def split_hash(rows: Iterable[tuple[str, str, str]]) -> str:
    """Hex digest of (id, group, role) rows, whatever their order."""
    return digest(*("\t".join(r) for r in sorted(rows)))
