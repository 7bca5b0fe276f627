from __future__ import annotations

import numpy as np
import pytest

from adversa.common.statistics import holm, softmax


def test_softmax_by_closed_forms() -> None:
    np.testing.assert_allclose(
        softmax(np.log([[1, 2, 5], [3, 3, 2]])), [[0.125, 0.25, 0.625], [0.375, 0.375, 0.25]]
    )
    found = softmax(np.array([[1000.0, 0, -1000]], np.float32))
    assert found.dtype == np.float64 and found.tolist() == [[1, 0, 0]]
    assert softmax(np.zeros((2, 3, 4)))[1, 2].tolist() == [0.25] * 4
    assert softmax(np.zeros((0, 3))).shape == (0, 3) and softmax(np.zeros((0, 0))).shape == (0, 0)


def test_softmax_has_the_bits_of_its_definition() -> None:
    x = np.random.default_rng(0).normal(0, 20, (500, 7)).astype(np.float32)
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    assert np.array_equal(softmax(x), e / e.sum(1, keepdims=True))


def test_holm_by_its_definition() -> None:
    p = np.array([0.01, 0.04, 0.03, 0.005, 0.9])
    ranked = sorted(range(5), key=lambda i: p[i])
    for place, i in enumerate(ranked):
        expected = min(1.0, max((5 - j) * p[ranked[j]] for j in range(place + 1)))
        assert holm(p)[i] == pytest.approx(expected)
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1.0, 1.0] and holm([]).tolist() == []


@pytest.mark.parametrize("bad", [-0.1, 1.1, np.nan])
def test_holm_takes_probabilities_only(bad: float) -> None:
    with pytest.raises(AssertionError):
        holm([0.5, bad])
