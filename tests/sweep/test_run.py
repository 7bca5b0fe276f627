"""A tiny sweep on the local engine: arms matched in every class, images shared by id, resumed
without a trial done twice.
"""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest

from adversa.engine.local import LocalEngine
from adversa.pipeline import generate, loop
from adversa.run import control, step_folder
from adversa.run import folder as run_folder
from adversa.storage import files, tables
from adversa.sweep import grid, regimes
from adversa.sweep import run as sweep_run
from adversa.types import UserError

pytestmark = pytest.mark.slow


def page(config, run):
    return run.root / "sweep.html"


def mix_of(run, point):
    return tables.read(grid.trial_dir(run, point) / "mix", schema=tables.MIX)


def test_every_trial_is_there_and_was_trained_alike(swept):
    config, run = swept
    rows = sweep_run.table(config, run).to_pylist()
    assert [f"{r['cell']}/{r['arm']}/{r['ratio']:g}" for r in rows] == [
        f"{p.cell.name}/{p.variant.arm}/{p.ratio:g}" for p in grid.points(config)
    ]
    assert {(r["steps"], r["images"]) for r in rows} == {(12, 12 * 32)}
    for r in rows:
        metrics = dict(r["metrics"])
        assert 0 <= metrics["balanced_accuracy"] <= 1 and r["real"] == 5 * int(r["cell"])
    assert not (run.root / "openings.json").exists() and not run.test.exists()


def test_arms_of_a_cell_and_ratio_are_matched_class_by_class_in_weight(swept):
    config, run = swept
    for cell in grid.cells(config.sweep):
        for ratio in (1.0, 2.0):
            weights = {}
            for p in (p for p in grid.points(config) if p.cell == cell and p.ratio == ratio):
                rows = mix_of(run, p)
                weights[p.variant.name] = np.bincount(
                    rows["label"].to_numpy(), rows["weight"].to_numpy(), minlength=5
                )
            one, *others = weights.values()
            assert len(weights) == 3 and all(np.allclose(one, w) for w in others)
            real = next(p for p in grid.points(config) if p.cell == cell and not p.ratio)
            base = np.bincount(mix_of(run, real)["label"].to_numpy(), minlength=5)
            assert ((one - base) <= ratio * cell.count).all() and (one - base).sum() > 0


def test_a_smaller_ratio_has_images_of_the_larger_one_and_the_cells_own_real_images(swept):
    config, run = swept
    for p in grid.points(config):
        rows = mix_of(run, p)
        kinds = {
            k: {r["id"] for r in rows.to_pylist() if r["kind"] == k}
            for k in ("real", "mined", "synthetic")
        }
        d = grid.cell_dir(run, p.cell)
        assert kinds["real"] == set(tables.read(d.data / "train", ["id"])["id"].to_pylist())
        assert kinds["mined"] == set(tables.read(d.round(1, "hard"))["example"].to_pylist())
        if p.ratio == 1 and p.variant.generates:
            more = grid.Point(p.cell, p.variant, 2.0, p.seed)
            assert kinds["synthetic"] <= {
                r["id"] for r in mix_of(run, more).to_pylist() if r["kind"] == "synthetic"
            }
            kept = {i for i, _ in sweep_run.accepted(grid.pool_dir(run, p.cell, p.variant))}
            assert kinds["synthetic"] and kinds["synthetic"] <= kept


def test_the_denoiser_of_a_cell_is_trained_on_its_images_alone(swept):
    config, run = swept
    for cell in grid.cells(config.sweep):
        d = grid.cell_dir(run, cell)
        fed = set(tables.read(d.arm(0, "real") / "mix", schema=tables.MIX)["id"].to_pylist())
        assert (
            fed == set(tables.read(d.data / "train", ["id"])["id"].to_pylist())
            and len(fed) == 5 * cell.count
        )
        recipe = files.read_json(d.denoiser / step_folder.RECIPE)
        assert recipe["inputs"]["mix"] == step_folder.fingerprint(d.arm(0, "real") / "mix")
    small, large = (grid.cell_dir(run, c) for c in (grid.DataRegime(2), grid.DataRegime(4)))
    ids = [
        set(tables.read(d.data / role, ["id"])["id"].to_pylist())
        for role in ("train", "mine")
        for d in (small, large)
    ]
    assert ids[0] < ids[1] and ids[2] <= ids[3]


def test_models_are_dropped_and_what_they_said_is_kept(swept):
    config, run = swept
    p = grid.points(config)[0]
    assert not (grid.trial_dir(run, p) / "classifier").exists()
    found = sweep_run.logits_of(config, run, [p])
    classes = run_folder.classes_of(run.data)
    right = np.array([found.logits[0].argmax(1) == found.labels])
    told = step_folder.manifest(grid.result_dir(run, p))["metrics"]
    assert told["accuracy"] == pytest.approx(right.mean()) and found.logits.shape == (
        1,
        len(found.labels),
        len(classes),
    )


class Cut(BaseException):
    pass


def test_a_sweep_that_is_cut_off_again_and_again_has_the_same_table_and_no_trial_twice(
    swept, tiny_sweep, tmp_path, monkeypatch
):
    config = tiny_sweep()
    run = sweep_run.open_run(config, tmp_path / "run")
    begun, finished, made = Counter(), Counter(), generate._row
    fit, left = sweep_run.fit_and_score, [3, 5, 9]
    generated = [20, 50]

    def cutting(config, source, reported, out, engine):
        begun[out] += 1
        if left and sum(begun.values()) == left[0]:
            left.pop(0)
            raise Cut
        found = fit(config, source, reported, out, engine)
        finished[out] += 1
        return found

    def row(*args):
        generated[0] -= 1
        if generated[0] == 0:
            generated.pop(0)
            generated.append(10**9)
            raise Cut
        return made(*args)

    monkeypatch.setattr(sweep_run, "fit_and_score", cutting)
    monkeypatch.setattr(generate, "_row", row)
    cuts = 0
    while True:
        try:
            sweep_run.run(config, run, LocalEngine(1, 1), page)
            break
        except Cut:
            cuts += 1
    assert cuts == 5
    assert set(finished.values()) == {1} and len(finished) == len(grid.points(config))
    rows = [
        sweep_run.table(*x).drop_columns(["device_seconds", "wall_seconds"])
        for x in ((config, run), swept)
    ]
    assert rows[0].equals(rows[1])


def test_a_grid_may_grow_and_keeps_its_trials(swept, tiny_sweep, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(swept[1].root, root)
    before = {p: p.stat().st_mtime_ns for p in (root / "trials").rglob("manifest.json")}
    config = tiny_sweep(ratios=[0, 0.5, 1, 2], real=[4])
    run = sweep_run.open_run(config, root)
    assert not sweep_run.is_finished(config, run) and run_folder.RunDir(
        root
    ).config.read_text().count("0.5")
    sweep_run.run(config, run, LocalEngine(1, 1), page)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert sweep_run.is_finished(config, run) and len(sweep_run.table(config, run)) == 1 + 3 * 3


@pytest.mark.parametrize(
    "changes", [{"ratios": [0, 1, 3]}, {"arms": ["replay", "guided"]}, {"subset_seed": 1}], ids=str
)
def test_what_would_change_the_images_or_the_match_needs_another_folder(swept, tiny_sweep, changes):
    with pytest.raises(UserError, match="was made by another recipe"):
        sweep_run.open_run(tiny_sweep(**changes), swept[1].root)


def test_a_sweep_and_a_run_do_not_share_a_folder(swept, tiny, tiny_sweep, tmp_path):
    with pytest.raises(
        UserError,
        match="holds a sweep, this command is for a run of the loop; give another --run-dir",
    ):
        loop.open_run(swept[0], swept[1].root)
    loop.open_run(tiny(), tmp_path / "run")
    with pytest.raises(
        UserError,
        match="holds a run of the loop, this command is for a sweep; give another --run-dir",
    ):
        sweep_run.open_run(tiny_sweep(), tmp_path / "run")


def test_a_count_that_a_class_does_not_have_is_refused_before_anything_is_trained(
    tiny_sweep, tmp_path
):
    config = tiny_sweep(real=[2, 40])
    run = sweep_run.open_run(config, tmp_path / "run")
    with pytest.raises(UserError, match="sweep.real 40: train has fewer images of some classes"):
        sweep_run.run(config, run, LocalEngine(1, 1), page)
    assert not (run.root / "cells").exists() and not (run.root / "trials").exists()


def test_a_pause_waits_between_trials(tiny_sweep, tmp_path):
    config = tiny_sweep(real=[2], ratios=[0, 1], arms=["replay"])
    run = sweep_run.open_run(config, tmp_path / "run")
    waited = []

    class Paused(control.NullHandle):
        def poll(self, force=False):
            if (run.root / "trials").exists() and not waited and not force:
                raise control.Pause

        def wait(self):
            waited.append(files.read_json(run.status)["state"])

    sweep_run.run(config, run, LocalEngine(1, 1), page, handle=Paused())
    assert waited == ["paused"] and sweep_run.is_finished(config, run)


def test_classes_without_a_hard_case_get_nothing(swept):
    config, run = swept
    p = next(p for p in grid.points(config) if p.variant.arm == "guided")
    source = sweep_run.TrialImages(grid.cell_dir(run, p.cell), [], {})
    hard = tables.read(source.hard)
    assert set(hard["label"].to_pylist()) == set(
        range(5)
    )  # every class has some: all of mine is taken in, the hardest first
    pool = grid.pool_dir(run, p.cell, p.variant)
    asked = tables.read(pool / "requests", ["label"])["label"].to_pylist()
    assert Counter(asked) == Counter(
        {c: grid.wanted([p.cell.count], 2.0, config.sweep.overdraw)[0] for c in range(5)}
    )
    assert len(tables.read(regimes.verdicts_of(pool))) == len(asked)


def test_images_from_several_pools_are_taken_by_their_shares(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    kept = {a: [(f"a{i}", 0) for i in range(10)], b: [(f"b{i}", 0) for i in range(3)] + [("b9", 1)]}
    found = sweep_run.chosen(kept, {a: 0.5, b: 0.5}, [8, 1])
    assert Counter(i[0] for i, label in found if label == 0) == {
        "a": 5,
        "b": 3,
    }  # what one lacks, the other gives
    assert [i for i, label in found if label == 1] == ["b9"]
    some = sweep_run.chosen(kept, {a: 0.5, b: 0.5}, [4, 0])
    assert {i for i, _ in some} <= {i for i, _ in found}
    turned = {pool: rows[::-1] for pool, rows in kept.items()}  # the order of rows says nothing
    assert sweep_run.chosen(turned, {a: 0.5, b: 0.5}, [4, 0]) == some
