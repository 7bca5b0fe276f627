from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from adversa.evaluate.bootstrap import compare
from adversa.evaluate.inference import Spread, gain_per_hour, mcnemar, spread, word
from adversa.types import UserError


def test_word_needs_the_whole_interval() -> None:
    given = ((0.01, 0.2), (-0.2, -0.01), (0.0, 0.2), (-0.1, 0.1), (np.nan, np.nan))
    assert [word(*x) for x in given] == ["better", "worse", "not shown", "not shown", "not shown"]


def test_the_parts_of_the_variance_are_found_again() -> None:
    rng = np.random.default_rng(0)
    seeds, resamples, common, apart = 4, 200_000, 4.0, 9.0
    drawn = 2 * rng.normal(size=resamples) + 3 * rng.normal(size=(seeds, resamples))
    found = spread(np.array([1.0, 2.0, 3.0, 4.0]), drawn, 500)
    assert found.common == pytest.approx(common, rel=0.02) and found.apart == pytest.approx(
        apart, rel=0.02
    )
    assert found.of_lesions == pytest.approx(np.var(drawn.mean(0)), rel=0.02)
    assert found.between == pytest.approx(np.var([1, 2, 3, 4], ddof=1))


def test_where_lesions_cost_nothing_it_is_the_paired_t_test_over_seeds() -> None:
    x = np.array([0.02, 0.05, 0.03])
    s = Spread(3, 10**6, 0.0, 0.0, float(np.var(x, ddof=1)))
    expected = ttest_1samp(x, 0)
    assert s.p(x.mean()) == pytest.approx(expected.pvalue, rel=1e-4)
    low, high = expected.confidence_interval(0.95)
    assert 2 * s.half() == pytest.approx(high - low, rel=1e-6) and s.se == pytest.approx(
        x.std(ddof=1) / np.sqrt(3)
    )


def test_where_seeds_agree_it_is_no_less_than_lesions_alone() -> None:
    s = Spread(3, 101, 1e-4, 3e-4, 0.0)
    assert s.se == pytest.approx(np.sqrt(2e-4)) and s.half() == pytest.approx(
        t.isf(0.025, 100) * np.sqrt(2e-4)
    )
    assert s.p(s.half()) == pytest.approx(0.05)


def test_p_and_interval_tell_the_same() -> None:
    s = Spread(5, 300, 1e-4, 2e-4, 5e-4)
    assert s.p(1.001 * s.half()) < 0.05 < s.p(0.999 * s.half())
    assert s.p(0.0) == 1 and s.p(10.0) < 1e-6 and s.p(-0.02) == s.p(0.02)


def test_few_lesions_cannot_have_a_small_p() -> None:
    labels = np.zeros(4, int)
    found = compare(
        np.eye(2)[labels][None],
        np.eye(2)[1 - labels][None],
        labels,
        list("abcd"),
        100,
        0,
        "accuracy",
    )
    assert found.difference == 1 and found.p == 0.125  # all four for a: the sign test's p


def test_the_detectable_effect_has_its_textbook_value() -> None:
    s = Spread(1, 10**6, 1e-4, 0.0, None)
    assert s.detectable() == pytest.approx((1.959964 + 0.841621) * 0.01, rel=1e-4)


def test_seeds_needed_is_the_first_number_that_is_enough() -> None:
    s = Spread(3, 300, 1e-5, 2e-4, 8e-4)
    needed = s.seeds_needed(0.03)
    assert needed is not None and s.detectable(needed) <= 0.03 < s.detectable(needed - 1)
    assert s.seeds_needed(-0.03) == needed
    assert s.seeds_needed(0.008) is None  # lesions alone: 2.8 * sqrt(1e-5) = 0.0089
    assert (
        Spread(1, 300, 1e-5, 0.0, None).seeds_needed(0.5) is None
        and Spread(1, 300, 1e-5, 0.0, None).detectable(3) is None
    )


def test_a_comparison_says_what_it_holds() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    logits = rng.normal(size=(2, 3, 200, 3))
    one, three = (
        compare(logits[0, :k], logits[1, :k], labels, list(range(200)), 200, 0) for k in (1, 3)
    )
    assert one.seeds == 1 and "not the luck of training" in one.note and one.spread.between is None
    assert three.seeds == 3 and three.note == "" and len(three.each) == 3 and three.lesions == 200
    assert (
        three.difference == pytest.approx(np.mean(three.each)) and three.detectable > 2 * three.se
    )
    assert (three.low + three.high) / 2 == pytest.approx(three.difference)


def test_mcnemar_is_exact_and_counts_lesions() -> None:
    labels = np.zeros(12, int)
    a, b = np.zeros(12, int), np.zeros(12, int)
    b[:8] = 1  # a alone is right on eight
    a[8:10] = 1  # b alone on two
    one = mcnemar(np.eye(2)[a], np.eye(2)[b], labels, list(range(12)))
    assert (one.won, one.lost, one.p) == (8, 2, pytest.approx(0.109375))
    lesions = [0] * 8 + [1, 2] + [3, 4]  # the eight pictures are of one lesion
    of_lesions = mcnemar(np.eye(2)[a], np.eye(2)[b], labels, lesions)
    assert (of_lesions.won, of_lesions.lost, of_lesions.p) == (1, 2, 1.0)
    assert mcnemar(np.eye(2)[a], np.eye(2)[a], labels, lesions).p == 1


def test_gain_per_hour() -> None:
    found = gain_per_hour(0.04, 0.01, 0.07, 7200)
    assert (found.gain, found.low, found.high, found.device_hours) == (0.02, 0.005, 0.035, 2)
    with pytest.raises(UserError, match="device_seconds is 0"):
        gain_per_hour(0.04, 0.01, 0.07, 0)


def test_arms_that_answer_alike_say_nothing_of_what_could_be_seen() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 60, 2)), rng.integers(0, 2, 60)
    c = compare(logits, logits, labels, np.arange(60), 100, 0)
    assert (c.difference, c.low, c.high, c.p, c.detectable) == (
        0,
        0,
        0,
        1,
        None,
    ) and c.spread.seeds_needed(0.02) is None
    assert "answer alike, on every lesion" in c.note
    assert (
        "on every patient"
        in compare(logits, logits, labels, np.arange(60), 100, 0, unit="patient").note
    )


def test_one_lesion_needs_no_number_of_seeds() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 12, 2))
    c = compare(a, b, np.arange(12) % 2, np.zeros(12), 100, 0)
    assert c.detectable is None and c.spread.seeds_needed(0.02) is None
