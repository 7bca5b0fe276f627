"""A check is one row of one table."""

from __future__ import annotations

import subprocess
import sys

ADD_A_CHECK = """
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from adversa.curate import checks

green = checks.Check(
    reason="too green",
    number="green",
    side="at most",
    limit="green_limit",
    threshold=lambda config, real: real["green"],
    measure=lambda candidates: candidates.images[..., 1].mean(axis=(1, 2)),
    what="mean of green",
    title="green",
    digits=1,
    off="green images",
    mark="broken",
)
checks.CHECKS += (green,)
checks.FIRST += (green,)

import pyarrow as pa

from adversa.config.curate import Curate
from adversa.curate import filter
from adversa.export import run, run_card
from adversa.pipeline import finalize
from adversa.report import gallery, unshown
from adversa.storage import tables

assert tables.VERDICTS.field("green").type == tables.VERDICTS.field("green_limit").type == "double"
assert len(tables.VERDICTS) == len(set(tables.VERDICTS.names))
assert {"green", "green_limit"} < set(run.row_schema(rejected=False).names)
assert "green" not in finalize.FINAL and filter.EVERY_REASON.index("too green") > 0

config = Curate(folds=2, realism_quantile=None, min_contrast=None)
real = {"near_copy": 1.0, "near_copy_features": 1.0, "most_agreement": 1.0, "green": 99.0}
thresholds = checks.thresholds(config, real)
images = np.full((2, 8, 8, 3), 90, np.uint8)
images[1, ..., 1] = 120
candidates = checks.Candidates(
    ["a", "b"], ["guided"] * 2, [0, 0], ["img2img"] * 2, ["e", "e"], [True] * 2, [None] * 2, images,
    np.ones((2, 1)), similarity=np.zeros(2), similarity_2=np.zeros(2),
)
found = filter.finalize(filter.inspect(candidates, thresholds), ["a", "b"], (), thresholds)
assert [v.reason for v in found] == ["kept", "too green"], found
rows = tables.to_table(found, tables.VERDICTS).to_pylist()
assert [(r["green"], r["green_limit"]) for r in rows] == [(90.0, 99.0), (120.0, 99.0)]
assert filter.acceptance(found, ["c"])["guided"]["c"]["rejected"] == {"too green": 1}

assert ("mean of green, at most", "99") in run_card._limits(rows, ["c"])
number = next(n for n in gallery.numbers(rows[1]) if n.name == "green")
assert (number.value, number.limit, number.failed) == ("120.0", "\\u2264 99.0", True)
assert gallery.MARKS["too green"] == "broken"
unshown.tables = SimpleNamespace(
    VERDICTS=tables.VERDICTS,
    read=lambda *_: pa.Table.from_pylist(rows, schema=tables.VERDICTS),
)
facts = type("Facts", (), {"run": type("Run", (), {"round": lambda *_: None})()})()
assert "green images" not in unshown.checks_off(facts, 1)
rows = [r | {"green_limit": None} for r in rows]
assert "green images" in unshown.checks_off(facts, 1)
"""


def test_a_new_row_is_in_the_verdicts_the_decision_the_card_and_the_report() -> None:
    """In another process: columns are made when the table is imported."""
    done = subprocess.run([sys.executable, "-c", ADD_A_CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
