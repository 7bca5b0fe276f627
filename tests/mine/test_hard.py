from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from adversa.config import Mine
from adversa.mine.budget import allocate
from adversa.mine.hard import MISCLASSIFIED, NEAR_MISS, difficulty, farthest_first, hard_cases


def logits_of(p: list[list[float]]) -> np.ndarray:
    return np.log(np.array(p))


def planted(
    n: int = 300, classes: int = 4, seed: int = 0
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    logits = random.normal(size=(n, classes))
    logits[np.arange(n), labels] += 1.5
    return [f"id{i:04d}" for i in range(n)], labels, logits, random.normal(size=(n, 8))


def test_difficulty_is_the_closed_form() -> None:
    hard = difficulty(logits_of([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]]), np.array([0, 2]))
    np.testing.assert_allclose(hard.loss, [-np.log(0.7), -np.log(0.25)])
    np.testing.assert_allclose(hard.margin, [0.5, -0.25])
    np.testing.assert_allclose(
        hard.entropy,
        [-(0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1)), 1.5 * np.log(2)],
    )
    assert hard.predicted.tolist() == [0, 1]


def test_difficulty_keeps_small_losses_and_survives_large_logits() -> None:
    hard = difficulty(np.array([[20, 0], [1000, 0], [0, 1000]], np.float32), np.zeros(3, np.int64))
    np.testing.assert_allclose(hard.loss[0], np.log1p(np.exp(-20.0)), rtol=1e-6)
    assert hard.loss[0] > 0
    np.testing.assert_allclose(hard.loss[1:], [0, 1000])
    np.testing.assert_allclose(hard.margin[1:], [1, -1])
    np.testing.assert_allclose(hard.entropy[1:], [0, 0])


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(AssertionError, match="not finite"):
        difficulty(np.array([[np.nan, 0.0]]), np.array([0]))


def test_allocate_is_largest_remainder() -> None:
    # quotas 10 * (5, 3, 2) / 10; then 7 * the same = 3.5, 2.1, 1.4: one place over, to the largest
    # remainder
    assert allocate(10, np.array([5.0, 3, 2]), np.array([99, 99, 99])).tolist() == [5, 3, 2]
    assert allocate(7, np.array([5.0, 3, 2]), np.array([99, 99, 99])).tolist() == [4, 2, 1]
    assert allocate(1, np.array([1.0, 1, 1]), np.array([9, 9, 9])).tolist() == [1, 0, 0]


def test_allocate_passes_on_what_a_class_cannot_use() -> None:
    assert allocate(10, np.array([8.0, 1, 1]), np.array([2, 99, 99])).tolist() == [2, 4, 4]
    assert allocate(10, np.array([1.0, 0, 0]), np.array([4, 4, 2])).tolist() == [4, 4, 2]
    assert allocate(8, np.array([1.0, 0, 0]), np.array([2, 4, 8])).tolist() == [2, 2, 4]


@pytest.mark.parametrize("seed", range(20))
def test_allocate_always_adds_up_within_the_room(seed: int) -> None:
    random = np.random.default_rng(seed)
    room = random.integers(0, 20, 7)
    weights = random.random(7) * random.integers(0, 2, 7)
    for budget in (1, 5, 17, 50, 1000):
        taken = allocate(budget, weights, room)
        assert taken.sum() == min(budget, room.sum())
        assert (taken >= 0).all() and (taken <= room).all()


def test_farthest_first_on_a_line() -> None:
    # from 0: the farthest is 10, then the middle-most 4 (distance 4), then 7 (3), then 1
    assert farthest_first(np.array([[0.0], [1], [4], [7], [10]]), 5) == [0, 4, 2, 3, 1]


def test_farthest_first_takes_one_of_a_cluster_of_duplicates_and_never_a_row_twice() -> None:
    points = np.concatenate([np.zeros((50, 2)), [[1, 0], [0, 1], [3, 3]]])
    assert sorted(farthest_first(points, 4)) == [0, 50, 51, 52]
    assert sorted(farthest_first(points, 53)) == list(range(53))


def test_hard_cases_are_the_wrong_and_the_nearly_wrong() -> None:
    p = [[0.9, 0.1], [0.54, 0.46], [0.3, 0.7], [0.45, 0.55], [0.1, 0.9]]
    cases = hard_cases(
        list("abcde"), np.array([0, 0, 0, 1, 1]), logits_of(p), np.eye(5), Mine(near_margin=0.1001)
    )
    assert {(c.example, c.reason, c.predicted) for c in cases} == {
        ("b", NEAR_MISS, 0),
        ("c", MISCLASSIFIED, 1),
        ("d", NEAR_MISS, 1),
    }
    by_id = {c.example: c for c in cases}
    assert by_id["c"].loss == pytest.approx(-np.log(0.3)) and by_id["c"].margin == pytest.approx(
        -0.4
    )


def test_a_perfect_classifier_has_no_hard_cases() -> None:
    assert hard_cases(["a", "b"], np.array([0, 1]), 30 * np.eye(2), np.eye(2), Mine()) == []


def test_budget_follows_the_error_rate_not_the_size_of_the_class() -> None:
    # class 0: 30 wrong of 1000 (3%); class 1: 30 wrong of 100 (30%)
    labels = np.array([0] * 1000 + [1] * 100)
    predicted = labels.copy()
    predicted[:30], predicted[1000:1030] = 1, 0
    ids = [f"{i:05d}" for i in range(1100)]
    cases = hard_cases(
        ids, labels, 5.0 * np.eye(2)[predicted], np.zeros((1100, 0)), Mine(budget=11)
    )
    assert [sum(c.label == k for c in cases) for k in (0, 1)] == [1, 10]


@pytest.mark.parametrize("budget", [1, 16, 64, 10_000])
def test_budget_is_kept_or_all_are_taken(budget: int) -> None:
    ids, labels, logits, embeddings = planted()
    hard = difficulty(logits, labels)
    available = int(np.sum((hard.predicted != labels) | (hard.margin < 0.1)))
    cases = hard_cases(ids, labels, logits, embeddings, Mine(budget=budget))
    assert len(cases) == len({c.example for c in cases}) == min(budget, available)
    assert [c.rank for c in cases] == list(range(len(cases)))


def test_order_of_rows_makes_no_difference() -> None:
    ids, labels, logits, embeddings = planted()
    logits[40:80], labels[40:80] = (
        [9, 0, 0, 0],
        1,
    )  # equally and badly wrong: only their ids tell them apart
    p = np.random.default_rng(1).permutation(len(ids))
    first = hard_cases(ids, labels, logits, embeddings, Mine(budget=40))
    again = hard_cases([ids[i] for i in p], labels[p], logits[p], embeddings[p], Mine(budget=40))
    assert [dataclasses.astuple(c) for c in first] == [dataclasses.astuple(c) for c in again]


def test_one_failure_mode_does_not_fill_the_list() -> None:
    # 40 wrong images of one mode, harder than the 4 of another; without diversity the second mode
    # is never taken
    logits = np.array([[0, 5 + 0.001 * i] for i in range(40)] + [[0, 4.0]] * 4 + [[0, 9.0]] * 10)
    labels = np.array([0] * 44 + [1] * 10)
    embeddings = np.array([[1, 0.0]] * 40 + [[0, 1.0]] * 4 + [[1, 1]] * 10)
    ids = [f"{i:03d}" for i in range(54)]
    taken = {
        c.example
        for c in hard_cases(ids, labels, logits, embeddings, Mine(budget=4, candidates=11))
    }
    assert taken & {f"{i:03d}" for i in range(40, 44)}
    hardest = {
        c.example for c in hard_cases(ids, labels, logits, embeddings, Mine(budget=4, candidates=1))
    }
    assert hardest == {"036", "037", "038", "039"}


def test_any_beginning_of_the_list_goes_round_the_classes() -> None:
    ids, labels, logits, embeddings = planted(600)
    cases = hard_cases(ids, labels, logits, embeddings, Mine(budget=80))
    assert {c.label for c in cases[:4]} == {0, 1, 2, 3}


def test_candidates_are_put_in_order_by_the_scorer() -> None:
    logits = np.array([[0, 9.0], [0, 0.1]])  # sure and wrong, in doubt and wrong
    one = Mine(budget=1, candidates=1)
    taken = {
        scorer: hard_cases(
            ["sure", "torn"], np.zeros(2, int), logits, np.eye(2), one, scorer=scorer
        )
        for scorer in ("loss", "entropy")
    }
    assert {k: [c.example for c in v] for k, v in taken.items()} == {
        "loss": ["sure"],
        "entropy": ["torn"],
    }
