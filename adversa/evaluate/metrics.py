"""The figures of one classifier on one role."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import roc_auc_score

from adversa.types import UserError


def metrics(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """logits [N, K], labels int [N], the K classes' names -> name -> value, each in [0, 1].

    accuracy; balanced_accuracy (mean sensitivity of the classes that occur); auroc_macro (one class against the rest,
    mean of the classes that occur); sensitivity/<class>; specificity/<class>. What has no value is left out, never NaN:
    the sensitivity of a class without an image; AUROC where one class only occurs. Then `classes_absent` is there, the
    number of classes without an image (absent() names them): the means above are over fewer classes than the run has.
    """
    logits, labels = checked(logits, labels, len(classes))
    counts = confusion(logits, labels)
    out = from_confusion(counts[None], classes)
    probability = softmax(logits)
    present = [k for k in range(len(classes)) if 0 < np.sum(labels == k) < len(labels)]
    if present:
        out["auroc_macro"] = np.array([np.mean([roc_auc_score(labels == k, probability[:, k]) for k in present])])
    found = {name: float(value[0]) for name, value in out.items() if np.isfinite(value[0])}
    missing = len(absent(labels, classes))
    return {**found, "classes_absent": float(missing)} if missing else found


def absent(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """The classes without an image."""
    counts = np.bincount(labels, minlength=len(classes))
    return [name for name, n in zip(classes, counts, strict=True) if n == 0]


def checked(logits: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N, K] and int64 [N]; UserError where a logit is not finite."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    assert logits.ndim == 2 and logits.shape == (len(labels), num_classes) and len(labels), (logits.shape, labels.shape)
    labels = labels.astype(np.int64)
    assert labels.min() >= 0 and labels.max() < num_classes, (labels.min(), labels.max())
    bad = int((~np.isfinite(logits)).any(1).sum())
    if bad:
        raise UserError(f"logits of {bad} of {len(labels)} images are not finite; lower classifier.lr")
    return logits, labels


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [..., K] from logits."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts [K, K]: row = label, column = predicted (largest logit, of equals the first)."""
    k = logits.shape[1]
    return np.bincount(labels * k + logits.argmax(1), minlength=k * k).reshape(k, k)


def from_confusion(counts: np.ndarray, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """counts [R, K, K] (row = label, column = predicted), whole or weighted -> name -> [R]; NaN where undefined."""
    counts = counts.astype(np.float64)
    right = counts.diagonal(axis1=1, axis2=2)
    of_label, of_predicted, total = counts.sum(2), counts.sum(1), counts.sum((1, 2))
    others = total[:, None] - of_label
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity = right / of_label
        specificity = (others - (of_predicted - right)) / others
        accuracy = right.sum(1) / total
        occurs = of_label > 0
        balanced = np.where(occurs, sensitivity, 0).sum(1) / occurs.sum(1)
    out = {"accuracy": accuracy, "balanced_accuracy": balanced}
    for i, name in enumerate(classes):
        out[f"sensitivity/{name}"], out[f"specificity/{name}"] = sensitivity[:, i], specificity[:, i]
    return out
