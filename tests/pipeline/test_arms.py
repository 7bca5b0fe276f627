from __future__ import annotations

import pytest

from adversa.pipeline import arms

REAL, MINED = [("r1", 0), ("r2", 0), ("r3", 1)], [("m1", 0), ("m2", 0), ("m3", 1)]


def test_shares_are_proportional_and_capped():
    assert arms.shares([1, 1, 2], 8, [10, 10, 10]) == [2, 2, 4]
    assert arms.shares([1, 1, 2], 8, [1, 10, 10]) == [
        1,
        2,
        5,
    ]  # what the first cannot take goes to the others, two to one
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
    synthetic = [("b", 0), ("a", 0), ("c", 1), ("d", 1)]
    one, other = (
        arms.mix("guided", REAL, MINED, synthetic, [1, 2]),
        arms.mix("guided", REAL, MINED, synthetic[::-1], [1, 2]),
    )
    assert one.equals(other)
    assert one["id"].to_pylist() == ["r1", "r2", "r3", "m1", "m2", "m3", "a", "c", "d"]
    assert one["kind"].to_pylist() == ["real"] * 3 + ["mined"] * 3 + ["synthetic"] * 3
    assert set(one["weight"].to_pylist()) == {1.0}


def test_controls_repeat_what_the_others_generate():
    counts = [4, 1]
    weights = {
        a: dict(
            zip(
                *arms.mix(a, REAL, MINED, [], counts).select(["id", "weight"]).to_pydict().values(),
                strict=True,
            )
        )
        for a in ("real", "resample", "replay")
    }
    assert weights["real"] == dict.fromkeys(["r1", "r2", "r3", "m1", "m2", "m3"], 1.0)
    assert weights["replay"] == {"r1": 1, "r2": 1, "r3": 1, "m1": 3, "m2": 3, "m3": 2}
    assert weights["resample"] == {"r1": 2, "r2": 2, "m1": 2, "m2": 2, "r3": 1.5, "m3": 1.5}
    guided = arms.mix("guided", REAL, MINED, [(f"s{i}", int(i == 4)) for i in range(5)], counts)
    labels = guided["label"].to_numpy()
    for other in ("resample", "replay"):  # the same weight of every class
        rows = arms.mix(other, REAL, MINED, [], counts)
        for c in (0, 1):
            assert (
                rows["weight"].to_numpy()[rows["label"].to_numpy() == c].sum()
                == (labels == c).sum()
            )


def test_where_nothing_is_generated_the_controls_repeat_as_much_as_would_be():
    assert arms.repeats([0, 0, 2], 3, 4, 100, 1.0) == [8, 0, 4]
    assert arms.repeats([0, 0, 2], 3, 4, 6, 1.0) == [4, 0, 2]


def test_an_arm_short_of_its_matched_counts_is_our_bug():
    with pytest.raises(AssertionError, match="lacks"):
        arms.mix("guided", REAL, [], [("a", 0)], [2, 0])
    with pytest.raises(AssertionError, match="replay has no image of class 1 to repeat 3 times"):
        arms.mix("replay", REAL, MINED[:2], [], [0, 3])
