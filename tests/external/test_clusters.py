"""Of which figures on an external cohort an interval can be had: those made of two clusters or
more.
"""

from __future__ import annotations

import numpy as np

from adversa import config as cfg
from adversa.data.records import ImageRecord
from adversa.external import cohort
from adversa.external.clusters import clusters, counted

CLASSES, GROUPS = ["a", "b", "c", "d"], {"bad": ["a", "b"], "odd": ["b"], "a": ["a", "c"]}


def test_a_metric_needs_two_clusters_of_each_thing_it_is_made_of():
    """a has the patients 1 and 2, b patient 3 alone, c 1, 2, 3; nobody has d."""
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    found = clusters(["1", "1", "2", "3", "3", "1", "2", "3"], labels, CLASSES, GROUPS)
    assert (
        found.total == 3
        and found.few == ["b"]
        and found.classes["a"] == (2, 3)
        and found.classes["d"] == (0, 3)
    )
    for metric in (
        "accuracy",
        "brier",
        "ece",
        "sensitivity/a",
        "specificity/b",
        "sensitivity@0.80/bad",
        "auroc/bad",
        "specificity@0.80/odd",
    ):
        assert found.tell(metric), metric
    for metric in (
        "balanced_accuracy",
        "worst_class",
        "auroc_macro",
        "sensitivity/b",
        "sensitivity@0.80/odd",
        "pauc_norm@0.80/odd",
    ):
        assert not found.tell(metric), metric
    assert not found.tell("auroc/a")  # the group: of a and c, with b alone against it
    assert found.tell("specificity/a")  # the class


def test_one_cluster_tells_nothing():
    found = clusters(["1"] * 4, np.array([0, 1, 2, 0]), CLASSES, GROUPS)
    assert found.few == ["a", "b", "c"] and not any(
        map(found.tell, ("accuracy", "balanced_accuracy", "sensitivity/a", "auroc/bad"))
    )


def test_counts_agree_with_their_noun():
    assert [counted(n, "patient") for n in (0, 1, 2)] == ["0 patients", "1 patient", "2 patients"]


def test_lesion_1_of_one_patient_is_not_that_of_another():
    records = [
        ImageRecord("", f"{i}.png", f"file:{i}.png", "nv", "1", patient)
        for i, patient in enumerate(("ann", "ann", "bob", ""))
    ]
    data = cfg.Data(source="csv", path="x", columns=cfg.Columns(group="lesion"))
    found, unit = cohort._clustered(records, data)
    assert ([r.group for r in found], unit) == (["ann/1", "ann/1", "bob/1", "1"], cohort.PATIENT)
