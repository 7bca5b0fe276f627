import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from adversa.config import Data, Split
from adversa.data import sources
from adversa.data.split import merge_groups, split, split_hash
from adversa.types import ROLES, UserError


def leaking(groups, roles):
    """Groups with more than one role: must be empty."""
    seen = defaultdict(set)
    for group, role in zip(groups, roles, strict=True):
        seen[group].add(role)
    return [g for g, r in seen.items() if len(r) > 1]


def roles_of(listing, config, grouped):
    """As `prepare` does it: known pairs merged, then split by lesion; or, with grouped off, each
    image for itself.
    """
    lesions = merge_groups(
        [r.group for r in listing.records], [(a, b) for a, b, _ in listing.merged]
    )
    merged = [lesions[r.group] for r in listing.records]
    units = merged if grouped else [r.uri for r in listing.records]
    return merged, split([r.label for r in listing.records], units, config.split, listing.classes)


@pytest.mark.parametrize("grouped", [True, False])
def test_no_lesion_has_two_roles_phantom(grouped):
    config = Data(grouped=grouped)
    merged, roles = roles_of(sources.list_records(config), config, config.grouped)
    assert (leaking(merged, roles) == []) == grouped


@pytest.mark.parametrize("grouped", [True, False])
def test_no_lesion_has_two_roles_ham(ham_zip, grouped):
    config = Data(source="ham10000", path=str(ham_zip), grouped=grouped)
    listing = sources.list_records(config)
    merged, roles = roles_of(listing, config, config.grouped)
    leaks = leaking(merged, roles)
    assert (leaks == []) == grouped
    if not grouped:
        assert len(leaks) > 500
    role = dict(zip((r.group for r in listing.records), roles, strict=True))
    if grouped:
        assert all(role[a] == role[b] for a, b, _ in listing.merged)
        for label in listing.classes:  # stratified
            share = Counter(
                r for x, r in zip(listing.records, roles, strict=True) if x.label == label
            )
            assert share["train"] / share.total() == pytest.approx(0.55, abs=0.08)


def rows(n=400, seed=0):
    rng = np.random.default_rng(seed)
    groups = [f"g{i // 2}" for i in range(n)]
    kinds = rng.choice(["a", "b", "c"], n // 2, p=[0.7, 0.2, 0.1])
    return [str(kinds[i // 2]) for i in range(n)], groups


def test_the_order_of_rows_does_not_matter():
    labels, groups = rows()
    before = dict(zip(groups, split(labels, groups, Split(), ["a", "b", "c"]), strict=True))
    order = list(range(len(labels)))
    random.Random(1).shuffle(order)
    shuffled = [groups[i] for i in order]
    after = split([labels[i] for i in order], shuffled, Split(), ["c", "a", "b"])
    assert dict(zip(shuffled, after, strict=True)) == before
    other = split(labels, groups, Split(seed=1), ["a", "b", "c"])
    assert dict(zip(groups, other, strict=True)) != before


def test_shares_are_the_largest_remainder_within_each_class():
    labels, groups = rows()
    config = Split(train=0.4, mine=0.3, select=0.2, test=0.1)
    role = dict(zip(groups, split(labels, groups, config, ["a", "b", "c"]), strict=True))
    kind = dict(zip(groups, labels, strict=True))
    for label in "abc":
        mine = [role[g] for g in role if kind[g] == label]
        for r in ROLES:
            assert abs(mine.count(r) - getattr(config, r) * len(mine)) < 1


def test_every_role_gets_a_group_or_an_error_with_figures():
    labels, groups = ["a"] * 4 + ["b"] * 30, [f"g{i}" for i in range(34)]
    assert set(split(labels, groups, Split(), ["a", "b"])[:4]) == set(ROLES)
    with pytest.raises(UserError, match="class 'a' has 3 groups .* fewer than the 4 roles"):
        split(labels[1:], groups[1:], Split(), ["a", "b"])
    with pytest.raises(UserError, match="class 'c' has 0 groups"):
        split(labels, groups, Split(), ["a", "b", "c"])


def test_a_group_of_two_classes_goes_as_one():
    labels = ["a", "b", "b"] + ["a"] * 8 + ["b"] * 8
    groups = ["x", "x", "x"] + [f"a{i}" for i in range(8)] + [f"b{i}" for i in range(8)]
    roles = split(labels, groups, Split(), ["a", "b"])
    assert len(set(roles[:3])) == 1


def test_a_group_of_two_classes_is_of_its_commonest_label_and_of_equals_the_first():
    labels, groups = ["a"] * 3 + ["b"] * 4, [f"g{i}" for i in range(7)]
    mixed = [*groups, "x", "x", "x"]
    with pytest.raises(UserError, match="class 'a' has 3 groups"):
        split([*labels, "a", "b", "b"], mixed, Split(), ["a", "b"])
    assert len(split([*labels, "b", "a", "a"], mixed, Split(), ["a", "b"])) == 10
    assert len(split([*labels, "b", "a"], mixed[:-1], Split(), ["a", "b"])) == 9


def test_merging_is_transitive_and_named_after_the_smallest():
    pairs = [("d", "c"), ("b", "d"), ("e", "f")]
    want = {"a": "a", "b": "b", "c": "b", "d": "b", "e": "e", "f": "e"}
    for seed in range(5):
        random.Random(seed).shuffle(pairs)
        turned = [p[::-1] if seed % 2 else p for p in pairs]
        assert merge_groups("abcdef", turned) == want


def test_split_hash_sees_every_row_and_no_order():
    table = [("1", "g", "train"), ("2", "h", "test")]
    assert split_hash(table) == split_hash(table[::-1])
    assert split_hash(table) != split_hash([("1", "g", "train"), ("2", "h", "mine")])
    assert split_hash([("1", "g", "train")]) != split_hash(table)
