from __future__ import annotations

import numpy as np
import pytest

from adversa.config import Mine
from adversa.mine.budget import allocate, shares
from adversa.mine.hard import difficulty, hard_cases

ROOM = np.array([50, 50, 50])


def test_without_temperature_shares_are_proportional() -> None:
    np.testing.assert_allclose(shares(np.array([0.1, 0.3, 0.0]), ROOM), [0.25, 0.75, 0])


def test_softmax_of_error_over_temperature() -> None:
    got = shares(np.array([0.2, 0.1, 0.1]), ROOM, temperature=0.1)
    np.testing.assert_allclose(got, np.exp([2, 1, 1]) / np.exp([2, 1, 1]).sum())
    np.testing.assert_allclose(
        shares(np.array([0.9, 0.1, 0.0]), ROOM, temperature=1e6), [1 / 3] * 3, rtol=1e-5
    )
    np.testing.assert_allclose(
        shares(np.array([0.9, 0.1, 0.0]), ROOM, temperature=1e-3), [1, 0, 0], atol=1e-12
    )


def test_the_cap_raises_the_small_and_counts_only_classes_with_room() -> None:
    np.testing.assert_allclose(
        shares(np.array([0.8, 0.0, 0.4]), ROOM, ratio_cap=4), np.array([0.8, 0.2, 0.4]) / 1.4
    )
    np.testing.assert_allclose(
        shares(np.array([0.8, 0.0, 0.4]), np.array([9, 0, 9]), ratio_cap=4), [2 / 3, 0, 1 / 3]
    )


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("temperature", [None, 0.05, 1.0])
def test_the_cap_holds(seed: int, temperature: float | None) -> None:
    random = np.random.default_rng(seed)
    error, room = random.random(6) * random.integers(0, 2, 6), random.integers(0, 9, 6)
    got = shares(error, room, temperature, ratio_cap=3)
    here = room > 0
    assert (got[~here] == 0).all()
    if got.sum():
        assert got.sum() == pytest.approx(1)
        assert got[here].max() <= 3 * got[here].min() * (1 + 1e-12)


def test_no_room_and_no_error_are_no_fault() -> None:
    assert shares(np.zeros(3), np.zeros(3), 0.1, 2).tolist() == [0, 0, 0]
    assert allocate(
        5, shares(np.zeros(3), np.array([4, 4, 2]), None, 2), np.array([4, 4, 2])
    ).tolist() == [2, 2, 1]


def planted(n: int = 400) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    labels = random.integers(0, 3, n)
    logits = random.normal(size=(n, 3))
    logits[np.arange(n), labels] += np.array([0.2, 1.0, 2.0])[labels]
    return [f"i{i:03d}" for i in range(n)], labels, logits, random.normal(size=(n, 4))


def test_hard_cases_keep_the_cap() -> None:
    ids, labels, logits, embeddings = planted()
    cases = hard_cases(
        ids, labels, logits, embeddings, Mine(budget=30), temperature=0.05, ratio_cap=2.0
    )
    counts = np.bincount([c.label for c in cases], minlength=3)
    assert (
        counts.sum() == 30 and counts.max() <= 2 * counts.min() + 2
    )  # rounding: a place at either end
    free = np.bincount(
        [
            c.label
            for c in hard_cases(ids, labels, logits, embeddings, Mine(budget=30), temperature=0.05)
        ],
        minlength=3,
    )
    assert free.max() > 3 * free.min()


def test_the_scorer_puts_the_candidates_in_order() -> None:
    ids, labels, logits, _ = planted()
    other = np.random.default_rng(5).normal(size=logits.shape)
    none = np.zeros((len(ids), 0))
    taken = hard_cases(
        ids,
        labels,
        logits,
        none,
        Mine(budget=9, candidates=1),
        scorer="bald",
        ensemble=np.stack([logits, other]),
    )
    from adversa.mine.scorers import Evidence, scores

    bald = dict(zip(ids, scores("bald", Evidence(labels, np.stack([logits, other]))), strict=True))
    hard = difficulty(logits, labels)
    for c in range(3):
        chosen = {case.example for case in taken if case.label == c}
        pool = [
            i
            for k, i in enumerate(ids)
            if labels[k] == c and (hard.predicted[k] != c or hard.margin[k] < 0.1)
        ]
        assert chosen == set(sorted(pool, key=lambda i: -bald[i])[: len(chosen)])


def test_order_of_rows_makes_no_difference_to_any_scorer() -> None:
    ids, labels, logits, embeddings = planted()
    history = np.random.default_rng(2).random((6, len(ids))) < 0.6
    p = np.random.default_rng(1).permutation(len(ids))
    for scorer in ("margin", "entropy", "forgetting"):
        first = hard_cases(
            ids, labels, logits, embeddings, Mine(budget=40), scorer=scorer, history=history
        )
        again = hard_cases(
            [ids[i] for i in p],
            labels[p],
            logits[p],
            embeddings[p],
            Mine(budget=40),
            scorer=scorer,
            history=history[:, p],
        )
        assert first == again
