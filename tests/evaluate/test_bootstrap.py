from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from adversa.common.statistics import softmax
from adversa.evaluate import weighted
from adversa.evaluate.bootstrap import compare, draws, intervals, resample
from adversa.evaluate.inference import word
from adversa.evaluate.metrics import metrics
from adversa.evaluate.operating import Measures, thresholds
from adversa.types import UserError

CLASSES = ["a", "b", "c", "d"]


def scores(
    n: int = 400, k: int = 4, seed: int = 0, signal: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.choice(k, size=n, p=np.array([8, 4, 2, 1][:k]) / sum([8, 4, 2, 1][:k]))
    logits = rng.normal(size=(n, k)).round(1)  # rounded: ties occur
    logits[np.arange(n), labels] += signal
    return logits, labels


def names(n: int, per_group: int = 1) -> list[str]:
    return [f"g{i // per_group}" for i in range(n)]


def binary(rng: np.random.Generator, n: int, accuracy: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are right with the given probability, and labels."""
    labels = rng.integers(0, 2, n)
    return np.eye(2)[np.where(rng.random(n) < accuracy, labels, 1 - labels)], labels


def test_every_resample_is_what_sklearn_says_of_the_repeated_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weighted, "_CELLS", 1000)  # several blocks
    logits, labels = scores(n=300)
    index, weights = resample(names(300, 2), 5, seed=3)
    auroc = weighted.auroc_macro(softmax(logits), labels, index, weights)
    balanced = weighted.from_confusion(
        weighted.confusions(logits, labels, index, weights), CLASSES
    )["balanced_accuracy"]
    for r in range(5):
        rows = np.repeat(np.arange(300), weights[r].astype(int)[index])
        assert auroc[r] == pytest.approx(
            roc_auc_score(labels[rows], softmax(logits)[rows], multi_class="ovr", average="macro"),
            abs=1e-9,
        )
        assert balanced[r] == pytest.approx(
            balanced_accuracy_score(labels[rows], logits[rows].argmax(1)), abs=1e-9
        )


def test_resamples_draw_as_many_groups_as_there_are() -> None:
    index, weights = resample(["b", "a", "b", "c"], 1000, seed=0)
    assert index.tolist() == [1, 0, 1, 2] and (weights.sum(1) == 3).all()
    assert weights.mean(0) == pytest.approx([1, 1, 1], abs=0.1)
    assert (resample(["b", "a"], 9, 1)[1] == resample(["b", "a"], 9, 1)[1]).all()


def test_intervals_hold_the_value_for_every_metric() -> None:
    logits, labels = scores(n=1000)
    found, values = (
        intervals(logits, labels, names(1000), CLASSES, 500, 0),
        metrics(logits, labels, CLASSES),
    )
    assert found.keys() == values.keys()
    for name, (low, high) in found.items():
        assert low < values[name] < high, name


def test_interval_of_accuracy_is_the_binomial_one() -> None:
    rng = np.random.default_rng(0)
    logits, labels = binary(rng, 2000, 0.8)
    low, high = intervals(logits, labels, names(2000), ["x", "y"], 4000, 0)["accuracy"]
    p = (logits.argmax(1) == labels).mean()
    assert (high - low) == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 2000), rel=0.05)


def test_coverage() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(200):
        right = np.repeat(
            rng.random(150) < 0.7, 2
        )  # both pictures of a lesion right, or both wrong
        labels = rng.integers(0, 2, 300)
        logits = np.eye(2)[np.where(right, labels, 1 - labels)]
        low, high = intervals(logits, labels, names(300, 2), ["x", "y"], 300, i)["accuracy"]
        hits += low <= 0.7 <= high
    assert 0.90 <= hits / 200 <= 0.985


def test_pictures_of_one_lesion_are_no_new_evidence() -> None:
    logits, labels = scores(n=200)
    twice, twice_labels = np.repeat(logits, 2, 0), np.repeat(labels, 2)
    once = intervals(logits, labels, names(200), CLASSES, 1000, 0)["balanced_accuracy"]
    clustered = intervals(twice, twice_labels, names(400, 2), CLASSES, 1000, 0)["balanced_accuracy"]
    independent = intervals(twice, twice_labels, names(400), CLASSES, 1000, 0)["balanced_accuracy"]
    width = [b - a for a, b in (once, clustered, independent)]
    assert width[1] == pytest.approx(width[0], rel=0.1)
    assert width[2] < 0.85 * width[1]


def test_identical_arms_differ_by_nothing() -> None:
    logits, labels = scores()
    arm = np.stack([logits, logits[:, ::-1]])
    for metric in ("balanced_accuracy", "auroc_macro", "accuracy"):
        found = compare(arm, arm.copy(), labels, names(400), 200, 0, metric)
        assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
        assert word(found.low, found.high) == "not shown"


def test_comparison_is_the_mean_over_seeds_and_turns_with_its_arms() -> None:
    (weak, labels), (strong, _) = scores(signal=0.5), scores(signal=2.5)
    a, b = np.stack([strong, weak]), np.stack([weak, weak])
    found = compare(a, b, labels, names(400), 500, 0)
    gap = [metrics(z, labels, CLASSES)["balanced_accuracy"] for z in (strong, weak)]
    assert found.difference == pytest.approx((gap[0] - gap[1]) / 2, abs=1e-9)
    assert (
        word(found.low, found.high) == "not shown"
    )  # one pair differs, the other does not: two seeds are no evidence
    a, b = np.stack([strong] * 3), np.stack([weak] * 3)
    found, back = (
        compare(a, b, labels, names(400), 500, 0),
        compare(b, a, labels, names(400), 500, 0),
    )
    assert word(found.low, found.high) == "better" and found.p < 0.01
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low)) and word(
        back.low, back.high
    ) == "worse"


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(0)
    logits, labels = binary(rng, 500, 0.7)
    other = logits.copy()
    other[:10] = np.eye(2)[labels[:10]]
    paired = compare(other[None], logits[None], labels, names(500), 500, 0, "accuracy")
    low, high = intervals(logits, labels, names(500), ["x", "y"], 500, 0)["accuracy"]
    assert paired.high - paired.low < 0.5 * (high - low)


def test_no_difference_is_found_as_often_as_said() -> None:
    rng = np.random.default_rng(2)
    found = 0
    for i in range(200):
        a, labels = binary(rng, 200, 0.7)
        right = rng.random(200) < 0.7
        b = np.eye(2)[np.where(right, labels, 1 - labels)]
        found += compare(a[None], b[None], labels, names(200), 200, i, "accuracy").p < 0.05
    assert found / 200 < 0.11


MALIGNANT = Measures({"malignant": ("c", "d")})


def test_every_metric_of_a_resample_is_that_of_the_repeated_rows() -> None:
    logits, labels = scores(n=300)
    limits = thresholds(*scores(n=200, seed=5), CLASSES, MALIGNANT)
    lesions = names(300, 2)
    drawn, count = draws(logits, labels, lesions, 4, 3, CLASSES, MALIGNANT, limits)
    index, weights = resample(lesions, 4, 3)
    assert (
        count == 150 and drawn.keys() == metrics(logits, labels, CLASSES, MALIGNANT, limits).keys()
    )
    for r in range(4):
        rows = np.repeat(np.arange(300), weights[r].astype(int)[index])
        expected = metrics(logits[rows], labels[rows], CLASSES, MALIGNANT, limits)
        assert {name: x[0, 1 + r] for name, x in drawn.items()} == pytest.approx(expected, abs=1e-9)


def test_intervals_of_groups_and_calibration_hold_the_value_and_keep_to_the_range() -> None:
    logits, labels = scores(n=600, signal=1.5)
    limits = thresholds(*scores(n=400, seed=5), CLASSES, MALIGNANT)
    found = intervals(logits, labels, names(600), CLASSES, 300, 0, MALIGNANT, limits)
    values = metrics(logits, labels, CLASSES, MALIGNANT, limits)
    assert found.keys() == values.keys()
    for name, (low, high) in found.items():
        most = 2 if name == "brier" else 0.2 + 1e-9 if name.startswith("pauc@") else 1
        assert 0 <= low <= values[name] <= high <= most and low < high, name


def test_several_seeds_hold_the_luck_of_training() -> None:
    (weak, labels), (strong, _) = scores(signal=0.8), scores(signal=1.6)
    one = intervals(weak, labels, names(400), CLASSES, 400, 0)
    alike = intervals(np.stack([weak] * 3), labels, names(400), CLASSES, 400, 0)
    spread = intervals(np.stack([weak, strong, weak]), labels, names(400), CLASSES, 400, 0)
    width = [x["accuracy"][1] - x["accuracy"][0] for x in (one, alike, spread)]
    assert width[1] == pytest.approx(
        width[0], rel=1e-6
    )  # one classifier three times: its lesions' luck, no more, no less
    assert width[2] > 2 * width[0]


def test_a_comparison_at_a_target_specificity_uses_each_classifier_s_thresholds() -> None:
    (a, labels), (b, _) = scores(signal=2.0), scores(signal=0.5, seed=0)
    ta, tb = (thresholds(z, labels, CLASSES, MALIGNANT) for z in (a, b))
    metric = "sensitivity@0.90/malignant"
    found = compare(
        a[None], b[None], labels, names(400), 200, 0, metric, CLASSES, MALIGNANT, [ta], [tb]
    )
    gap = (
        metrics(a, labels, CLASSES, MALIGNANT, ta)[metric]
        - metrics(b, labels, CLASSES, MALIGNANT, tb)[metric]
    )
    assert found.difference == pytest.approx(gap) and word(found.low, found.high) == "better"


def test_what_cannot_be_compared_is_said() -> None:
    logits, labels = scores()
    with pytest.raises(UserError, match="'f1' is not measured"):
        compare(logits[None], logits[None], labels, names(400), 100, 0, "f1")
    with pytest.raises(UserError, match="auroc_macro has no value"):
        compare(
            logits[None, :9], logits[None, :9], np.zeros(9, int), names(9), 100, 0, "auroc_macro"
        )


def test_one_lesion_shows_nothing() -> None:
    labels = np.zeros(4, int)
    found = compare(
        np.eye(2)[labels][None], np.eye(2)[1 - labels][None], labels, ["x"] * 4, 100, 0, "accuracy"
    )
    assert (found.difference, found.p, word(found.low, found.high)) == (
        1,
        1,
        "not shown",
    ) and "one lesion" in found.note
    assert intervals(np.eye(2)[labels], labels, ["x"] * 4, ["a", "b"], 100, 0) == {}
