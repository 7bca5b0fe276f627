"""The one-standard-error rule and what helped a class, on predictions made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from adversa.evaluate import choosing
from adversa.evaluate.choosing import HELPED, NOT_HELPED, UNKNOWN

AB = ["a", "b"]


def says(labels: np.ndarray, right: np.ndarray, classes: int = 2) -> np.ndarray:
    """Logits [N, K] that are right where asked, and else say the next class."""
    return np.eye(classes)[np.where(right, labels, (labels + 1) % classes)]


def share(n: int, right: int) -> np.ndarray:
    return np.arange(n) < right


def two(n: int) -> np.ndarray:
    """n images of each of two classes."""
    return np.repeat([0, 1], n)


def scored(n: int, **right: int) -> tuple[dict[float, np.ndarray], np.ndarray, list[str]]:
    """(ratio -> logits [1, 2 n, 2], labels, lesions): of each class so many of n are right, each
    image its own lesion.
    """
    labels = two(n)
    logits = {
        float(k[1:].replace("_", ".")): says(labels, np.tile(share(n, v), 2))[None]
        for k, v in right.items()
    }
    return logits, labels, [f"g{i}" for i in range(2 * n)]


def chosen(*made, resamples: int = 2000) -> choosing.Choice:
    return choosing.choose(*made, AB, resamples, 0)


def test_the_best_of_equals_is_the_smallest():
    found = chosen(*scored(20, r2_5=15, r1=15, r5=15))
    assert (found.chosen, found.best) == (1.0, 1.0) and list(found.figures) == [1.0, 2.5, 5.0]
    assert len({f.mean for f in found.figures.values()}) == 1


def test_the_standard_error_is_that_of_two_binomials():
    """Of balanced accuracy, with n lesions of each of two classes: sqrt(p (1 - p) / (2 n)), but
    that resamples vary n, too.
    """
    found = chosen(*scored(200, r0=160))
    assert found.figures[0.0].mean == pytest.approx(0.8) and found.figures[0.0].se == pytest.approx(
        np.sqrt(0.16 / 400), rel=0.08
    )


@pytest.mark.parametrize(
    ("right", "ratio", "best"),
    [
        (
            {"r0": 120, "r0_5": 178, "r1": 180},
            0.5,
            1.0,
        ),  # within one standard error (0.015) of the best: fewer images
        ({"r0": 120, "r0_5": 170, "r1": 180}, 1.0, 1.0),  # not within
        ({"r0": 179, "r0_5": 150, "r1": 180}, 0.0, 1.0),  # no image at all is as good
        ({"r0": 180, "r0_5": 150, "r1": 120}, 0.0, 0.0),  # images harm
    ],
)
def test_the_smallest_within_one_standard_error_of_the_best_is_chosen(right, ratio, best):
    found = chosen(*scored(200, **right))
    assert (found.chosen, found.best) == (ratio, best)
    assert found.bar == pytest.approx(found.figures[best].mean - found.figures[best].se)


def test_what_every_lesion_agrees_on_has_no_standard_error_and_the_best_is_taken():
    found = chosen(*scored(30, r0=0, r0_5=30, r1=30))
    assert found.chosen == found.best == 0.5 and found.figures[0.5].se == 0.0


def test_pictures_of_one_lesion_are_no_more_evidence_than_one():
    logits, labels, groups = scored(100, r0=70)
    once = chosen(logits, labels, groups)
    again = chosen(
        {0.0: np.repeat(logits[0.0], 3, axis=1)},
        np.repeat(labels, 3),
        [g for g in groups for _ in range(3)],
    )
    assert again.figures[0.0].se == pytest.approx(once.figures[0.0].se, rel=1e-9)


def test_seeds_are_averaged_before_lesions_are_resampled():
    labels = two(50)
    one, other = (
        np.tile(share(50, 25), 2),
        np.tile(~share(50, 25), 2),
    )  # each wrong where the other is right
    found = choosing.choose(
        {0.0: np.stack([says(labels, one), says(labels, other)])},
        labels,
        list(map(str, range(100))),
        AB,
        500,
        0,
    )
    assert found.figures[0.0].each == pytest.approx((0.5, 0.5)) and found.figures[0.0].se < 1e-9


def test_rare_and_absent_classes_leave_no_nan():
    labels = np.array([0] * 30 + [1])
    logits = {r: says(labels, share(31, right), 3)[None] for r, right in ((0.0, 20), (1.0, 25))}
    found = choosing.choose(
        logits, labels, list(map(str, labels * 100 + np.arange(31))), ["a", "b", "c"], 300, 0
    )
    assert all(np.isfinite([f.mean, f.se]).all() for f in found.figures.values()) and np.isfinite(
        found.bar
    )
    told = choosing.help_by_class(
        logits[1.0], logits[0.0], labels, list("x" * 31), ["a", "b", "c"], [9, 9, 9], 300, 0
    )
    assert told["c"] == choosing.Help(None, None, None, 0, UNKNOWN)
    assert all(np.isfinite([told[c].difference, told[c].se, told[c].bar]).all() for c in "ab")


# ---- what helped ---------------------------------------------------------------------------------


def helps(n: int, before: int, after: int, added=(5, 5), lesions=None) -> choosing.Help:
    """Of class b, of which `before` and `after` of n are right (the same ones first); class a is
    always right.
    """
    labels = np.array([0] * 40 + [1] * n)
    a, b = (
        says(labels, np.concatenate([np.ones(40, bool), share(n, right)]))[None]
        for right in (after, before)
    )
    groups = [f"a{i}" for i in range(40)] + [f"b{i % (lesions or n)}" for i in range(n)]
    found = choosing.help_by_class(a, b, labels, groups, AB, added, 2000, 0)
    assert found["a"].difference == 0 and found["a"].se == 0 and found["a"].word == NOT_HELPED
    return found["b"]


def test_the_standard_error_of_a_difference_is_of_pairs():
    """d of n lesions turn from wrong to right: sqrt(d / n (1 - d / n) / n), however many are right
    in both.
    """
    found = helps(100, 50, 60)
    assert (
        found.difference == pytest.approx(0.1)
        and found.se == pytest.approx(0.03, rel=0.1)
        and found.word == HELPED
    )
    assert helps(100, 10, 20).se == pytest.approx(found.se, rel=0.1)


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [(50, 50, NOT_HELPED), (60, 50, NOT_HELPED), (50, 51, NOT_HELPED), (50, 52, HELPED)],
)
@pytest.mark.parametrize("n", [60, 1000])
def test_a_class_is_helped_where_more_turns_right_than_one_lesion(n, before, after, word):
    found = helps(n, before, after)
    assert found.word == word and found.bar == pytest.approx(np.hypot(found.se, 1 / n))


def test_lesions_that_turn_wrong_count_against_those_that_turn_right():
    """3 of 100 turn right and 1 wrong: 0.02, and sqrt(4 + 1) / 100 is more."""
    labels = np.array([0] * 40 + [1] * 100)
    without, after = (
        np.concatenate([np.ones(40, bool), x])
        for x in (share(100, 50), share(100, 53) & (np.arange(100) != 0))
    )
    found = choosing.help_by_class(
        says(labels, after)[None],
        says(labels, without)[None],
        labels,
        list(map(str, range(140))),
        AB,
        [5, 5],
        2000,
        0,
    )["b"]
    assert found.difference == pytest.approx(0.02) and found.bar == pytest.approx(
        np.sqrt(5) / 100, rel=0.05
    )
    assert found.word == NOT_HELPED


def test_of_few_lesions_or_no_images_nothing_is_said():
    assert helps(4, 0, 4).word == UNKNOWN and helps(5, 0, 5).word == HELPED
    assert helps(40, 0, 40, lesions=4) == choosing.Help(
        1.0, 0.0, 0.25, 4, UNKNOWN
    )  # many pictures of few lesions
    labels = two(40)
    a, b = says(labels, share(80, 80))[None], says(labels, share(80, 60))[None]
    assert (
        choosing.help_by_class(a, b, labels, list(map(str, range(80))), AB, [3, 0], 200, 0)[
            "b"
        ].word
        == UNKNOWN
    )
