"""The figures of one classifier on one role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from adversa.evaluate.operating import Measures
from adversa.evaluate.scores import checked
from adversa.evaluate.weighted import values


def metrics(
    logits: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    measures: Measures | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """logits [N, K], labels int [N], the K classes' names -> name -> value, in [0, 1] unless said.

    accuracy; balanced_accuracy (mean sensitivity of the classes that occur); worst_class (the least
    of them); auroc_macro (one class against the rest, mean of the classes that occur);
    sensitivity/<class>; specificity/<class>; brier (in [0, 2]); ece (of the top label, equal-width
    bins; an estimate that is too high where images are few). For each group of `measures`:
    auroc/<group>; pauc@<floor>/<group>, the area above that sensitivity, in [0, 1 - floor];
    pauc_norm@<floor>/<group>, that over 1 - floor, so that 1 is perfect and chance is (1 - floor) /
    2; and with `thresholds` (of operating.thresholds, set on another role for this same classifier)
    sensitivity@<target>/<group>, and the specificity reached there, specificity@<target>/<group>.

    What has no value is left out, never NaN: the sensitivity of a class without an image; AUROC
    where one class only occurs. Then `classes_absent` is there, the number of classes without an
    image (absent() names them): the means above are over fewer classes than the run has. UserError
    where a logit is not finite or a group names no class.
    """
    logits, labels = checked(logits, labels, len(classes))
    one = np.zeros(len(labels), int), np.ones((1, 1))
    drawn = values(logits, labels, *one, classes, measures or Measures(), thresholds)
    found = {name: float(value[0]) for name, value in drawn.items() if np.isfinite(value[0])}
    missing = len(absent(labels, classes))
    return {**found, "classes_absent": float(missing)} if missing else found


def absent(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """The classes without an image."""
    counts = np.bincount(labels, minlength=len(classes))
    return [name for name, n in zip(classes, counts, strict=True) if n == 0]
