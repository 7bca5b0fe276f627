from __future__ import annotations

import numpy as np
import pytest

from adversa.evaluate.calibration import reliability
from adversa.evaluate.metrics import metrics
from adversa.evaluate.operating import Measures, level, members, threshold_at, thresholds
from adversa.types import UserError


def test_the_threshold_is_the_smallest_that_reaches_the_target() -> None:
    score = np.arange(1, 21) / 20
    negative = np.zeros(20, bool)
    for target, expected in ((0.80, 16), (0.90, 18), (0.95, 19), (0.951, 20), (1.0, 20), (0.01, 1)):
        limit = threshold_at(score, negative, target)
        assert limit == score[expected - 1] and (score <= limit).mean() >= target
        lower = score[score < limit]
        assert not len(lower) or (score <= lower.max()).mean() < target


def test_ties_go_to_the_negative_side() -> None:
    score, positive = np.array([0.1, 0.5, 0.5, 0.5, 0.5]), np.array([0, 0, 0, 0, 1], bool)
    assert (
        threshold_at(score, positive, 0.5) == 0.5
    )  # three of four negatives are tied there: specificity 1, not 0.5
    assert threshold_at(score, np.ones(5, bool), 0.5) is None


def test_thresholds_come_from_one_role_and_are_applied_to_another() -> None:
    def logits(p):
        return np.log(np.stack([1 - np.array(p), np.array(p)], 1))

    m = Measures({"bad": ["y"]}, (0.50,))
    limits = thresholds(logits([0.1, 0.2, 0.3, 0.4, 0.9]), np.array([0, 0, 0, 0, 1]), ["x", "y"], m)
    assert limits == {"0.50/bad": pytest.approx(0.2)}
    found = metrics(
        logits([0.15, 0.25, 0.35, 0.1, 0.9]), np.array([0, 0, 0, 1, 1]), ["x", "y"], m, limits
    )
    assert found["sensitivity@0.50/bad"] == 0.5 and found["specificity@0.50/bad"] == pytest.approx(
        1 / 3
    )  # not the 0.5 aimed at
    assert "sensitivity@0.50/bad" not in metrics(
        logits([0.1, 0.9]), np.array([0, 1]), ["x", "y"], m
    )  # no thresholds, no figure


def test_a_group_that_does_not_occur_has_no_figures() -> None:
    found = metrics(
        np.eye(3), np.array([0, 1, 1]), ["a", "b", "c"], Measures({"g": ["c"]}), {"0.90/g": 0.5}
    )
    assert (
        "auroc/g" not in found
        and "sensitivity@0.90/g" not in found
        and found["specificity@0.90/g"] == pytest.approx(2 / 3)
    )


def test_bad_measures_are_said() -> None:
    with pytest.raises(UserError, match="'scc', which is no class"):
        members("m", Measures({"m": ["scc"]}), ["a", "b"])
    with pytest.raises(UserError, match="names 2 of 2 classes"):
        members("m", Measures({"m": ["a", "b"]}), ["a", "b"])
    with pytest.raises(UserError, match="specificities has 1.5"):
        Measures(specificities=(1.5,))
    with pytest.raises(UserError, match="floor is 1"):
        Measures(floor=1)
    assert level(0.9, "m") == "0.90/m" and level(0.975, "m") == "0.975/m"


def test_a_chance_classifier_has_the_stated_partial_area() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40_000, 2)), rng.integers(0, 2, 40_000)
    found = metrics(logits, labels, ["x", "y"], Measures({"y": ["y"]}))
    assert found["pauc@0.80/y"] == pytest.approx(0.02, abs=0.001) and found[
        "pauc_norm@0.80/y"
    ] == pytest.approx(0.1, abs=0.005)
    perfect = metrics(np.eye(2)[labels], labels, ["x", "y"], Measures({"y": ["y"]}))
    assert perfect["pauc@0.80/y"] == pytest.approx(0.2) and perfect[
        "pauc_norm@0.80/y"
    ] == pytest.approx(1)


def test_reliability_bins_hold_every_image_once() -> None:
    p = np.array([0.5, 0.65, 0.65, 0.95, 1.0])
    logits = np.log(np.maximum(np.stack([1 - p, p], 1), 1e-300))
    bins = reliability(logits, np.array([1, 1, 0, 1, 1]), bins=10)
    assert [b.n for b in bins] == [0, 0, 0, 0, 0, 1, 2, 0, 0, 2]
    assert (
        bins[0].accuracy is None
        and bins[6].accuracy == 0.5
        and bins[6].confidence == pytest.approx(0.65)
    )
