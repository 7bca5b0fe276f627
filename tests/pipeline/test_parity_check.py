"""That the arms are matched is asked of what their folders say, before they are compared: anything
else stops the run.
"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pyarrow as pa
import pytest

from adversa.engine.local import LocalEngine
from adversa.pipeline import loop, parity_check
from adversa.pipeline.folders import models_of
from adversa.run import folder as run_folder
from adversa.run import step_folder
from adversa.storage import tables
from adversa.types import UserError, seed_of

SMALL = {
    "data": {"phantom": {"images": 200}},
    "classifier": {
        "model_args": {"channels": [8, 8, 8, 8]},
        "steps": 4,
        "batch_size": 16,
        "evaluations": 1,
        "checkpoint_steps": 2,
    },
    "mine": {"budget": 6},
    "mix": {"arms": ["real", "resample", "replay"]},
    "evaluate": {"bootstrap": 100, "seeds": 2},
}


def told(root):
    """Stands for the page."""
    (root / "report.html").write_text("told")
    return root / "report.html"


def go(config, root, engine=None, until=None):
    run = loop.open_run(config, root)
    loop.run(config, run, engine or LocalEngine(1, 1), told, until)
    return run


@pytest.fixture(scope="module")
def ready(tiny, tmp_path_factory):
    """(config, root) of a run that has all but its test. Read only."""
    config, root = tiny(**SMALL), tmp_path_factory.mktemp("ready") / "run"
    go(config, root, until="evaluate")
    return config, root


@pytest.fixture
def copy(ready, tmp_path):
    shutil.copytree(ready[1], tmp_path / "run")
    return SimpleNamespace(
        config=ready[0], run=run_folder.RunDir(tmp_path / "run"), root=tmp_path / "run"
    )


def edit(path, change):
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_the_run_says_what_all_its_arms_took(copy):
    run = go(copy.config, copy.root)
    found = json.loads(run.summary.read_text())["matched"]
    added = step_folder.manifest(run.arm(1, "replay") / "mix")["added_by_class"]
    assert sum(added) > 0
    assert found == {
        "arms": ["real", "resample", "replay"],
        "steps": 4,
        "images": 64,
        "batch_size": 16,
        "added_by_class": added,
        "seeds": [seed_of("classifier", 0, s) for s in (0, 1)],
        "threads": [1],
        "workers": [1],
    }


def test_every_classifier_that_is_compared_is_asked(ready):
    config, root = ready
    models = models_of(config, run_folder.RunDir(root), 1)
    assert [(arm, seed, at) for arm, seed, at, _ in models] == [
        (arm, s, at)
        for arm, at in (("before", 0), ("real", 1), ("resample", 1), ("replay", 1))
        for s in (0, 1)
    ]


CLASSIFIER = {
    "steps": (
        "manifest.json",
        lambda m: m["metrics"].update(steps=5),
        r"steps replay seed 1 5, but before seed 0 4",
    ),
    "images": (
        "manifest.json",
        lambda m: m.update(rows=80),
        "images replay seed 1 80, but before seed 0 64",
    ),
    "batch": (
        "recipe.json",
        lambda r: r["config"].update(batch_size=8),
        "batch size replay seed 1 8, but before seed 0 16",
    ),
    "seed": (
        "recipe.json",
        lambda r: r["config"].update(seed=3),
        "first weights and settings replay seed 1",
    ),
    "settings": (
        "recipe.json",
        lambda r: r["config"].update(lr=1.0),
        "first weights and settings replay seed 1",
    ),
    "weights": (
        "recipe.json",
        lambda r: r["inputs"].update(weights="ab"),
        "first weights and settings replay seed 1",
    ),
    "mix": (
        "recipe.json",
        lambda r: r["inputs"].update(mix="0123456789"),
        "training set replay seed 1 01234567, but the folder's",
    ),
}


@pytest.mark.parametrize("name", CLASSIFIER)
def test_one_classifier_that_is_not_as_the_others_stops_the_run_before_test_is_opened(copy, name):
    file, change, text = CLASSIFIER[name]
    edit(copy.run.arm(1, "replay", 1) / "classifier" / file, change)
    with pytest.raises(UserError, match=text) as e:
        go(copy.config, copy.root)
    assert "\n" not in str(e.value) and "delete round-*/replay" in str(e.value)
    assert not copy.run.test.exists() and not copy.run.openings.exists()


def test_the_classifiers_of_before_are_matched_too(copy):
    edit(
        copy.run.arm(0, "real", 0) / "classifier" / "manifest.json",
        lambda m: m["metrics"].update(steps=5),
    )
    with pytest.raises(
        UserError, match="steps before seed 0 5, but before seed 1 4.*delete round-000/real"
    ):
        parity_check.check(copy.config, copy.run, 1)


def heavier(rows, kind, by):
    """A mix in which the first row of a kind weighs more."""
    weights, at = rows["weight"].to_pylist(), rows["kind"].to_pylist().index(kind)
    weights[at] += by
    return rows.set_column(rows.schema.get_field_index("weight"), "weight", pa.array(weights))


def test_what_is_added_is_counted_in_the_training_set_itself(copy, relist):
    part = tables.parts(copy.run.arm(1, "resample") / "mix")[0]
    rows = tables.read(part.parent)
    tables.write_part(part, heavier(rows, "mined", 1.0))
    relist(part.parent)
    with pytest.raises(UserError, match="added weight of .* replay .*, but resample") as e:
        parity_check.check(copy.config, copy.run, 1)
    assert "not matched" in str(e.value)
    tables.write_part(part, rows.slice(1))
    relist(part.parent)
    with pytest.raises(UserError, match="real and mined images of"):
        parity_check.check(copy.config, copy.run, 1)


def test_an_arm_real_with_more_than_its_images_is_found(copy, relist):
    part = tables.parts(copy.run.arm(1, "real") / "mix")[0]
    tables.write_part(part, heavier(tables.read(part.parent), "real", 2.0))
    relist(part.parent)
    with pytest.raises(UserError, match="says that .* were added, but holds .*2.0"):
        parity_check.check(copy.config, copy.run, 1)


def test_a_manifest_that_says_something_else_is_found(copy):
    edit(
        copy.run.arm(1, "replay") / "mix" / "manifest.json", lambda m: m["added_by_class"].reverse()
    )
    with pytest.raises(UserError, match="replay/mix says that"):
        parity_check.check(copy.config, copy.run, 1)


def test_it_is_asked_right_after_training_and_nothing_is_scored(ready, tmp_path):
    config, root = ready
    shutil.copytree(root, tmp_path / "run")
    run = run_folder.RunDir(tmp_path / "run")
    shutil.rmtree(run.round(1, "evaluate"))
    shutil.rmtree(run.arm(1, "replay", 0))

    class Short(LocalEngine):
        """Says that it took a step less."""

        def fit(self, jobs):
            super().fit(jobs)
            for job in jobs:
                if job.out == run.arm(1, "replay", 0) / "classifier":
                    edit(job.out / "manifest.json", lambda m: m["metrics"].update(steps=3))

    with pytest.raises(UserError, match="steps replay seed 0 3"):
        go(config, run.root, Short(1, 1), until="evaluate")
    assert not run.round(1, "evaluate").exists()


def test_another_machine_may_finish_a_run(copy):
    """Threads and workers change the last bits of the weights, and are told; they are no reason to
    stop.
    """
    edit(
        copy.run.arm(1, "replay", 1) / "classifier" / "manifest.json",
        lambda m: m.update(threads=8, workers=2),
    )
    found = parity_check.check(copy.config, copy.run, 1)
    assert found["threads"] == [1, 8] and found["workers"] == [1, 2]


def test_one_arm_alone_may_stop_each_seed_by_itself(tiny, tmp_path):
    config = tiny(
        **{
            **SMALL,
            "mix": {"arms": ["real"]},
            "classifier": {
                **SMALL["classifier"],
                "steps": 40,
                "evaluations": 20,
                "patience": 1,
                "lr": 1e-6,
            },
        }
    )
    run = go(config, tmp_path / "run")
    taken = [
        step_folder.manifest(folder)["metrics"]["steps"] for *_, folder in models_of(config, run, 0)
    ]
    found = json.loads(run.summary.read_text())["matched"]
    assert (
        min(taken) < 40
        and found["steps"] is None
        and found["images"] is None
        and found["added_by_class"] == [0] * 5
    )
