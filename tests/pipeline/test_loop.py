"""The whole cycle in this process: what a run must leave behind, and that a cut-off run ends like
an undisturbed one.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from adversa.engine import batches
from adversa.engine.local import LocalEngine
from adversa.engine.tasks import Part, do_part, row_name
from adversa.pipeline import loop, mine
from adversa.pipeline import stages as table_of_stages
from adversa.pipeline.folders import trained
from adversa.pipeline.stages import stages
from adversa.report import page
from adversa.run import folder as run_folder
from adversa.run import step_folder
from adversa.storage import arrays, files, tables
from adversa.types import ROLES, UserError


def go(config, root, engine=None, until=None):
    run = loop.open_run(config, root)
    loop.run(config, run, engine or LocalEngine(1, 1), page.write, until)
    return run


def results(run):
    """What must not depend on how a run was carried out."""
    requests = tables.read(run.round(1, "requests"))["request_id"].to_pylist()
    verdicts = {
        v["request_id"]: v["keep"] for v in tables.read(run.round(1, "verdicts")).to_pylist()
    }
    images = dict(
        zip(
            *tables.read(run.round(1, "synthetic"), ["request_id", "image"]).to_pydict().values(),
            strict=True,
        )
    )
    return {
        "requests": requests,
        "verdicts": verdicts,
        "images": images,
        "arms": json.loads(run.summary.read_text())["arms"],
    }


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
    assert set(summary["arms"]) == {"real", "replay", "unguided", "guided"}
    assert (
        summary["before"]["test"] != summary["arms"]["real"]["test"]
    )  # the mined images have joined it
    assert summary["generated"] == summary["accepted"] + sum(summary["rejected"].values()) > 0
    for roles in summary["arms"].values():
        assert {"accuracy", "balanced_accuracy", "auroc_macro"} <= roles["test"].keys()
        assert all(np.isfinite(v) for v in roles["test"].values())
    assert summary["verdict"] in ("better", "worse", "not shown")
    assert (run.root / "report.html").stat().st_size > 10_000


def test_no_lesion_has_two_roles(finished):
    """Lesions as the source has them, not as the run wrote them (test_prepare asks the same with
    data.grouped off).
    """
    from adversa.data import sources

    config, run = finished
    lesion = {r.source: r.group for r in sources.list_records(config.data).records}
    role_of = defaultdict(set)
    for role in ROLES:
        for source in tables.read(run.data / role, ["source"])["source"].to_pylist():
            role_of[lesion[source]].add(role)
    assert role_of and all(len(r) == 1 for r in role_of.values())


def test_arms_are_matched_in_steps_images_and_synthetic_images_per_class(finished):
    config, run = finished
    manifests = [step_folder.manifest(f) for n in (0, 1) for f in trained(config, run, n)]
    assert {m["rows"] for m in manifests} == {
        config.classifier.steps * config.classifier.batch_size
    }
    mixes = {arm: tables.read(run.arm(1, arm) / "mix") for arm in ("guided", "unguided")}
    counts = {}
    for arm, mix in mixes.items():
        labels = [r["label"] for r in mix.to_pylist() if r["kind"] == "synthetic"]
        counts[arm] = np.bincount(labels, minlength=5).tolist()
    assert counts["guided"] == counts["unguided"]
    assert sum(counts["guided"]) > 0


def test_only_accepted_images_enter_training(finished):
    _, run = finished
    keep = {
        v["request_id"]: (v["keep"], v["arm"])
        for v in tables.read(run.round(1, "verdicts")).to_pylist()
    }
    for arm in ("guided", "unguided"):
        for row in tables.read(run.arm(1, arm) / "mix").to_pylist():
            if row["kind"] == "synthetic":
                assert keep[row["id"]] == (True, arm)


def test_training_sees_no_image_of_another_role(finished):
    _, run = finished
    train = set(tables.read(run.data / "train", ["id"])["id"].to_pylist())
    hard = set(tables.read(run.round(1, "hard"))["example"].to_pylist())
    for arm in ("real", "replay", "guided", "unguided"):
        rows = tables.read(run.arm(1, arm) / "mix").to_pylist()
        assert {r["id"] for r in rows if r["kind"] == "real"} == train
        assert {r["id"] for r in rows if r["kind"] == "mined"} == hard
    before = tables.read(run.arm(0, "real") / "mix").to_pylist()
    assert {(r["id"], r["kind"]) for r in before} == {(i, "real") for i in train}


def test_controls_draw_every_class_as_often_as_the_arms_that_generate(finished):
    config, run = finished
    totals = {}
    for arm in config.mix.arms:
        rows, facts = (
            tables.read(run.arm(1, arm) / "mix"),
            step_folder.manifest(run.arm(1, arm) / "mix"),
        )
        totals[arm] = np.bincount(
            rows["label"].to_numpy().astype(int), rows["weight"].to_numpy(), minlength=5
        )
        assert facts["added"] == sum(facts["added_by_class"])
    assert np.allclose(totals["replay"], totals["guided"]) and np.allclose(
        totals["unguided"], totals["guided"]
    )
    added = step_folder.manifest(run.arm(1, "guided") / "mix")["added_by_class"]
    assert np.allclose(totals["guided"] - totals["real"], added) and sum(added) > 0


def test_hard_cases_come_from_mine_and_their_offspring_keep_their_label(finished):
    _, run = finished
    mine = dict(
        zip(*tables.read(run.data / "mine", ["id", "label"]).to_pydict().values(), strict=True)
    )
    hard = {h["example"]: h for h in tables.read(run.round(1, "hard")).to_pylist()}
    assert hard and all(mine[e] == h["label"] for e, h in hard.items())
    for r in tables.read(run.round(1, "requests")).to_pylist():
        if r["arm"] == "guided":
            assert r["label"] == mine[r["example"]] and r["strategy"] == "img2img"
        else:
            assert r["example"] is None and r["strategy"] == "sample"


def test_test_is_opened_once_and_the_run_says_when(finished):
    _, run = finished
    opened = files.read_json(run.test / "opened.json")
    assert opened["split_hash"] == run_folder.split_hash(run.data)
    assert step_folder.manifest(run.round(1, "evaluate"))["finished"] <= opened["opened"]


SHORT = {
    "data": {"phantom": {"images": 200}},
    "classifier": {
        "model_args": {"channels": [8, 8, 8, 8]},
        "steps": 6,
        "batch_size": 16,
        "evaluations": 1,
        "checkpoint_steps": 3,
    },
    "denoiser": {
        "architecture": "unet",
        "patch": 2,
        "channels": [8, 8],
        "steps": 4,
        "batch_size": 8,
        "checkpoint_steps": 2,
    },
    "generate": {"per_case": 2, "steps": 2, "batch_size": 8},
    "mine": {"budget": 6},
    "curate": {"min_agreement": 0.0},
    "evaluate": {"bootstrap": 100},
}


def short(tiny, **changes):
    """A run of a few seconds, for tests that ask what was done and not how well."""
    merged = {
        k: {**SHORT.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()
    }
    return tiny(**(SHORT | merged))


def roles_read(monkeypatch, run):
    """(command, role) of every Parquet file of data/<role>, and of every array of one, that is
    opened in this process from now on.
    """
    import pyarrow.parquet as pq

    seen, command = set(), []
    array = arrays.RoleArray.__init__

    def array_opened(self, folder, *a, **k):
        if folder.parent == run.data and folder.name in ROLES:
            seen.add((command[-1], folder.name))
        array(self, folder, *a, **k)

    monkeypatch.setattr(arrays.RoleArray, "__init__", array_opened)

    def watch(name):
        real = getattr(pq, name)

        def opened(source, *a, **k):
            path = Path(source) if isinstance(source, str | os.PathLike) else Path()
            if path.is_relative_to(run.data) and path.parent.name in ROLES:
                seen.add((command[-1], path.parent.name))
            return real(source, *a, **k)

        monkeypatch.setattr(pq, name, opened)

    def entered(stage, at):
        command.append(stage.name)
        stage.run(at)

    table = [dataclasses.replace(s, run=partial(entered, s)) for s in table_of_stages.STAGES]
    monkeypatch.setattr(table_of_stages, "STAGES", table)
    for name in ("read_table", "read_metadata", "ParquetFile"):
        watch(name)
    return seen


def test_nothing_but_the_near_copy_filter_reads_test_before_it_is_opened(
    tiny, tmp_path, monkeypatch
):
    config = short(tiny)
    run = loop.open_run(config, tmp_path / "run")
    seen = roles_read(monkeypatch, run)
    go(config, tmp_path / "run", until="evaluate")
    # prepare, which makes it, counts the rows for its manifest.
    assert {c for c, role in seen if role == "test"} == {"prepare", "curate"}
    assert not run.test.exists()
    # Nor does any step read more than it needs: a training never sees `mine`, mining sees nothing
    # else.
    assert {role for c, role in seen if c == "train"} == {"train", "select"}
    assert {role for c, role in seen if c in ("mine", "generate")} == {"mine"}
    assert {role for c, role in seen if c == "evaluate"} == {"train", "select", "mine"}
    go(config, tmp_path / "run")
    assert {role for c, role in seen if c == "test"} == {"test"} and run.test.exists()


def test_every_classifier_of_every_arm_takes_as_many_batches_and_images(
    tiny, tmp_path, monkeypatch
):
    """Counted where batches are made, not read from the configuration."""
    taken = defaultdict(list)
    real = batches.Feed.batch

    def batch(self, step):
        made = real(self, step)
        if self.mix is not None:
            taken[self].append((step, len(made["image"])))
        return made

    monkeypatch.setattr(batches.Feed, "batch", batch)
    config = short(tiny, evaluate={"seeds": 2})
    run = go(config, tmp_path / "run", until="evaluate")
    wanted = [(s, config.classifier.batch_size) for s in range(config.classifier.steps)]
    seeds = defaultdict(set)
    for f, found in taken.items():
        if run.data / "train" in f.folders and f.batch_size == config.classifier.batch_size:
            assert found == wanted, f
            seeds[run.name_of(f.mix.parent)].add(f.seed)
    assert set(seeds) == {"round-000/real", *(f"round-001/{arm}" for arm in config.mix.arms)}
    assert len(seeds["round-001/guided"]) == 2
    assert all(seeds[f"round-001/{arm}"] == seeds["round-001/guided"] for arm in config.mix.arms)
    assert seeds["round-001/guided"] == seeds["round-000/real"]
    verifiers = {f.seed for f in taken if f.mix.parent == run.judge}
    assert len(verifiers) == 2 and not verifiers & seeds["round-000/real"]
    # A synthetic arm reads its own images beside the real ones, and the real arm reads none.
    synthetic = run.round(1, "synthetic")
    assert all(
        (synthetic in f.folders) == (f.mix.parent.name in ("unguided", "guided")) for f in taken
    )


# ---- what cannot work is said before the work ----------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [
        {"classifier": {"weights": "W"}},
        {"curate": {"judge": {"weights": "W"}}},
        {"denoiser": {"weights": "W"}},
    ],
)
def test_missing_weights_stop_before_anything_is_read_and_may_be_fixed(tiny, tmp_path, where):
    gone = str(tmp_path / "gone.safetensors")
    changes = json.loads(json.dumps(where).replace('"W"', json.dumps(gone)))
    config = short(tiny, **changes)
    run = loop.open_run(config, tmp_path / "run")
    with pytest.raises(
        UserError, match="gone.safetensors: no such file; give a safetensors file"
    ) as e:
        loop.run(config, run, LocalEngine(1, 1), page.write)
    assert "\n" not in str(e.value) and not run.data.exists()
    go(short(tiny), tmp_path / "run", until="prepare")
    assert step_folder.is_finished(run.data)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"classifier": {"model": "resnet18x", "model_args": {}}}, "did you mean .*resnet18"),
        ({"curate": {"judge": {"model": "resnet18x"}}}, "did you mean .*resnet18"),
        ({"classifier": {"model_args": {"no_such": 1}}}, "no_such"),
    ],
)
def test_a_model_that_cannot_be_built_stops_before_the_first_training_and_may_be_fixed(
    tiny, tmp_path, changes, text
):
    config = short(tiny, **changes)
    run = loop.open_run(config, tmp_path / "run")
    with pytest.raises(UserError, match=text):
        loop.run(config, run, LocalEngine(1, 1), page.write)
    assert not run.denoiser.exists() and not run.judge.exists() and not run.round(0).exists()
    go(short(tiny), tmp_path / "run", until="train")
    assert step_folder.is_finished(run.denoiser) and step_folder.is_finished(
        run.arm(0, "real", 0) / "classifier"
    )


def test_weights_of_another_model_stop_before_the_first_training(tiny, tmp_path):
    from adversa.diffuse import edm

    config = short(tiny, denoiser={"weights": str(edm.SHIPPED)})
    run = loop.open_run(config, tmp_path / "run")
    with pytest.raises(UserError, match="denoiser.weights .* has denoiser.channels .*, this run"):
        loop.run(config, run, LocalEngine(1, 1), page.write)
    assert not run.denoiser.exists() and not run.round(0).exists()


def test_the_shipped_denoiser_is_refused_for_the_pictures_it_was_trained_on(tiny, tmp_path):
    from adversa.diffuse import edm

    seed = files.read_json(edm.SHIPPED / "config.json")["pretraining"]["phantom_seed"]
    config = short(
        tiny, denoiser={"weights": "phantom"}, data={"phantom": {"images": 200, "seed": seed}}
    )
    run = loop.open_run(config, tmp_path / "run")
    with pytest.raises(UserError, match="was trained on these very pictures"):
        loop.run(config, run, LocalEngine(1, 1), page.write)
    assert not run.data.exists()


def test_a_second_run_changes_nothing(finished):
    config, run = finished

    def times():
        return {
            p: p.stat().st_mtime_ns
            for p in run.root.rglob("*")
            if p.is_file() and p.name not in ("clock.json", ".lock")
        }

    before = times()
    assert loop.run(config, run, LocalEngine(1, 1), page.write) is None
    assert times() == before


def test_another_recipe_is_refused_with_its_fields(finished, tiny):
    _, run = finished
    with pytest.raises(UserError, match=r"mine\.budget: 12 -> 13") as e:
        loop.open_run(tiny(mine={"budget": 13}), run.root)
    assert "\n" not in str(e.value)


def test_the_size_of_the_cluster_is_no_part_of_the_recipe(finished, tiny):
    _, run = finished
    assert loop.open_run(tiny(cluster={"samplers": 7}), run.root) == run


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

    def _dying(self, make):
        def made():
            work = make()

            def one(part, path):
                self._tick()
                return work(part, path)

            return one

        return made

    def map_batches(self, make, parts, out, report, model=False):
        return super().map_batches(self._dying(make), parts, out, report, model)

    def map_parts(self, make, parts, out, report, name=row_name):
        return super().map_parts(self._dying(make), parts, out, report, name)

    def fit(self, jobs):
        from adversa.engine.fit import do_job, unfinished

        for job in unfinished(jobs, self.handle):

            def batches(job=job):
                for i, batch in enumerate(job.feed.batches(job.resume(job.out))):
                    if i % 9 == 5:
                        self._tick()
                    yield batch

            select = job.select.batches if job.select else None
            do_job(job, batches(), select, self.training_threads)


def test_a_run_that_is_cut_off_again_and_again_ends_like_an_undisturbed_one(
    finished, tiny, tmp_path
):
    _, undisturbed = finished
    config, cuts = tiny(), 0
    for after in (2, 6, 3, 4, 2, 5, 1, 3, 2, 4):
        run = loop.open_run(config, tmp_path / "run")
        try:
            loop.run(config, run, CutEngine(after), page.write)
            break
        except Cut:
            cuts += 1
    run = go(config, tmp_path / "run")
    assert cuts >= 5
    assert results(run) == results(undisturbed)


def test_nothing_finished_is_done_again(tiny, tmp_path):
    config = short(tiny)
    run = go(config, tmp_path / "run", until="generate")
    part = tables.parts(run.round(1, "synthetic"))[0]
    (run.round(1, "synthetic") / "manifest.json").unlink()
    tables.parts(run.round(1, "synthetic"))[1].unlink()
    before = part.stat().st_mtime_ns
    generated = []

    class Counting(LocalEngine):
        def map_parts(self, make, parts, out, report, name):
            generated.extend(
                p.index for p in parts if not (out / tables.part_name(p.index)).exists()
            )
            return super().map_parts(make, parts, out, report, name)

    go(config, tmp_path / "run", Counting(1, 1), until="generate")
    assert generated == [1] and part.stat().st_mtime_ns == before


def test_no_hard_case_is_a_result_too(tiny, tmp_path, monkeypatch):
    """A classifier without faults: nothing is generated, and the run says so instead of failing."""
    from adversa.mine import hard

    monkeypatch.setattr(hard, "hard_cases", lambda *a, **k: [])
    run = go(short(tiny), tmp_path / "run")
    summary = json.loads(run.summary.read_text())
    assert summary["generated"] == 0 and summary["verdict"] == "not shown"
    assert any("nothing was added to the real images" in n for n in summary["notes"])
    assert summary["arms"]["guided"] == summary["arms"]["real"]


def test_two_rounds_and_two_seeds(tiny, tmp_path):
    lenient = {
        "min_agreement": 0.0,
        "trivial_quantile": None,
        "realism_quantile": None,
        "min_contrast": None,
        "max_clipped": None,
        "near_copy_quantile": 1.0,
        "twins": False,
    }  # networks of 12 steps: some images must pass
    settings = {"mine": {"budget": 4}, "generate": {"strategy": "sample"}, "curate": lenient}
    config = short(tiny, rounds=2, evaluate={"seeds": 2}, **settings)
    run = go(config, tmp_path / "run")
    summary = json.loads(run.summary.read_text())
    assert summary["rounds"] == 2 and summary["seeds"] == 2
    first, second = (
        set(tables.read(run.round(n, "requests"))["request_id"].to_pylist()) for n in (1, 2)
    )
    assert first and second and not first & second
    assert {r["arm"] for r in tables.read(run.round(2, "scores")).to_pylist()} == {"guided"}
    ids = {
        r["id"]
        for r in tables.read(run.arm(2, "guided") / "mix").to_pylist()
        if r["kind"] == "synthetic"
    }
    assert ids & first  # accepted images stay in the mix


def test_only_the_real_arm(tiny, tmp_path):
    run = go(short(tiny, mix={"arms": ["real"]}), tmp_path / "run")
    summary = json.loads(run.summary.read_text())
    assert (
        list(summary["arms"]) == ["real"]
        and summary["comparisons"] == []
        and summary["verdict"] == "not shown"
    )
    assert not run.denoiser.exists()


def test_a_part_that_fails_leaves_no_file(tmp_path):
    def work(part, path):
        raise RuntimeError("bad")

    with pytest.raises(RuntimeError):
        do_part(work, Part(0, 1), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_weak_denoiser_that_is_none_is_refused_before_the_first_training(tiny, tmp_path):
    config = short(tiny, generate={"weak": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match="nowhere holds no denoiser"):
        go(config, tmp_path / "run")
    assert not (tmp_path / "run/round-000/real/seed-0").exists()


@pytest.mark.parametrize("arms", [["real", "resample"], ["real", "resample", "replay"]])
def test_arms_that_generate_nothing_have_a_report_too(tiny, tmp_path, arms):
    run = go(short(tiny, mix={"arms": arms}), tmp_path / "run")
    assert (
        (run.root / "report.html").is_file() and not run.judge.exists() and not run.limits.exists()
    )
    assert json.loads(run.summary.read_text())["generated"] == 0


def test_a_group_of_no_class_is_told_before_anything_is_trained(tiny, tmp_path):
    with pytest.raises(UserError, match="evaluate.groups.bad has 'mel', which is no class"):
        go(short(tiny, evaluate={"groups": {"bad": ["mel"]}}), tmp_path / "run")
    assert not (tmp_path / "run/round-000").exists()
    go(short(tiny, evaluate={"groups": {"bad": ["melanoma"]}}), tmp_path / "run", until="train")


def test_a_batch_may_be_fixed_after_the_verifiers_mixes_are_written(tiny, tmp_path):
    class Full(LocalEngine):
        def fit(self, jobs):
            raise UserError("out of memory")

    with pytest.raises(UserError, match="out of memory"):
        go(short(tiny), tmp_path / "run", Full(1, 1))
    assert step_folder.is_finished(tmp_path / "run/judge/mix-0")
    smaller = short(tiny)
    smaller = smaller.model_copy(
        update={"classifier": smaller.classifier.model_copy(update={"batch_size": 4})}
    )
    go(smaller, tmp_path / "run", until="train")


def test_bald_asks_every_seed_and_forgetting_every_round(tiny, tmp_path):
    from adversa.mine import scorers

    run = go(
        short(
            tiny, mine={"scorer": "bald"}, evaluate={"seeds": 2}, mix={"arms": ["real", "resample"]}
        ),
        tmp_path / "bald",
        until="mine",
    )
    members = mine.ensemble(run.round(1, "scores"))
    rows = mine.target_scores(run.round(1, "scores"))
    assert len(members) == 2 and not np.array_equal(*members) and len(rows) == members.shape[1]
    hard = tables.read(run.round(1, "hard")).to_pylist()
    score = dict(
        zip(
            rows["id"].to_pylist(),
            scorers.bald(scorers.Evidence(rows["label"].to_numpy(), members)),
            strict=True,
        )
    )
    first = {
        h["label"]: score[h["example"]] for h in reversed(hard)
    }  # of each class the first taken
    assert all(first[h["label"]] >= score[h["example"]] - 1e-12 for h in hard)

    config = short(
        tiny, mine={"scorer": "forgetting"}, mix={"arms": ["real", "resample"]}, rounds=2
    )
    run = go(config, tmp_path / "forgetting")
    recipe = files.read_json(run.round(2, "hard") / step_folder.RECIPE)
    assert "scores-0" in recipe["inputs"] and tables.read(run.round(2, "hard")).num_rows
