"""The whole cycle in this process: what a run must leave behind, and that a cut-off run ends like an undisturbed one."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest

from adversa import runs, tables
from adversa.loop import cycle
from adversa.loop.engine import LocalEngine, do_part
from adversa.loop.stages import stages, trained
from adversa.report import page
from adversa.types import ROLES, UserError


def go(config, root, engine=None, until=None):
    run = cycle.open_run(config, root)
    cycle.run(config, run, engine or LocalEngine(1, 1), page.write, until)
    return run


def results(run):
    """What must not depend on how a run was carried out."""
    requests = tables.read(run.round(1, "requests"))["request_id"].to_pylist()
    verdicts = {v["request_id"]: v["keep"] for v in tables.read(run.round(1, "verdicts")).to_pylist()}
    images = dict(zip(*tables.read(run.round(1, "synthetic"), ["request_id", "image"]).to_pydict().values(), strict=True))
    return {"requests": requests, "verdicts": verdicts, "images": images, "arms": json.loads(run.summary.read_text())["arms"]}


def test_every_stage_leaves_its_manifest_and_the_summary_its_keys(finished):
    config, run = finished
    assert all(s.is_finished for s in stages(config, run))
    summary = json.loads(run.summary.read_text())
    asked = {
        "run",
        "seed",
        "split_hash",
        "rounds",
        "arms",
        "generated",
        "accepted",
        "rejected",
        "seconds",
        "overhead_seconds",
        "verdict",
    }
    assert asked <= summary.keys()
    assert set(summary["arms"]) == {"real", "unguided", "guided"}
    assert summary["generated"] == summary["accepted"] + sum(summary["rejected"].values()) > 0
    for roles in summary["arms"].values():
        assert {"accuracy", "balanced_accuracy", "auroc_macro"} <= roles["test"].keys()
        assert all(np.isfinite(v) for v in roles["test"].values())
    assert summary["verdict"] in ("better", "worse", "not shown")
    assert (run.root / "report.html").stat().st_size > 10_000


def test_no_lesion_has_two_roles(finished):
    _, run = finished
    role_of = defaultdict(set)
    for role in ROLES:
        for group in tables.read(run.data / role, ["group"])["group"].to_pylist():
            role_of[group].add(role)
    assert role_of and all(len(r) == 1 for r in role_of.values())


def test_lesions_leak_when_grouping_is_switched_off(tiny, tmp_path):
    """The same question asked of the lesions (drawn again from the source) finds leaks as soon as the split ignores them."""
    from adversa.data import sources

    config = tiny(data={"grouped": False})
    run = go(config, tmp_path / "run", until="prepare")
    lesion = {r.source: r.group for r in sources.list_records(config.data).records}
    role_of = defaultdict(set)
    for role in ROLES:
        for source in tables.read(run.data / role, ["source"])["source"].to_pylist():
            role_of[lesion[source]].add(role)
    assert any(len(r) > 1 for r in role_of.values())


def test_arms_are_matched_in_steps_images_and_synthetic_images_per_class(finished):
    config, run = finished
    manifests = [runs.manifest(f) for n in (0, 1) for f in trained(config, run, n)]
    assert {m["rows"] for m in manifests} == {config.classifier.steps * config.classifier.batch_size}
    mixes = {arm: tables.read(run.arm(1, arm) / "mix") for arm in ("guided", "unguided")}
    counts = {}
    for arm, mix in mixes.items():
        labels = [r["label"] for r in mix.to_pylist() if r["kind"] == "synthetic"]
        counts[arm] = np.bincount(labels, minlength=5).tolist()
    assert counts["guided"] == counts["unguided"]
    assert sum(counts["guided"]) > 0


def test_only_accepted_images_enter_training(finished):
    _, run = finished
    keep = {v["request_id"]: (v["keep"], v["arm"]) for v in tables.read(run.round(1, "verdicts")).to_pylist()}
    for arm in ("guided", "unguided"):
        for row in tables.read(run.arm(1, arm) / "mix").to_pylist():
            if row["kind"] == "synthetic":
                assert keep[row["id"]] == (True, arm)


def test_training_sees_no_image_of_another_role(finished):
    _, run = finished
    train = set(tables.read(run.data / "train", ["id"])["id"].to_pylist())
    for arm in ("real", "guided", "unguided"):
        real = {r["id"] for r in tables.read(run.arm(1, arm) / "mix").to_pylist() if r["kind"] == "real"}
        assert real == train


def test_hard_cases_come_from_mine_and_their_offspring_keep_their_label(finished):
    _, run = finished
    mine = dict(zip(*tables.read(run.data / "mine", ["id", "label"]).to_pydict().values(), strict=True))
    hard = {h["example"]: h for h in tables.read(run.round(1, "hard")).to_pylist()}
    assert hard and all(mine[e] == h["label"] for e, h in hard.items())
    for r in tables.read(run.round(1, "requests")).to_pylist():
        if r["arm"] == "guided":
            assert r["label"] == mine[r["example"]] and r["strategy"] == "vary"
        else:
            assert r["example"] is None and r["strategy"] == "sample"


def test_test_is_opened_once_and_the_run_says_when(finished):
    _, run = finished
    opened = runs.read_json(run.test / "opened.json")
    assert opened["split_hash"] == runs.fingerprint(run.data)
    for folder in ("denoiser", "judge", "round-001/hard", "round-001/requests"):
        assert "test" not in json.dumps(runs.read_json(run.root / folder / "recipe.json")["inputs"])
    assert runs.manifest(run.round(1, "evaluate"))["finished"] <= opened["opened"]


def test_a_second_run_changes_nothing(finished):
    config, run = finished

    def times():
        return {p: p.stat().st_mtime_ns for p in run.root.rglob("*") if p.is_file() and p.name not in ("clock.json", ".lock")}

    before = times()
    assert cycle.run(config, run, LocalEngine(1, 1), page.write) is None
    assert times() == before


def test_another_recipe_is_refused_with_its_fields(finished, tiny):
    _, run = finished
    with pytest.raises(UserError, match=r"mine\.budget: 12 -> 13") as e:
        cycle.open_run(tiny(mine={"budget": 13}), run.root)
    assert "\n" not in str(e.value)


def test_the_size_of_the_cluster_is_no_part_of_the_recipe(finished, tiny):
    _, run = finished
    assert cycle.open_run(tiny(cluster={"samplers": 7}), run.root) == run


class Cut(BaseException):
    """A power cut: not an Exception, so that nothing may catch it."""


class CutEngine(LocalEngine):
    """Dies in the middle of the n-th piece of work (a part, or a training after some steps)."""

    def __init__(self, after: int) -> None:
        super().__init__(1, 1)
        self.left = after

    def _tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Cut

    def map_batches(self, make, parts, out, report):
        def dying():
            work = make()

            def one(part, path):
                self._tick()
                return work(part, path)

            return one

        return super().map_batches(dying, parts, out, report)

    def fit(self, jobs):
        from adversa.loop.engine import do_job, unfinished

        for job in unfinished(jobs):

            def batches(job=job):
                for i, batch in enumerate(job.feed.batches(job.resume(job.out))):
                    if i % 9 == 5:
                        self._tick()
                    yield batch

            select = job.select.batches if job.select else None
            do_job(job, batches(), select, self.training_threads)


def test_a_run_that_is_cut_off_again_and_again_ends_like_an_undisturbed_one(finished, tiny, tmp_path):
    _, undisturbed = finished
    config, cuts = tiny(), 0
    for after in (2, 6, 3, 4, 2, 5, 1, 3, 2, 4):
        run = cycle.open_run(config, tmp_path / "run")
        try:
            cycle.run(config, run, CutEngine(after), page.write)
            break
        except Cut:
            cuts += 1
    run = go(config, tmp_path / "run")
    assert cuts >= 5
    assert results(run) == results(undisturbed)


def test_nothing_finished_is_done_again(tiny, tmp_path):
    config = tiny()
    run = go(config, tmp_path / "run", until="generate")
    part = tables.parts(run.round(1, "synthetic"))[0]
    (run.round(1, "synthetic") / "manifest.json").unlink()
    tables.parts(run.round(1, "synthetic"))[1].unlink()
    before = part.stat().st_mtime_ns
    painted = []

    class Counting(LocalEngine):
        def map_parts(self, make, parts, out, report):
            painted.extend(p.index for p in parts if not (out / tables.part_name(p.index)).exists())
            return super().map_parts(make, parts, out, report)

    go(config, tmp_path / "run", Counting(1, 1), until="generate")
    assert painted == [1] and part.stat().st_mtime_ns == before


def test_no_hard_case_is_a_result_too(tiny, tmp_path, monkeypatch):
    """A classifier without faults: nothing is painted, and the run says so instead of failing."""
    from adversa.mine import hard

    monkeypatch.setattr(hard, "hard_cases", lambda *a: [])
    run = go(tiny(), tmp_path / "run")
    summary = json.loads(run.summary.read_text())
    assert summary["generated"] == 0 and summary["verdict"] == "not shown"
    assert any("no synthetic image" in n for n in summary["notes"])
    assert summary["arms"]["guided"] == summary["arms"]["real"]


def test_two_rounds_and_two_seeds(tiny, tmp_path):
    config = tiny(rounds=2, evaluate={"seeds": 2, "bootstrap": 200}, mine={"budget": 4})
    run = go(config, tmp_path / "run")
    summary = json.loads(run.summary.read_text())
    assert summary["rounds"] == 2 and summary["seeds"] == 2
    first, second = (set(tables.read(run.round(n, "requests"))["request_id"].to_pylist()) for n in (1, 2))
    assert first and second and not first & second
    assert {r["arm"] for r in tables.read(run.round(2, "scores")).to_pylist()} == {"guided"}
    ids = {r["id"] for r in tables.read(run.arm(2, "guided") / "mix").to_pylist() if r["kind"] == "synthetic"}
    assert ids & first  # accepted images stay in the mix


def test_only_the_real_arm(tiny, tmp_path):
    run = go(tiny(mix={"arms": ["real"]}), tmp_path / "run")
    summary = json.loads(run.summary.read_text())
    assert list(summary["arms"]) == ["real"] and summary["comparisons"] == [] and summary["verdict"] == "not shown"
    assert not run.denoiser.exists()


def test_a_part_that_fails_leaves_no_file(tmp_path):
    from adversa.loop.engine import Part

    def work(part, path):
        raise RuntimeError("bad")

    with pytest.raises(RuntimeError):
        do_part(work, Part(0, 1), tmp_path)
    assert list(tmp_path.iterdir()) == []
