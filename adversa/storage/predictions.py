"""Predictions of classifiers as arrays, read from the tables that scoring wrote."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa


class Predictions(NamedTuple):
    """Of one classifier, rows in order of their image ids: logits [N, K], labels [N], groups,
    ids.
    """

    logits: np.ndarray
    labels: np.ndarray
    groups: list[str]
    ids: list[str]


def predictions(rows: pa.Table, arm: str, seed: int) -> Predictions:
    pc = pa.compute
    chosen = rows.filter(pc.and_(pc.equal(rows["arm"], arm), pc.equal(rows["seed"], seed))).sort_by(
        "id"
    )
    return Predictions(
        matrix(chosen["logits"]),
        chosen["label"].to_numpy(),
        chosen["group"].to_pylist(),
        chosen["id"].to_pylist(),
    )


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A list column of equal lengths to float32 [N, D]."""
    rows = column.to_pylist()
    return np.asarray(rows, dtype=np.float32).reshape(len(rows), -1 if rows else 0)
