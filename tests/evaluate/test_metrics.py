from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    recall_score,
    roc_auc_score,
)

from adversa.common.statistics import softmax
from adversa.evaluate.metrics import absent, metrics
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


def test_agrees_with_sklearn() -> None:
    logits, labels = scores()
    predicted, found = logits.argmax(1), metrics(logits, labels, CLASSES)
    expected = {
        "accuracy": accuracy_score(labels, predicted),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "auroc_macro": roc_auc_score(labels, softmax(logits), multi_class="ovr", average="macro"),
        "worst_class": recall_score(labels, predicted, average=None).min(),
        "brier": brier_score_loss(labels, softmax(logits), scale_by_half=False),
    }
    for k, name in enumerate(CLASSES):
        expected[f"sensitivity/{name}"] = recall_score(labels == k, predicted == k)
        expected[f"specificity/{name}"] = recall_score(labels != k, predicted != k)
    assert found.pop("ece") > 0
    assert found == pytest.approx(expected, abs=1e-9)


def test_perfect_and_inverted() -> None:
    labels = np.array([0, 0, 1, 2, 3])
    found = metrics(np.eye(4)[labels] * 99, labels, CLASSES)
    assert (
        found.pop("ece") == pytest.approx(0)
        and found.pop("brier") == pytest.approx(0)
        and set(found.values()) == {1.0}
    )
    wrong = metrics(-np.eye(4)[labels] * 9, labels, CLASSES)
    assert wrong["balanced_accuracy"] == 0 and wrong["auroc_macro"] == 0


def test_a_class_without_images_is_left_out_and_said() -> None:
    logits, labels = scores()
    keep = labels != 2
    found = metrics(logits[keep], labels[keep], CLASSES)
    assert "sensitivity/c" not in found and "specificity/c" in found
    assert found["classes_absent"] == 1 and absent(labels[keep], CLASSES) == ["c"]
    assert found["balanced_accuracy"] == pytest.approx(
        np.mean([found[f"sensitivity/{c}"] for c in CLASSES if c != "c"])
    )
    assert "classes_absent" not in metrics(logits, labels, CLASSES)


def test_one_class_only_has_no_auroc_and_no_nan() -> None:
    logits, _ = scores(n=10)
    found = metrics(logits, np.zeros(10, int), CLASSES)
    assert (
        "auroc_macro" not in found
        and "specificity/a" not in found
        and np.isfinite(list(found.values())).all()
    )


def test_nan_logits_are_refused() -> None:
    logits, labels = scores(n=10)
    logits[3, 1] = np.nan
    with pytest.raises(UserError, match="1 of 10 images"):
        metrics(logits, labels, CLASSES)
