from __future__ import annotations

import numpy as np
import pytest

from adversa.curate import search


def cloud(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (n, 12)).astype(np.float32)


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "POINTS", 64)
    monkeypatch.setattr(search, "QUERIES", 7)


@pytest.mark.parametrize("count", [1, 5, 70, 300])
def test_search_finds_what_sorting_all_finds(count: int) -> None:
    points, queries = cloud(200, 0), cloud(20, 1)
    exact = queries.astype(np.float64) @ points.T.astype(np.float64)
    value, row = search.most_alike(queries, points, count)
    wanted = np.argsort(-exact, axis=1)[:, :count]
    np.testing.assert_array_equal(row, wanted)
    np.testing.assert_allclose(value, np.take_along_axis(exact, wanted, 1), atol=1e-5)
    distances = np.linalg.norm(queries[:, None].astype(np.float64) - points[None], axis=2)
    wanted = np.argsort(distances, axis=1)[:, :count]
    value, row = search.nearest(queries, points, count)
    np.testing.assert_array_equal(row, wanted)
    np.testing.assert_allclose(value, np.take_along_axis(distances, wanted, 1), atol=1e-5)


def test_of_equals_the_first_row_comes_first() -> None:
    points, queries = np.eye(40, dtype=np.float32).repeat(5, axis=0), np.eye(40, dtype=np.float32)
    for find in (search.most_alike, search.nearest):
        assert find(queries, points, 5)[1].ravel().tolist() == list(range(200))
        assert find(queries, points, 1)[1].ravel().tolist() == list(range(0, 200, 5))


def test_no_query_is_no_answer() -> None:
    assert search.most_alike(cloud(0, 0), cloud(5, 1), 3)[0].shape == (0, 3)
