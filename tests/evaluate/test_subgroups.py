from __future__ import annotations

import numpy as np
import pytest

from adversa.evaluate.metrics import metrics
from adversa.evaluate.subgroups import by_attribute, compare_by_attribute
from adversa.types import UserError

CLASSES = ["x", "y"]


def study() -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, str]]]:
    """(logits [N, 2], labels, lesions, attributes): back has 60 lesions, face 29 of one image, hand
    12 of three, 9 not known.
    """
    rng = np.random.default_rng(0)
    site = ["back"] * 60 + ["face"] * 29 + ["hand"] * 36 + [""] * 9
    lesions = np.array(
        [*range(60), *range(100, 129), *np.repeat(np.arange(200, 212), 3), *range(300, 309)]
    )
    labels = rng.integers(0, 2, len(site))
    return (
        rng.normal(size=(len(site), 2)),
        labels,
        lesions,
        [{"site": s} if s else {} for s in site],
    )


def test_each_value_has_its_own_figures_and_few_lesions_are_flagged() -> None:
    logits, labels, lesions, attributes = study()
    found = {
        s.value: s
        for s in by_attribute(logits, labels, lesions, CLASSES, attributes, "site", 100, 0)
    }
    assert {v: (s.n, s.lesions, s.small) for v, s in found.items()} == {
        "back": (60, 60, False),
        "face": (29, 29, True),
        "hand": (36, 12, True),
        "unknown": (9, 9, True),
    }
    assert found["back"].metrics == pytest.approx(metrics(logits[:60], labels[:60], CLASSES))
    assert (
        found["back"].intervals.keys() == found["back"].metrics.keys()
        and found["hand"].intervals == {}
    )


def test_strings_do_as_well_as_dicts() -> None:
    logits, labels, lesions, attributes = study()
    strings = [a.get("site", "") for a in attributes]
    a, b = (
        by_attribute(logits, labels, lesions, CLASSES, given, "site", 100, 0)
        for given in (attributes, strings)
    )
    assert a == b
    with pytest.raises(UserError, match="no image has the attribute 'age'"):
        by_attribute(logits, labels, lesions, CLASSES, attributes, "age", 100, 0)


def test_a_small_subgroup_is_never_tested_whatever_it_shows() -> None:
    _, labels, lesions, attributes = study()
    right, wrong = np.eye(2)[labels][None], np.eye(2)[1 - labels][None]
    found = {
        c.value: c
        for c in compare_by_attribute(right, wrong, labels, lesions, attributes, "site", 100, 0)
    }
    assert found["back"].word == "better" and found["back"].comparison.difference == 1
    assert all(
        found[v].comparison is found[v].p_holm is found[v].word is None
        for v in ("face", "hand", "unknown")
    )


@pytest.mark.parametrize("few", [1, 4, 5])
def test_a_class_of_few_lesions_is_no_evidence(few: int) -> None:
    labels = np.array([0] * 60 + [1] * few)
    a, b = np.eye(2)[labels][None], np.eye(2)[np.zeros_like(labels)][None]  # only the few differ
    (found,) = compare_by_attribute(
        a, b, labels, np.arange(60 + few), ["x"] * (60 + few), "site", 100, 0
    )
    assert found.small == (few < 5) and (found.comparison is None) == (few < 5)


def test_a_class_of_one_lesion_has_no_interval() -> None:
    labels = np.array([0] * 60 + [1])
    (found,) = by_attribute(
        np.eye(2)[labels], labels, np.arange(61), CLASSES, ["x"] * 61, "site", 100, 0
    )
    assert found.intervals == {} and found.metrics["balanced_accuracy"] == 1 and not found.small


def test_holm_counts_the_subgroups_tested() -> None:
    rng = np.random.default_rng(1)
    labels, values = rng.integers(0, 2, 120), ["a"] * 40 + ["b"] * 40 + ["c"] * 40
    logits = rng.normal(size=(2, 1, 120, 2))
    found = compare_by_attribute(
        logits[0], logits[1], labels, np.arange(120), values, "site", 100, 0
    )
    least = min(found, key=lambda c: c.comparison.p)
    assert least.p_holm == pytest.approx(min(1, 3 * least.comparison.p))


def test_a_subgroup_that_is_better_among_several_by_chance_is_not_said_to_be() -> None:
    labels, values = np.arange(120) % 2, ["a"] * 40 + ["b"] * 40 + ["c"] * 40
    wrong = labels.copy()
    wrong[:5] = 1 - labels[:5]
    a, b = np.eye(2)[labels][None], np.eye(2)[wrong][None]
    first, *_ = compare_by_attribute(a, b, labels, np.arange(120), values, "site", 1000, 0)
    assert first.comparison.low > 0 and first.comparison.p < 0.05 < first.p_holm
    assert first.word == "not shown"
