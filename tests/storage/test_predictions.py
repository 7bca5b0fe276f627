"""Predictions are the same whatever the order of the rows they are read from."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from adversa.storage import tables
from adversa.storage.predictions import predictions


def test_rows_come_by_their_ids_of_one_classifier_alone():
    rows = [
        {"id": i, "arm": arm, "seed": seed, "label": ord(i) % 3, "group": f"g{i}", "logits": x}
        for i in "cab"
        for arm, seed, x in (("real", 0, [ord(i), 0.0]), ("real", 1, [0, 1]), ("guided", 0, [0, 2]))
    ]
    table = pa.Table.from_pylist([r | {"embedding": []} for r in rows], schema=tables.PREDICTIONS)
    found = predictions(table, "real", 0)
    assert found.ids == ["a", "b", "c"] and found.groups == ["ga", "gb", "gc"]
    assert np.array_equal(found.logits, [[97, 0], [98, 0], [99, 0]])
    assert found.labels.tolist() == [97 % 3, 98 % 3, 99 % 3]
