"""`test` is opened once: it is written down before the first image is seen, and a second opening
needs leave and is told of.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from adversa.config import dump, load
from adversa.engine.local import LocalEngine
from adversa.pipeline import loop, test_access
from adversa.pipeline import summary as summaries
from adversa.pipeline.arms import Added
from adversa.pipeline.stage import StageContext
from adversa.pipeline.stages import named
from adversa.run import folder as run_folder
from adversa.run import step_folder
from adversa.storage import files, tables
from adversa.types import UserError

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
    "mix": {"arms": ["real", "replay"]},
    "evaluate": {"bootstrap": 100, "groups": {"malignant": ["melanoma", "carcinoma"]}},
}


def told(root):
    """Stands for the page."""
    (root / "report.html").write_text("told")
    return root / "report.html"


def go(config, root, engine=None, until=None, reopen=False):
    run = loop.open_run(config, root, reopen)
    loop.run(config, run, engine or LocalEngine(1, 1), told, until, reopen=reopen)
    return run


@pytest.fixture(scope="module")
def ready(tiny, tmp_path_factory):
    """(config, root) of a run that has all but its test. Read only."""
    config, root = tiny(**SMALL), tmp_path_factory.mktemp("ready") / "run"
    go(config, root, until="evaluate")
    return config, root


@pytest.fixture(scope="module")
def read(ready, tmp_path_factory):
    """(config, root) of a run that has read its test once. Read only."""
    config, root = ready
    mine = tmp_path_factory.mktemp("read") / "run"
    shutil.copytree(root, mine)
    go(config, mine)
    return config, mine


@pytest.fixture
def again(read, tmp_path):
    """A copy of `read`: config, run."""
    shutil.copytree(read[1], tmp_path / "run")
    return SimpleNamespace(
        config=read[0], run=run_folder.RunDir(tmp_path / "run"), root=tmp_path / "run"
    )


@pytest.fixture
def fresh(ready, tmp_path):
    shutil.copytree(ready[1], tmp_path / "run")
    return SimpleNamespace(
        config=ready[0], run=run_folder.RunDir(tmp_path / "run"), root=tmp_path / "run"
    )


def entries(run):
    return json.loads(run.openings.read_text())


def summary(run):
    return json.loads(run.summary.read_text())


class Cut(BaseException):
    pass


class CutAtTest(LocalEngine):
    """Dies when a classifier is about to see an image of test, and looks at what is written by
    then.
    """

    def __init__(self, run):
        super().__init__(1, 1)
        self.run, self.written = run, None

    def map_batches(self, make, parts, out, report, model=False):
        if out == self.run.test:
            self.written = entries(self.run)
            raise Cut
        return super().map_batches(make, parts, out, report, model)


def cut(given, reopen=False):
    engine = CutAtTest(given.run)
    with pytest.raises(Cut):
        go(given.config, given.root, engine, reopen=reopen)
    return engine.written


def test_it_is_written_down_before_the_first_image_is_seen(fresh):
    (entry,) = cut(fresh)
    assert entry["split_hash"] == run_folder.split_hash(fresh.run.data)
    assert entry["models"].keys() == {"before-0", "real-0", "replay-0"}
    assert entry["models"]["replay-0"] == step_folder.fingerprint(
        fresh.run.arm(1, "replay", 0) / "classifier"
    )
    assert entry["evaluate"]["bootstrap"] == 100 and entry["reason"] == "the end of the run"
    assert not tables.parts(fresh.run.test)


def test_one_that_was_cut_off_and_goes_on_is_the_same(fresh):
    first = cut(fresh)
    assert cut(fresh) == first
    go(fresh.config, fresh.root)
    assert entries(fresh.run) == first
    assert (
        summary(fresh.run)["test_openings"] == 1
        and summary(fresh.run)["test_opened"] == first[0]["opened"]
    )
    assert not any("test was opened" in n for n in summary(fresh.run)["notes"])


def test_killed_between_its_two_files_it_is_the_same(fresh):
    first = cut(fresh)
    fresh.run.openings.unlink()
    assert test_access.ledger(fresh.run) == first
    go(fresh.config, fresh.root)
    assert entries(fresh.run) == first


def test_without_its_folder_test_is_not_opened_again(again):
    shutil.rmtree(again.run.test)
    with pytest.raises(UserError, match="test was opened at 2.*opened.json.*--reopen-test") as e:
        go(again.config, again.root)
    assert "\n" not in str(e.value) and not again.run.test.exists() and len(entries(again.run)) == 1
    with pytest.raises(UserError, match="--reopen-test"):
        at = StageContext(again.config, again.run, LocalEngine(1, 1), 0, "", Added(), Path)
        named("test").run(at)  # not by the stage itself either


def test_with_leave_it_is_opened_again_and_the_run_says_so(again):
    first, before = entries(again.run), summary(again.run)
    shutil.rmtree(again.run.test)
    go(again.config, again.root, reopen=True)
    found = entries(again.run)
    assert found[:1] == first and len(found) == 2 and "is gone" in found[1]["reason"]
    now = summary(again.run)
    assert now["test_openings"] == 2 and now["test_opened"] == first[0]["opened"]
    assert any(n.startswith("test was opened 2 times") for n in now["notes"])
    assert now["arms"] == before["arms"]  # the same classifiers on the same images
    assert now["verdict"] == before["verdict"]
    kept = json.loads((again.root / "test-opening-1" / "summary.json").read_text())
    assert kept["test_openings"] == 1


def test_leave_is_no_order(again):
    """With the flag and nothing to read anew, nothing is read, as often as the command is given."""
    before = {
        p: p.stat().st_mtime_ns
        for p in again.root.rglob("*.*")
        if p.is_file() and p.name != "clock.json"
    }
    go(again.config, again.root, reopen=True)
    assert {p: p.stat().st_mtime_ns for p in before} == before and not (
        again.root / "test-opening-1"
    ).exists()


def test_other_classifiers_do_not_read_it_again(again):
    made = again.run.arm(1, "replay", 0) / "classifier" / "manifest.json"
    files.write_json(made, json.loads(made.read_text()) | {"fingerprint": "0123"})
    with pytest.raises(UserError, match=r"model\.replay-0: .* -> 0123.*--reopen-test"):
        go(again.config, again.root)
    with pytest.raises(
        UserError, match="--reopen-test"
    ):  # nor is a report written of figures that are another classifier's
        summaries.write(again.config, again.run, [])
    old = tables.read(again.run.test)
    go(again.config, again.root, reopen=True)
    assert len(entries(again.run)) == 2 and "replay-0" in entries(again.run)[1]["reason"]
    assert tables.read(again.root / "test-opening-1").equals(old)
    assert (again.root / "select-opening-1").is_dir() and step_folder.is_finished(again.run.select)


def test_a_classifier_that_would_be_trained_again_is_refused_before_it_is(again):
    shutil.rmtree(again.run.arm(1, "replay", 0) / "classifier")
    with pytest.raises(UserError, match=r"model\.replay-0: .* -> not trained"):
        go(again.config, again.root)
    assert not (again.run.arm(1, "replay", 0) / "classifier").exists()


def test_another_way_to_read_it_is_another_opening(again, tiny):
    other = tiny(
        **{
            **SMALL,
            "evaluate": {
                "bootstrap": 150,
                "groups": {"melanoma": ["melanoma"]},
                "specificities": [0.7],
            },
        }
    )
    with pytest.raises(UserError, match=r"evaluate\.bootstrap: 100 -> 150.*--reopen-test") as e:
        loop.open_run(other, again.root)
    assert "\n" not in str(e.value)
    go(other, again.root, reopen=True)
    assert load(again.run.config).evaluate == other.evaluate
    now = summary(again.run)
    assert now["test_openings"] == 2 and "bootstrap: 100 -> 150" in entries(again.run)[1]["reason"]
    old = json.loads((again.root / "test-opening-1" / "summary.json").read_text())
    assert "sensitivity@0.80/malignant" in old["arms"]["real"]["test"]
    assert {k for k in now["arms"]["real"]["test"] if k.startswith("sensitivity@")} == {
        "sensitivity@0.70/melanoma"
    }
    assert (again.root / "test-opening-1" / "report.html").exists() and tables.parts(
        again.root / "test-opening-1"
    )
    before = entries(again.run)
    go(other, again.root)  # from here on it is the run's own way
    assert entries(again.run) == before
    assert (
        go(again.config, again.root, reopen=True) and len(entries(again.run)) == 3
    )  # and back is a third
    assert (again.root / "test-opening-2").is_dir() and summary(again.run)["test_openings"] == 3


@pytest.mark.parametrize(
    "change",
    [{"evaluate": {"seeds": 2}}, {"mine": {"budget": 7}}, {"evaluate": {"seeds": 2, "floor": 0.7}}],
)
def test_what_classifiers_hang_on_is_no_way_of_reading(again, tiny, change):
    merged = {**SMALL, **{k: {**SMALL.get(k, {}), **v} for k, v in change.items()}}
    for reopen in (False, True):
        with pytest.raises(UserError, match="was made by another recipe") as e:
            loop.open_run(tiny(**merged), again.root, reopen)
        assert "--reopen-test" not in str(e.value)


def test_before_test_is_opened_leave_to_open_it_again_changes_nothing(fresh, tiny):
    other = tiny(**{**SMALL, "evaluate": {**SMALL["evaluate"], "bootstrap": 150}})
    with pytest.raises(UserError, match="was made by another recipe") as e:
        loop.open_run(other, fresh.root, True)
    assert "--reopen-test" not in str(e.value)
    go(fresh.config, fresh.root, reopen=True)
    assert len(entries(fresh.run)) == 1


def test_cut_off_between_the_new_settings_and_the_new_reading_it_stays_refused(again, tiny):
    other = tiny(**{**SMALL, "evaluate": {**SMALL["evaluate"], "bootstrap": 150}})
    loop.open_run(
        other, again.root, True
    )  # killed here: the run has the new settings, and the old reading
    with pytest.raises(UserError, match=r"evaluate\.bootstrap: 100 -> 150.*--reopen-test"):
        go(other, again.root)
    again.config = other
    assert len(cut(again, reopen=True)) == 2
    go(other, again.root)  # the second opening was begun with leave, and goes on without it
    assert len(entries(again.run)) == 2 and summary(again.run)["test_openings"] == 2


def test_a_ledger_that_cannot_be_read_is_no_empty_one(again):
    for text in ('[{"opened": ', "{}"):
        again.run.openings.write_text(text)
        with pytest.raises(UserError, match="openings.json is damaged"):
            go(again.config, again.root)


def test_the_command_takes_the_flag(again, adversa, monkeypatch):
    from adversa.report import page

    monkeypatch.setattr(page, "write", told)
    shutil.rmtree(again.run.test)
    config = again.root.parent / "config.yaml"
    config.write_text(dump(again.config))
    words = ("loop", config, "--run-dir", again.root, "--engine", "local")
    refused = adversa(*words)
    assert (
        refused.exit_code == 2
        and "--reopen-test" in refused.stderr
        and len(refused.stderr.strip().splitlines()) == 1
    )
    done = adversa(*words, "--reopen-test")
    assert done.exit_code == 0, done.output
    assert len(entries(again.run)) == 2 and summary(again.run)["test_openings"] == 2
