"""The table of stages: what a new row takes, and which settings may be fixed once a step has
begun.
"""

from __future__ import annotations

import json

import pytest

from adversa.cli import view
from adversa.engine.local import LocalEngine
from adversa.engine.step import run_step
from adversa.pipeline import loop, stages
from adversa.pipeline.folders import last_round
from adversa.pipeline.stage import Output, Stage
from adversa.report import page
from adversa.run import step_folder
from adversa.run.control import NullHandle
from adversa.run.step_folder import Recipe
from adversa.storage import files
from adversa.types import UserError

SMALL = {
    "data": {"phantom": {"images": 160}},
    "classifier": {
        "model_args": {"channels": [8, 8, 8, 8]},
        "steps": 2,
        "batch_size": 8,
        "evaluations": 1,
    },
    "mine": {"budget": 6},
    "mix": {"arms": ["real", "replay"]},
    "evaluate": {"bootstrap": 100},
}


# ---- a fake stage: one row, and functions of its own ---------------------------------------------


def count(at):
    out = at.dir.round(at.round, "count")

    def body(progress):
        files.write_json(out / "count.json", {"of": at.config.mine.budget})
        return {"rows": 1}

    run_step(out, Recipe("count", 1, {"budget": at.config.mine.budget}, {}), body, at.engine.handle)


def counted(config, run, number):
    return (Output(run.round(number, "count"), ("mine.budget",)),)


def rounds(config):
    return range(1, last_round(config) + 1)


class Counting(NullHandle):
    def __init__(self):
        self.checks = 0

    def check(self):
        self.checks += 1


def declared(config, run):
    """A step's recipe is made of its sections: a field of one that the table does not name could be
    changed after the step.
    """
    tree = json.loads(json.dumps(loop.recipe_of(config)))
    own = {"arm", "role", "embed", "most"}
    for name, keys in stages.reads(stages.stages(config, run), run).items():
        fields = files.read_json(run.root / name / step_folder.RECIPE)["config"].keys() - own
        known = set()
        for key in keys:
            section, _, field = key.partition(".")
            found = tree.get(section, {})
            known |= {field} if field else {section, *(found if isinstance(found, dict) else ())}
        assert not keys or "" in keys or fields <= known, (name, fields - known)


@pytest.fixture
def table(monkeypatch):
    """The table with one row more, after `mine`."""
    rows = list(stages.STAGES)
    rows.insert(4, Stage("count", count, counted, rounds))
    monkeypatch.setattr(stages, "STAGES", tuple(rows))


def test_a_new_stage_is_a_row_and_its_own_functions(tiny, tmp_path, table):
    config = tiny(**SMALL)
    run = loop.open_run(config, tmp_path / "run")
    titles = [s.title for s in stages.stages(config, run)]
    assert titles.index("round 1: count") == titles.index("round 1: mine") + 1
    handle = Counting()
    loop.run(config, run, LocalEngine(1, 1), page.write, handle=handle)
    made = [files.read_json(p)["step"] for p in run.root.rglob(step_folder.MANIFEST)]
    # Each step asks whether the run is still ours before it commits; trainings commit on workers.
    assert handle.checks == sum(step != "classifier" for step in made) > 8
    assert files.read_json(run.round(1, "count") / "count.json") == {"of": 6}
    assert loop.todo(stages.stages(config, run)) == []
    assert "round-001/count" in json.loads(run.summary.read_text())["seconds"]
    assert not view.tasks(run, stages.stages(config, run)[-1])
    declared(config, run)
    (run.round(1, "count") / "count.json").unlink()
    with pytest.raises(UserError, match=r"round-001/count/count\.json is gone; put the file back"):
        loop.open_run(config, run.root)


def test_stages_come_in_the_order_of_the_table_round_by_round(tiny, tmp_path):
    config = tiny(rounds=2, codec={"kind": "tiny"}, mix={"arms": ["real", "unguided", "guided"]})
    run = loop.open_run(config, tmp_path / "run")
    each = [f"round {n}: {s}" for n in (1, 2) for s in ("mine", "generate", "curate", "evaluate")]
    expected = ["prepare", "codec", "train", *each, "test", "report"]
    assert [s.title for s in stages.stages(config, run)] == expected
    plan = [s.title for s in stages.plan(config, run, "quality")]
    assert plan == ["prepare", "codec", "denoiser", "quality"]
    alone = tiny(mix={"arms": ["real"]})
    titles = [s.title for s in stages.stages(alone, run)]
    assert titles == ["prepare", "train", "evaluate", "test", "report"]


# ---- what each step reads ------------------------------------------------------------------------


def begin(run, *names):
    for name in names:
        times = dict.fromkeys(("seconds", "compute_seconds", "device_seconds"), 1.0)
        manifest = {"step": name, "fingerprint": "f", "files": {}, **times}
        files.write_json(run.root / name / step_folder.MANIFEST, manifest)


FIRST = ("data", "round-000/real/mix", "round-000/real/seed-0/classifier")
# What has begun, a change that it allows, and one that it does not.
MENDED = [
    (("data",), {"mix": {"synthetic_ratio": 0.25}}, {"data": {"resolution": 64}}),
    (FIRST, {"mine": {"budget": 9}, "evaluate": {"seeds": 2}}, {"classifier": {"lr": 0.5}}),
    (FIRST, {"generate": {"steps": 9}}, {"seed": 3}),
    (FIRST, {"curate": {"quota": 9}}, {"generate": {"per_case": 5}}),
    ((*FIRST, "judge/mix-0"), {"curate": {"quota": 9}}, {"curate": {"folds": 3}}),
    ((*FIRST, "round-001/scores"), {"mine": {"budget": 9}}, {"mine": {"scorer": "entropy"}}),
    ((*FIRST, "round-001/hard"), {"curate": {"quota": 9}}, {"mine": {"budget": 9}}),
    ((*FIRST, "denoiser"), {"generate": {"steps": 9}}, {"denoiser": {"lr": 0.5}}),
]


@pytest.mark.parametrize(("begun", "allowed", "refused"), MENDED)
def test_a_setting_may_be_fixed_as_long_as_no_step_that_reads_it_has_begun(
    tiny, tmp_path, begun, allowed, refused
):
    run = loop.open_run(tiny(), tmp_path / "run")
    begin(run, *begun)
    with pytest.raises(UserError, match="was made by another recipe"):
        loop.open_run(tiny(**refused), run.root)
    loop.open_run(tiny(**allowed), run.root)
    assert json.loads(run.recipe.read_text())["recipe"] == json.loads(
        json.dumps(loop.recipe_of(tiny(**allowed)))
    )


@pytest.mark.parametrize("begun", ["round-001/requests", "test", "somebody's"])
def test_requests_and_test_hang_on_every_setting_and_so_does_a_folder_of_no_stage(
    tiny, tmp_path, begun
):
    run = loop.open_run(tiny(), tmp_path / "run")
    begin(run, begun)
    for change in ({"evaluate": {"bootstrap": 300}}, {"curate": {"quota": 9}}, {"rounds": 2}):
        with pytest.raises(UserError, match="was made by another recipe"):
            loop.open_run(tiny(**change), run.root)
