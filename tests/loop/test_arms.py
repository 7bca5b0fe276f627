from __future__ import annotations

import pyarrow as pa
import pytest

from adversa.loop import arms


def test_shares_are_proportional_and_capped():
    assert arms.shares([1, 1, 2], 8, [10, 10, 10]) == [2, 2, 4]
    assert arms.shares([1, 1, 2], 8, [1, 10, 10]) == [1, 2, 5]  # what the first cannot take goes to the others, two to one
    assert arms.shares([5, 5], 100, [3, 4]) == [3, 4]
    assert arms.shares([1, 1, 1], 2, [5, 5, 5]) == [1, 1, 0]  # ties by position
    assert arms.shares([0, 0], 5, [0, 0]) == [0, 0]


def test_every_synthetic_arm_gets_the_least_any_arm_has():
    kept = {"guided": [0, 0, 1, 2, 2, 2], "unguided": [0, 1, 1, 1, 2, 2]}
    assert arms.matched_counts(kept, 4, 100, 1.0) == [1, 1, 2, 0]


def test_the_ratio_caps_all_images_and_keeps_the_classes_proportions():
    kept = {"guided": [0] * 40 + [1] * 20}
    assert arms.matched_counts(kept, 2, 60, 0.5) == [20, 10]
    assert arms.matched_counts(kept, 2, 60, 0.0) == [0, 0]
    assert arms.matched_counts({}, 2, 60, 1.0) == [0, 0]


def test_the_mix_does_not_depend_on_the_order_of_the_verdicts():
    real = pa.table({"id": ["r1", "r2"], "label": [0, 1]})
    synthetic = [("b", 0), ("a", 0), ("c", 1), ("d", 1)]
    one, other = arms.mix(real, synthetic, [1, 2]), arms.mix(real, synthetic[::-1], [1, 2])
    assert one.equals(other)
    assert one["id"].to_pylist() == ["r1", "r2", "a", "c", "d"]
    assert one["kind"].to_pylist() == ["real"] * 2 + ["synthetic"] * 3


def test_an_arm_short_of_its_matched_counts_is_our_bug():
    real = pa.table({"id": ["r1"], "label": [0]})
    with pytest.raises(AssertionError, match="lacks"):
        arms.mix(real, [("a", 0)], [2])
