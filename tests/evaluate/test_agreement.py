"""The figures against other people's code: scikit-learn, torchmetrics, the ISIC challenges' own
scorers.
"""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from adversa.common.statistics import softmax
from adversa.evaluate.calibration import reliability
from adversa.evaluate.metrics import metrics
from adversa.evaluate.operating import Measures, thresholds

CLASSES = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
MALIGNANT = ["mel", "bcc", "akiec"]
MEASURES = Measures({"melanoma": ["mel"], "malignant": MALIGNANT})
SEEDS = range(5)


def predictions(seed: int, n: int = 700) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, 7] and labels of unequal classes; a third of the images are tied in pairs."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(7, n, p=[0.05, 0.07, 0.15, 0.03, 0.15, 0.5, 0.05])
    labels[:7] = np.arange(7)
    logits = rng.normal(size=(n, 7)) * 1.5
    logits[np.arange(n), labels] += 1.0
    logits[: n // 6] = logits[n // 6 : 2 * (n // 6)]
    return logits, labels


def isic_2024(positive: np.ndarray, score: np.ndarray, floor: float) -> float:
    """The challenge's pAUC: labels and scores turned over, scikit-learn's partial AUC, its scaling
    (McClish 1989) undone.
    """
    most = 1 - floor
    scaled = roc_auc_score(~positive, 1 - score, max_fpr=most)
    return 0.5 * most**2 + (most - 0.5 * most**2) / 0.5 * (scaled - 0.5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("floor", [0.5, 0.8, 0.88])
def test_groups_agree_with_scikit_learn_and_isic_2024(seed: int, floor: float) -> None:
    logits, labels = predictions(seed)
    found = metrics(logits, labels, CLASSES, Measures(MEASURES.groups, floor=floor))
    for group, inside in MEASURES.groups.items():
        score = softmax(logits)[:, [CLASSES.index(c) for c in inside]].sum(1)
        positive = np.isin(labels, [CLASSES.index(c) for c in inside])
        assert found[f"auroc/{group}"] == pytest.approx(roc_auc_score(positive, score), abs=1e-9)
        expected = isic_2024(positive, score, floor)
        assert found[f"pauc@{floor:.2f}/{group}"] == pytest.approx(expected, abs=1e-9)
        assert found[f"pauc_norm@{floor:.2f}/{group}"] == pytest.approx(
            expected / (1 - floor), abs=1e-9
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_sensitivity_at_specificity_is_the_best_point_of_the_curve(seed: int) -> None:
    logits, labels = predictions(seed)
    found = metrics(
        logits, labels, CLASSES, MEASURES, thresholds(logits, labels, CLASSES, MEASURES)
    )
    for group, inside in MEASURES.groups.items():
        k = [CLASSES.index(c) for c in inside]
        fpr, tpr, _ = roc_curve(
            np.isin(labels, k), softmax(logits)[:, k].sum(1), drop_intermediate=False
        )
        for target in (0.80, 0.90, 0.95):
            assert found[f"sensitivity@{target:.2f}/{group}"] == pytest.approx(
                tpr[fpr <= 1 - target + 1e-12].max(), abs=1e-9
            )
            assert found[f"specificity@{target:.2f}/{group}"] >= target - 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_agrees_with_torchmetrics(seed: int) -> None:
    import torch
    import torchmetrics.functional.classification as tm

    logits, labels = predictions(seed)
    found = metrics(
        logits, labels, CLASSES, MEASURES, thresholds(logits, labels, CLASSES, MEASURES)
    )
    p, y = torch.tensor(softmax(logits)), torch.tensor(labels)
    k = [CLASSES.index(c) for c in MALIGNANT]
    score, positive = (
        torch.tensor(softmax(logits)[:, k].sum(1)),
        torch.tensor(np.isin(labels, k).astype(int)),
    )
    of_class = {c: tm.multiclass_recall(p, y, 7, average=None)[i] for i, c in enumerate(CLASSES)}
    specificity = tm.multiclass_specificity(p, y, 7, average=None)
    at_90, _ = tm.binary_sensitivity_at_specificity(score, positive, 0.90)
    expected = {
        "accuracy": tm.multiclass_accuracy(p, y, 7, average="micro"),
        "balanced_accuracy": tm.multiclass_recall(p, y, 7, average="macro"),
        "worst_class": min(of_class.values()),
        "auroc_macro": tm.multiclass_auroc(p, y, 7, average="macro"),
        "ece": tm.multiclass_calibration_error(p, y, 7, n_bins=15, norm="l1"),
        "auroc/malignant": tm.binary_auroc(score, positive),
        "sensitivity@0.90/malignant": at_90,
        **{f"sensitivity/{c}": v for c, v in of_class.items()},
        **{f"specificity/{c}": specificity[i] for i, c in enumerate(CLASSES)},
    }
    assert {name: found[name] for name in expected} == pytest.approx(
        {k: float(v) for k, v in expected.items()}, abs=1e-6
    )
    bins = [b for b in reliability(logits, labels) if b.n]
    ece = sum(b.n * abs(b.accuracy - b.confidence) for b in bins) / sum(b.n for b in bins)
    assert ece == pytest.approx(found["ece"], abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_agrees_with_the_isic_challenge_s_scorer(seed: int) -> None:
    """Its auc_sens_80 counts what lies below the floor too, from the point where the curve crosses
    it: that rectangle is added.
    """
    import pandas as pd
    from isic_challenge_scoring import metrics as isic

    logits, labels = predictions(seed)
    found = metrics(logits, labels, CLASSES, Measures({c: [c] for c in CLASSES}))
    # The metrics of its ClassificationScore, which also thins out ROC curves for a drawing.
    truth = pd.DataFrame(np.eye(7)[labels], columns=CLASSES)
    given = pd.DataFrame(softmax(logits), columns=CLASSES)
    weights = pd.Series(np.ones(len(labels)))
    balanced = isic.balanced_multiclass_accuracy(truth, given, weights)
    assert found["balanced_accuracy"] == pytest.approx(balanced, abs=1e-6)
    aucs = {c: isic.auc(truth[c], given[c], weights) for c in CLASSES}
    assert found["auroc_macro"] == pytest.approx(np.mean(list(aucs.values())), abs=1e-6)
    for i, c in enumerate(CLASSES):
        assert found[f"auroc/{c}"] == pytest.approx(aucs[c], abs=1e-6)
        fpr, tpr, _ = roc_curve(labels == i, softmax(logits)[:, i], drop_intermediate=False)
        after = int(np.searchsorted(tpr, 0.8))
        share = (0.8 - tpr[after - 1]) / (tpr[after] - tpr[after - 1])
        crossing = fpr[after - 1] + share * (fpr[after] - fpr[after - 1])
        theirs = isic.auc_above_sensitivity(truth[c], given[c], weights, 0.80)
        assert found[f"pauc@0.80/{c}"] + 0.8 * (1 - crossing) == pytest.approx(theirs, abs=1e-6)
