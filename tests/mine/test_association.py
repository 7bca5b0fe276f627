from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from adversa.mine.association import Count, attainable, columns, count, over_represented


def brute(inside: int, size: int, everywhere: int, total: int) -> float:
    """P(at least `inside` of the `everywhere` images with the value fall in a subset of `size`), by
    counting subsets.
    """
    hits = sum(
        sum(i < everywhere for i in chosen) >= inside for chosen in combinations(range(total), size)
    )
    return hits / comb(total, size)


def test_p_values_are_those_of_all_subsets() -> None:
    tables = [Count(0, "a", str(k), k, 4, 5, 12) for k in range(5)]
    found, _ = over_represented(tables, 1, alpha=1.0)
    got = {f.inside: f.p for f in found[0]}
    assert got.keys() == {0, 1, 2, 3, 4}
    for k, p in got.items():
        assert p == pytest.approx(brute(k, 4, 5, 12))


def test_only_what_could_come_out_is_corrected_for() -> None:
    # 3 tables that may reach 0.01 and 100 that cannot reach 0.5: k = 3, since 3 pass 0.05 / 3 and
    # only 3
    least = np.array([0.01] * 3 + [0.5] * 100)
    assert attainable(least, 0.05).tolist() == [True] * 3 + [False] * 100
    # with k = 1 two pass 0.05, with k = 2 none passes 0.025
    assert attainable(np.array([0.04, 0.04]), 0.05).tolist() == [False, False]


def test_correction_spans_all_subsets_and_values() -> None:
    tables = [Count(s, "a", v, 5, 5, 10, 100) for s in (0, 1) for v in "xy"]
    found, tests = over_represented(tables, 2)
    assert tests == 4
    assert [f.corrected / f.p for s in found for f in s] == pytest.approx(
        [4, 4, 4, 4]
    )  # equal p: each gets the first's factor


def test_effect_sizes() -> None:
    found, _ = over_represented([Count(0, "sex", "male", 9, 10, 20, 100)], 1)
    (f,) = found[0]
    assert f.lift == pytest.approx(0.9 / 0.2)
    assert f.low < f.odds_ratio < f.high
    assert (
        30 < f.odds_ratio < 9 * 79 / (1 * 11)
    )  # the conditional estimate is shrunk against the sample's 64.6
    (whole,) = over_represented([Count(0, "sex", "male", 10, 10, 20, 100)], 1)[0][0]
    assert np.isinf(whole.odds_ratio) and np.isinf(whole.high) and whole.low > 1


def test_a_lesion_counts_once_by_its_image_in_the_subset() -> None:
    labels = np.array([0, 0, 0, 0, 0, 1])
    groups = np.array([0, 0, 1, 1, 2, 3])
    known = columns([{"hair": v} for v in ("no", "yes", "no", "no", "yes", "yes")])
    (no, yes) = count(known, [np.array([1])], labels, groups)
    assert (no.value, no.inside, no.size, no.everywhere, no.total) == ("no", 0, 1, 1, 3)
    assert (yes.value, yes.inside, yes.size, yes.everywhere, yes.total) == ("yes", 1, 1, 2, 3)


def test_unknown_is_no_value() -> None:
    known = columns([{"sex": "male"}, {"sex": "unknown"}, {}, {"sex": "female"}])
    tables = count(known, [np.array([0, 1])], np.zeros(4, np.int64), np.arange(4))
    assert {(t.value, t.size, t.total) for t in tables} == {("male", 1, 2), ("female", 1, 2)}


def test_ages_and_other_numbers_are_banded_and_few_numbers_are_not() -> None:
    ages = columns(
        [{"age": a} for a in ("5.0", "29", "30", "44", "45", "60", "74", "75.0", "90", "")]
    )["age"]
    assert ages.tolist() == [
        "below 30",
        "below 30",
        "30 to below 45",
        "30 to below 45",
        "45 to below 60",
        "60 to below 75",
        "60 to below 75",
        "75 or more",
        "75 or more",
        "",
    ]
    ita = columns([{"ita": str(i)} for i in range(20)])["ita"]
    assert {v: ita.tolist().count(v) for v in set(ita)} == {
        "below 4.75": 5,
        "4.75 to below 9.5": 5,
        "9.5 to below 14.25": 5,
        "14.25 or more": 5,
    }
    mostly = columns([{"n": str(i)} for i in [0] * 40 + list(range(1, 10))])["n"]
    assert set(mostly) == {"below 1", "1 or more"}
    assert set(columns([{"type": str(i % 6)} for i in range(30)])["type"]) == set("012345")
