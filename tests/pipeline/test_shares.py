from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from adversa.data.loader import draw_order
from adversa.engine.batches import balanced
from adversa.pipeline.train import class_shares
from adversa.storage import tables


def test_shares_are_those_of_the_mix_and_of_its_balanced_draws(tmp_path: Path) -> None:
    labels = np.repeat([0, 2, 3], [60, 30, 10])  # class 1 has no image
    weights = np.ones(100)
    weights[90:] = 0.5
    rows = {"id": [str(i) for i in range(100)], "label": labels, "weight": weights}
    missing = {f.name: pa.nulls(100, f.type) for f in tables.MIX if f.name not in rows}
    tables.write_part(
        tmp_path / tables.part_name(0),
        pa.table({**rows, **missing}).select(tables.MIX.names).cast(tables.MIX),
    )
    for balance in (0.0, 0.6, 1.0):
        counts, priors = class_shares(tmp_path, balance, 4)
        assert counts == (60, 0, 30, 5)
        totals = np.array([60, 0, 30, 5]) ** (1 - balance) * (np.array(counts) > 0)
        assert priors == pytest.approx(totals / totals.sum())
        order = draw_order(balanced(weights, labels, balance), 10_000, 0)
        assert np.bincount(labels[order], minlength=4) / 10_000 == pytest.approx(priors, abs=5e-3)
