from __future__ import annotations

import numpy as np
import pytest

from adversa.mine.scorers import SCORERS, Evidence, scores
from adversa.types import UserError


def evidence(
    *members: list[list[float]], labels: list[int], history: list[list[bool]] | None = None
) -> Evidence:
    past = None if history is None else np.array(history)
    return Evidence(np.array(labels), np.log(np.array(members)), past)


def h(*p: float) -> float:
    return float(-sum(x * np.log(x) for x in p))


def test_one_classifier_is_the_closed_form() -> None:
    e = evidence([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]], labels=[0, 2])
    np.testing.assert_allclose(scores("loss", e), [-np.log(0.7), -np.log(0.25)])
    np.testing.assert_allclose(scores("margin", e), [-0.5, 0.25])
    np.testing.assert_allclose(scores("entropy", e), [h(0.7, 0.2, 0.1), h(0.25, 0.5, 0.25)])


def test_an_ensemble_is_judged_by_its_mean_probability() -> None:
    e = evidence([[0.9, 0.1]], [[0.3, 0.7]], labels=[0])
    np.testing.assert_allclose(scores("loss", e), [-np.log(0.6)])
    np.testing.assert_allclose(scores("margin", e), [-0.2])
    np.testing.assert_allclose(scores("entropy", e), [h(0.6, 0.4)])


def test_bald_is_the_mutual_information() -> None:
    # image 0: sure and contradicting; image 1: both in doubt; image 2: both sure of the same
    e = evidence(
        [[0.9, 0.1], [0.5, 0.5], [0.99, 0.01]],
        [[0.1, 0.9], [0.5, 0.5], [0.99, 0.01]],
        labels=[0, 0, 0],
    )
    np.testing.assert_allclose(scores("bald", e), [h(0.5, 0.5) - h(0.9, 0.1), 0, 0], atol=1e-12)


def test_bald_is_never_negative_and_at_most_the_entropy() -> None:
    random = np.random.default_rng(0)
    e = Evidence(np.zeros(500, np.int64), random.normal(scale=3, size=(4, 500, 6)))
    assert (scores("bald", e) >= 0).all() and (scores("bald", e) <= scores("entropy", e)).all()


def test_forgetting_counts_the_falls_and_never_learnt_is_worst() -> None:
    history = [
        [1, 0, 1, 0],
        [0, 0, 1, 1],
        [1, 0, 1, 1],
        [0, 0, 1, 1],
    ]  # moments down, images across
    e = evidence([[0.5, 0.5]] * 4, labels=[0] * 4, history=np.array(history, bool).tolist())
    assert scores("forgetting", e).tolist() == [2, 4, 0, 0]


def test_large_logits_keep_their_loss() -> None:
    e = Evidence(
        np.zeros(2, np.int64), np.array([[[20, 0], [0, 1000]], [[20, 0], [0, 1000]]], np.float32)
    )
    np.testing.assert_allclose(scores("loss", e), [np.log1p(np.exp(-20.0)), 1000], rtol=1e-6)


def test_evidence_that_is_missing_is_said_in_one_line() -> None:
    e = evidence([[0.5, 0.5]], labels=[0])
    for name, word in (
        ("bald", "two or more"),
        ("forgetting", "history"),
        ("losss", "take one of"),
    ):
        with pytest.raises(UserError, match=word):
            scores(name, e)


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_follows_its_rows(name: str) -> None:
    random = np.random.default_rng(1)
    labels, logits, past = (
        random.integers(0, 3, 40),
        random.normal(size=(3, 40, 3)),
        random.random((5, 40)) < 0.5,
    )
    p = random.permutation(40)
    whole = scores(name, Evidence(labels, logits, past))
    assert whole.dtype == np.float64 and whole.shape == (40,)
    np.testing.assert_array_equal(
        whole[p], scores(name, Evidence(labels[p], logits[:, p], past[:, p]))
    )
