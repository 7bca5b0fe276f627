"""What a sweep says, on folders made by hand whose answers are known in closed form."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adversa.evaluate.bootstrap import compare
from adversa.evaluate.dose_response import Curve
from adversa.storage import tables
from adversa.sweep import grid, results
from adversa.sweep import run as sweep_run
from adversa.sweep.grid import DataRegime, Point, Variant
from adversa.types import UserError, seed_of

spec = importlib.util.spec_from_file_location("sweeps", Path(__file__).parents[1] / "sweeps.py")
sweeps = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweeps)

DOSES = [0, 1, 2.5, 5, 10]
TRUE = Curve(0.5, 0.3, 1.2, 0.0, 10.0, 0.0)
REAL = {"0005": 0.5, "0020": 0.6, "all": 0.7}


def luck(p: Point) -> float:
    """Of a seed, alike at every point: intervals hold it, differences do not."""
    return 0.01 * p.seed


def one_cell(cell: str, p: Point, x: float) -> float:
    """Guided saturates, unguided does half as much, replay nothing."""
    gain = {"real": 0.0, "replay": 0.0, "unguided": 0.5, "guided": 1.0}[p.variant.arm]
    return 0.5 + gain * (TRUE.at(x) - 0.5) + luck(p)


def three_cells(cell: str, p: Point, x: float) -> float:
    """Of 5 a class, ratio 1 scores half way to 20 a class, and ratio 3 more than all of train."""
    return (
        REAL[cell]
        + (0.0 if not x else {1.0: 0.05, 3.0: 0.3}[p.ratio] if p.variant.generates else -0.1)
        + luck(p)
    )


@pytest.fixture(scope="module")
def curve_sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, Any]]:
    c, run = sweeps.build(
        tmp_path_factory.mktemp("sweep") / "run", one_cell, real=[20], ratios=DOSES
    )
    return c, run, results.write(c, run)


@pytest.fixture(scope="module")
def cells_sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, Any]]:
    c, run = sweeps.build(
        tmp_path_factory.mktemp("sweep") / "run",
        three_cells,
        real=[5, 20, "all"],
        ratios=[0, 1, 3],
        arms=["replay", "guided"],
        denoiser_sees=["subset", "all"],
    )
    return c, run, results.write(c, run)


def pick(rows: list[dict[str, Any]], **asked: Any) -> dict[str, Any]:
    (found,) = (r for r in rows if all(r[k] == v for k, v in asked.items()))
    return found


# ---- the files -----------------------------------------------------------------------------------


def test_the_table_has_a_row_a_trial_and_the_json_is_what_is_returned(curve_sweep: tuple) -> None:
    c, run, found = curve_sweep
    rows = tables.read_part(run.root / "sweep.parquet").to_pylist()
    assert len(rows) == len(grid.points(c)) == 2 * (1 + 3 * 4)
    row = pick(rows, arm="guided", ratio=2.5, seed=1)
    assert (
        row["reached"] == 2.5
        and row["added"] == 100
        and row["added_by_class"] == [50, 50]
        and row["mined"] == 4
    )
    assert (
        row["balanced_accuracy"] == row["worst_class"] == dict(row["metrics"])["balanced_accuracy"]
    )
    assert (
        row["balanced_accuracy"] == round((TRUE.at(2.5) + 0.01) * 200) / 200
        and row["auroc_macro"] is None
    )
    assert json.loads((run.root / "sweep.json").read_text()) == json.loads(
        json.dumps(found, allow_nan=False)
    )


def test_what_was_swept_is_counted(cells_sweep: tuple) -> None:
    _, _, found = cells_sweep
    what = found["what"]
    assert what["trials"] == {"asked": 38, "done": 38, "missing": 0, "names": []}
    assert [c["cell"] for c in what["cells"]] == ["0005", "0020", "all"]
    assert what["cells"][0] | {} == what["cells"][0] | {
        "real": [5, 5],
        "mined": [2, 2],
        "lesions": [5, 5],
        "verifiers": False,
    }
    assert [c["verifiers"] for c in what["cells"]] == [False, True, True]
    p = pick(what["pools"], cell="0005", variant="guided-img2img-all")
    assert (p["asked"], p["kept"], p["share"], p["reasons"]) == (44, 40, 40 / 44, {"near copy": 2})
    assert what["images"] == what["lesions"] == 400 and what["split_hash"] == "9c1d55ab20"
    spent = what["cost"]["device_seconds"]
    assert spent == {
        "data": 36.0,
        "cells": 3 * 36.0,
        "pools": 5 * 7200.0,
        "trials": pytest.approx(38 * 3.6),
    }
    assert (
        what["cost"]["device_hours"] == pytest.approx(sum(spent.values()) / 3600)
        and what["cost"]["wall_seconds"] == 75
    )


# ---- points, curves, contrasts -------------------------------------------------------------------


def test_points_are_means_over_seeds_within_their_intervals(curve_sweep: tuple) -> None:
    _, _, found = curve_sweep
    assert len(found["points"]) == 13
    for p in found["points"]:
        assert p["seeds"] == 2 and p["missing"] == 0 and p["low"] < p["mean"] < p["high"]
    p = pick(found["points"], variant="real")
    assert (
        p["mean"] == pytest.approx(0.505)
        and p["reached"] == 0
        and p["high"] - p["low"] > 2 * 1.9 * math.sqrt(0.25 / 400)
    )


def test_a_known_saturation_point_is_found_where_it_is(curve_sweep: tuple) -> None:
    _, _, found = curve_sweep
    c = pick(found["curves"], variant="guided-img2img")
    r = c["response"]
    assert c["reached"] == DOSES and c["why"] == "" and c["seeds_vary"]
    assert r["kind"] == "saturates" and r["saturation_point"] == pytest.approx(
        TRUE.saturation_point(), rel=0.05
    )
    assert (
        r["saturation_low"] < TRUE.saturation_point() < r["saturation_high"] < 10
        and "90% of it by ratio" in r["words"]
    )
    assert r["gain"] == pytest.approx(TRUE.rise, abs=0.01) and r["gain_low"] > 0.2
    assert r["grid"][0] == 0 and r["grid"][-1] == 10 and set(DOSES) <= set(r["grid"])


def test_flat_scores_have_no_saturation_point_and_0_is_the_best(curve_sweep: tuple) -> None:
    _, _, found = curve_sweep
    r = pick(found["curves"], variant="replay")["response"]
    assert (
        r["kind"] == "no gain"
        and r["saturation_point"] is None
        and "no saturation point: no gain shown" in r["words"]
    )
    assert "0 is the best, no ratio scores above it: replay (20 a class)" in found["notes"]
    assert not any("shown to beat 0" in n for n in found["notes"])  # guided and unguided are


def test_contrasts_have_the_sign_they_were_made_with(curve_sweep: tuple) -> None:
    _, _, found = curve_sweep
    rows = found["contrasts"]
    asked = {q: sum(r["question"] == q for r in rows) for q in found["questions"]}
    assert asked == {"replay": 8, "unguided": 4, "sees": 0, "real": 12}
    row = pick(rows, question="replay", a="guided-img2img", ratio=5)
    expected = round(TRUE.at(5) * 200) / 200 - 0.5
    assert (
        row["difference"] == pytest.approx(expected, abs=0.006)
        and row["word"] == "better"
        and row["family"] == 8
    )
    assert row["low"] < row["difference"] < row["high"] and row["p"] <= row["p_holm"] < 0.05
    assert {r["word"] for r in rows if r["question"] == "unguided"} == {"better"}
    assert {r["word"] for r in rows if r["a"] == "replay"} == {"not shown"}


def test_a_contrast_is_what_compare_says(curve_sweep: tuple) -> None:
    """Drawn once for all trials, or anew for a pair: the same resamples."""
    c, run, found = curve_sweep
    arms = Variant("guided", "img2img", "subset"), Variant("unguided", "", "subset")
    logits = []
    for v in arms:
        each = [sweep_run.logits_of(c, run, [Point(DataRegime(20), v, 2.5, s)]) for s in (0, 1)]
        logits.append(np.concatenate([e.logits for e in each]))
    said = each[0]
    expected = compare(
        *logits, said.labels, said.groups, 200, seed_of("bootstrap", "sweep", "select")
    )
    row = pick(found["contrasts"], question="unguided", ratio=2.5)
    assert [row[k] for k in ("difference", "low", "high", "p", "se")] == pytest.approx(
        [expected.difference, expected.low, expected.high, expected.p, expected.se], rel=1e-12
    )


def test_verdicts_say_it_in_a_sentence_each(curve_sweep: tuple, cells_sweep: tuple) -> None:
    guided = pick(curve_sweep[2]["verdicts"], variant="guided-img2img")
    assert guided["word"] == "better"
    assert (
        "better than replay at 4 of 4 points (most at 20 a class, ratio 10: +0.3"
        in guided["sentence"]
    )
    assert (
        "; saturation point at ratio 2." in guided["sentence"]
        and "need two counts of real images" in guided["sentence"]
    )
    assert curve_sweep[2]["sentences"] == [v["sentence"] for v in curve_sweep[2]["verdicts"]]
    names = [v["variant"] for v in cells_sweep[2]["verdicts"]]
    assert (
        names == ["guided-img2img", "guided-img2img-all"]
        and "worth more than nothing at" in cells_sweep[2]["sentences"][0]
    )


# ---- in real images ------------------------------------------------------------------------------


def test_worth_is_exact(cells_sweep: tuple) -> None:
    """14, 44 and 164 real images score 0.5, 0.6 and 0.7 (and the same luck); straight in the
    logarithm in between.
    """
    _, _, found = cells_sweep
    assert found["real"]["counts"] == [14, 44, 164] and found["real"]["mean"] == pytest.approx(
        [0.505, 0.605, 0.705]
    )
    assert found["real"]["isotonic"] == pytest.approx(found["real"]["mean"])
    w = pick(found["equivalent_images"], cell="0005", variant="guided-img2img", ratio=1)
    assert w["per_image"] == pytest.approx((math.sqrt(14 * 44) - 14) / 10) and w[
        "equivalent"
    ] == pytest.approx(math.sqrt(14 * 44))
    assert 0 < w["low"] < w["per_image"] < w["high"] and w["words"].startswith(
        "one synthetic image is worth 1.08 real"
    )


def test_worth_beyond_the_data_is_a_bound_only(cells_sweep: tuple) -> None:
    _, _, found = cells_sweep
    w = pick(found["equivalent_images"], cell="0005", variant="guided-img2img", ratio=3)
    assert w["per_image"] is None and (w["side"], w["bound"]) == (
        "at least",
        pytest.approx((164 - 14) / 30),
    )
    w = pick(found["equivalent_images"], cell="0005", variant="replay", ratio=1)
    assert (
        w["per_image"] is None
        and w["side"] == "at most"
        and "below the data: one repeat is worth at most" in w["words"]
    )


def test_denoisers_are_compared_by_what_they_saw(cells_sweep: tuple) -> None:
    _, _, found = cells_sweep
    rows = [r for r in found["contrasts"] if r["question"] == "sees"]
    assert {(r["cell"], r["a"], r["b"]) for r in rows} == {
        (c, "guided-img2img", "guided-img2img-all") for c in ("0005", "0020")
    }
    assert {r["difference"] for r in rows} == {0.0} and {r["word"] for r in rows} == {"not shown"}
    assert any("Sagers et al. 2023" in n for n in found["notes"])
    assert any(
        "no verifiers and no manifold in the filter of the cells 5 a class: " in n
        for n in found["notes"]
    )


# ---- what is not there ---------------------------------------------------------------------------


def test_an_unfinished_sweep_shows_what_is_there(tmp_path: Path) -> None:
    c, run = sweeps.build(
        tmp_path / "run",
        one_cell,
        real=[20],
        ratios=DOSES,
        skip=lambda p: (
            p.variant.arm == "unguided"
            or (p.variant.arm == "guided" and p.seed == 1 and p.ratio > 1)
        ),
    )
    found = results.write(c, run)
    assert (
        found["what"]["trials"]["missing"] == 8 + 3
        and "0020/guided-img2img/r2.5/s1" in found["what"]["trials"]["names"]
    )
    assert (
        "11 of 26 trials are missing: run the same command again to do the rest" in found["notes"]
    )
    gone = pick(found["points"], variant="unguided", ratio=1)
    assert gone["mean"] is None and (gone["seeds"], gone["missing"]) == (0, 2)
    c_un, c_g = (pick(found["curves"], variant=v) for v in ("unguided", "guided-img2img"))
    assert c_un["response"] is None and c_un["why"] == "1 of the 3 ratios that a curve needs"
    assert (
        c_g["response"]["kind"] == "saturates"
    )  # the seed that is missing is lucky; its absence costs no ratio
    assert c_g["response"]["scores"][2] == pytest.approx(TRUE.at(2.5) + 0.005, abs=0.004)
    assert pick(found["contrasts"], question="replay", a="guided-img2img", ratio=5)["seeds"] == 1
    assert not any("unguided" in (r["a"], r["b"]) for r in found["contrasts"])


def test_nothing_finished_is_no_fault(tmp_path: Path) -> None:
    c, run = sweeps.build(tmp_path / "run", one_cell, real=[20], ratios=DOSES, skip=lambda p: True)
    found = results.write(c, run)
    assert (
        found["what"]["trials"]["done"] == 0
        and found["contrasts"] == found["equivalent_images"] == []
    )
    assert all("not compared with replay yet" in s for s in found["sentences"])
    assert tables.read_part(run.root / "sweep.parquet").num_rows == 0


def test_one_seed_holds_lesions_only_and_says_so(tmp_path: Path) -> None:
    c, run = sweeps.build(tmp_path / "run", one_cell, real=[20], ratios=DOSES, seeds=1)
    found = results.results(c, run)
    curve = pick(found["curves"], variant="guided-img2img")
    assert not curve["seeds_vary"] and curve["response"]["kind"] == "saturates"
    assert any(
        n.startswith("one seed a point: intervals and bands hold the choice of select's lesions")
        for n in found["notes"]
    )
    row = pick(found["contrasts"], question="replay", a="guided-img2img", ratio=10)
    assert row["word"] == "better" and row["note"].startswith("one seed")


def test_ratios_that_reach_the_same_are_one_dose(tmp_path: Path) -> None:
    """Of 20 a class some pool kept 40: ratios above 2 reach 2."""
    c, run = sweeps.build(tmp_path / "run", one_cell, have={"0020": 40}, real=[20], ratios=DOSES)
    found = results.results(c, run)
    curve = pick(found["curves"], variant="guided-img2img")
    assert (
        curve["reached"] == [0, 1, 2]
        and curve["ratios"] == [0, 1, 2.5]
        and curve["same"] == [(5, 2.5), (10, 2.5)]
    )
    assert curve["response"]["ratios"] == (0, 1, 2) and {
        r["ratio"] for r in found["contrasts"]
    } == {
        1,
        2.5,
    }
    notes = " | ".join(found["notes"])
    assert (
        "20 a class: too few images for ratio 2.5 (reached 2), 5 (reached 2), 10 (reached "
        "2); all arms take as many" in notes
    )
    assert "20 a class: ratio 5 reached no more than ratio 2.5, so they are one point" in notes


def test_two_doses_are_no_curve(tmp_path: Path) -> None:
    c, run = sweeps.build(
        tmp_path / "run", one_cell, have={"0020": 20}, real=[20], ratios=[0, 1, 2]
    )
    found = results.results(c, run)
    assert {c["why"] for c in found["curves"]} == {"2 of the 3 ratios that a curve needs"}
    assert "no curve at 20 a class: 2 of the 3 ratios that a curve needs" in found["notes"]
    assert "too few ratios for a saturation point" in found["sentences"][0]


def test_a_class_without_hard_cases_got_nothing_and_is_named(tmp_path: Path) -> None:
    c, run = sweeps.build(tmp_path / "run", one_cell, mined=(2, 0), real=[20], ratios=DOSES)
    found = results.results(c, run)
    assert "20 a class: no hard case of melanoma, so nothing was added to it" in found["notes"]
    assert pick(found["curves"], variant="replay")["reached"] == [0, 0.5, 1.25, 2.5, 5]


def test_a_metric_without_a_value_is_named(tmp_path: Path) -> None:
    c, run = sweeps.build(tmp_path / "run", one_cell, real=[20], ratios=[0, 1])
    for p in grid.points(c):
        folder = grid.trial_dir(run, p) / "select"
        rows = tables.read(folder)
        tables.write_part(
            folder / tables.part_name(0), rows.slice(0, sweeps.EACH)
        )  # one class only
    c = c.model_copy(update={"sweep": c.sweep.model_copy(update={"metric": "auroc_macro"})})
    with pytest.raises(
        UserError, match=r"sweep.metric auroc_macro has no value on select's 200 images"
    ):
        results.results(c, run)


def test_worse_and_mixed_are_said(tmp_path: Path) -> None:
    """Helps 5 a class, harms 10 and, more, 20 a class."""
    change = {"0005": 0.2, "0010": -0.1, "0020": -0.2}

    def side(cell: str, p: Point, x: float) -> float:
        return 0.6 + (change[cell] if p.variant.generates else 0.0)

    c, run = sweeps.build(
        tmp_path / "run", side, real=[5, 10, 20], ratios=[0, 1], arms=["replay", "unguided"]
    )
    (v,) = results.results(c, run)["verdicts"]
    assert (
        v["word"] == "mixed"
        and "better than replay at 1 of 3 points (most at 5 a class, ratio 1: +0.200"
        in v["sentence"]
    )
    assert (
        "worse than replay at 2 of 3 points (most at 20 a class, ratio 1: -0.200" in v["sentence"]
    )
