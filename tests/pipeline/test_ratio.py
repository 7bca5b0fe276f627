"""`mix.synthetic_ratio: auto`: what is swept, what is chosen, what a round remembers of earlier
ones, that it all resumes.
"""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from adversa.cli import view
from adversa.config import check, load
from adversa.engine.local import LocalEngine
from adversa.estimate import plan
from adversa.evaluate import choosing
from adversa.evaluate.choosing import HELPED, NOT_HELPED, UNKNOWN
from adversa.pipeline import arms, evaluate, loop, parity_check, planning, ratio, train
from adversa.pipeline import folders as pipeline_folders
from adversa.pipeline.folders import ratio_folders, retrained, swept
from adversa.pipeline.stages import stages
from adversa.run import control, step_folder
from adversa.run import folder as run_folder
from adversa.run.folder import RunDir
from adversa.storage import files, tables
from adversa.types import UserError

# A run of seconds whose filter lets nearly all through: 24 images an arm and round at most.
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
    "mine": {"budget": 12},
    "curate": {
        "min_agreement": 0.0,
        "trivial_quantile": None,
        "realism_quantile": None,
        "min_contrast": None,
        "max_clipped": None,
        "twins": False,
        "near_copy_quantile": 1.0,
    },
    "evaluate": {"bootstrap": 100},
    "mix": {"synthetic_ratio": "auto", "ratios": [0.05, 0, 5, 0.02, 2.5]},
}


def short(tiny, **changes):
    merged = {
        k: {**SHORT.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()
    }
    return tiny(**(SHORT | merged))


def told(root):
    """Stands for the page."""
    (root / "report.html").write_text("told")
    return root / "report.html"


def go(config, root, until=None, engine=None):
    run = loop.open_run(config, root)
    loop.run(config, run, engine or LocalEngine(1, 1), told, until)
    return run


def fingerprint(folder):
    return step_folder.manifest(folder)["fingerprint"]


# ---- the configuration ---------------------------------------------------------------------------


def fault(**mix):
    with pytest.raises(UserError) as e:
        check({"mix": mix}, "my.yaml")
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    "value", [-1, -0.5, float("nan"), float("inf"), "nan", "automatic", None, True, [1]]
)
def test_a_ratio_is_a_finite_number_or_auto(value):
    assert fault(synthetic_ratio=value) == (
        f"my.yaml: mix.synthetic_ratio = {value!r}: must be a finite number of at least 0, or auto"
    )


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        (
            [0.5, 1],
            "mix.ratios = [0.5, 1]: must hold 0, which asks whether images help at all, "
            "and at least one other ratio",
        ),
        ([0], "mix.ratios = [0]: must hold 0"),
        ([], "mix.ratios = []: must hold 0"),
        ([0, 1, 1.0], "mix.ratios = [0, 1, 1.0]: names a ratio twice"),
        ([0, -1], "mix.ratios.1 = -1: Input should be greater than or equal to 0"),
        ([0, float("inf")], "mix.ratios.1 = inf: Input should be a finite number"),
    ],
)
def test_the_ratios_that_are_tried_are_checked(ratios, text):
    assert text in fault(ratios=ratios)


def test_auto_needs_an_arm_that_adds_and_no_images_need_none():
    assert (
        "mix.synthetic_ratio auto chooses how many images are added, and mix.arms [real] "
        "adds none; give a number" in fault(arms=["real"], synthetic_ratio="auto")
    )
    for names in (["guided"], ["unguided", "replay"], ["resample"]):
        assert fault(arms=["real", *names], synthetic_ratio=0) == (
            f"my.yaml: mix.synthetic_ratio 0 leaves the arms {', '.join(names)} without "
            "images; give a ratio above 0, auto, or "
            "mix.arms=[real]"
        )
    assert check({"mix": {"arms": ["real"], "synthetic_ratio": 0}}, "x").mix.synthetic_ratio == 0
    assert "mix.patience = 0" in fault(patience=0)


def test_what_is_tried_is_sorted_and_yaml_reads_it_back(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "mix: {synthetic_ratio: auto, ratios: [5, 0, 1e-3, 2.5], patience: null}\n"
    )
    mix = load(tmp_path / "c.yaml").mix
    assert (mix.synthetic_ratio, mix.ratios, mix.patience) == ("auto", [0.0, 0.001, 2.5, 5.0], None)
    assert load(tmp_path / "c.yaml", ["mix.synthetic_ratio=1e-1"]).mix.synthetic_ratio == 0.1
    assert [ratio.name_of(r) for r in mix.ratios] == ["0", "0.001", "2.5", "5"] and check(
        {}, "x"
    ).mix.synthetic_ratio == 0.5


# ---- recipes of runs with a number ---------------------------------------------------------------


def recipes(monkeypatch, tmp_path, module, call):
    """The recipe of the step that is called; inputs are folders of these names."""
    found = []
    monkeypatch.setattr(module, "run_step", lambda out, recipe, body, handle: found.append(recipe))
    for name in ("data", "hard", "verdicts"):
        (tmp_path / name).mkdir(exist_ok=True)
        files.write_json(tmp_path / name / step_folder.MANIFEST, {"fingerprint": name, "files": {}})
    call()
    return found[0].to_json()


def test_a_ratio_that_is_a_number_has_the_recipes_it_always_had(monkeypatch, tmp_path):
    """As of the commit before there was auto: nothing of such a run is to be done again, and no
    request has another id.
    """
    c = check({}, "x")

    def mixed(most=None):
        args = [
            tmp_path / "data",
            [tmp_path / "hard"],
            [tmp_path / "verdicts"],
            "guided",
            c.mix,
            6,
            tmp_path / "out",
            arms.Added(0.5, most or {}),
        ]
        return recipes(monkeypatch, tmp_path, train, lambda: train.mix(*args))

    old = {
        "step": "mix",
        "version": 2,
        "inputs": {"data": "data", "hard-0": "hard", "verdicts-0": "verdicts"},
        "config": {
            "arm": "guided",
            "per_case": 6,
            "arms": ["real", "replay", "unguided", "guided"],
            "synthetic_ratio": 0.5,
            "fold_mined": "all",
        },
    }
    assert mixed() == mixed({}) == old
    assert mixed({3: 7})["config"] == old["config"] | {"most": {"3": 7}}
    assert set(loop.recipe_of(c)["mix"]) == {"arms", "synthetic_ratio", "fold_mined"}
    swept = check({"mix": {"synthetic_ratio": "auto"}}, "x")
    assert set(loop.recipe_of(swept)["mix"]) == {
        "arms",
        "synthetic_ratio",
        "fold_mined",
        "ratios",
        "patience",
    }

    def planned(*without):
        by = tmp_path / "data", 0
        args = [
            tmp_path / "hard",
            None,
            "run",
            1,
            c.mix.arms,
            c.generate,
            tmp_path / "out",
            by,
            *without,
        ]
        return recipes(monkeypatch, tmp_path, planning, lambda: planning.plan(*args))["config"]

    assert (
        planned() == planned([])
        and "without" not in planned()
        and planned([2, 1])["without"] == [1, 2]
    )


# ---- counts --------------------------------------------------------------------------------------


def test_ratios_that_reach_the_same_counts_are_trained_once():
    assert ratio.twins({0.0: [0, 0], 0.5: [3, 2], 1.0: [4, 4], 5.0: [4, 4], 9.0: [4, 4]}) == {
        0.0: None,
        0.5: None,
        1.0: None,
        5.0: 1.0,
        9.0: 1.0,
    }
    assert ratio.twins({0.0: [0], 1.0: [0]}) == {0.0: None, 1.0: 0.0}


def test_a_capped_class_leaves_its_share_to_the_others():
    kept = {"guided": [0] * 40 + [1] * 40, "unguided": [0] * 40 + [1] * 40}
    assert arms.matched_counts(kept, 2, 60, 0.5) == [15, 15]
    assert arms.matched_counts(kept, 2, 60, 0.5, {0: 6}) == [3, 27] and arms.matched_counts(
        kept, 2, 60, 9.0, {0: 6}
    ) == [6, 40]
    assert arms.repeats([0, 1], 2, 9, 60, 9.0, {1: 0}) == [9, 0]
    assert arms.matched_counts(kept, 2, 60, 1e308) == [40, 40]


# ---- what a round remembers ----------------------------------------------------------------------


def remembered(*rounds, patience=2):
    """State after rounds of {class: word}, each with 10 images more of every class."""
    state = None
    for number, words in enumerate(rounds, 1):
        in_a_row, stopped = ratio.carried(
            state, words, dict.fromkeys("abc", 10 * number), number, patience
        )
        state = {"in_a_row": in_a_row, "stopped": stopped}
    return state


def test_a_class_is_stopped_after_rounds_in_a_row_without_help():
    no, yes, unknown = NOT_HELPED, HELPED, UNKNOWN
    assert remembered({"a": no, "b": no}, {"a": no, "b": yes}, {"a": yes, "b": no}) == {
        "in_a_row": {"a": 0, "b": 1},
        "stopped": {"a": {"since": 3, "most": 20}},
    }
    assert remembered({"a": no}, {"a": yes}, {"a": no})["stopped"] == {}
    assert remembered({"a": no}, {"a": unknown}, {"a": no})["stopped"] == {
        "a": {"since": 4, "most": 30}
    }  # neither way
    assert remembered({"a": unknown}, {"a": unknown}, {"a": unknown}) == {
        "in_a_row": {},
        "stopped": {},
    }
    assert remembered({"a": no}, {}, {"a": no})["stopped"] == {
        "a": {"since": 4, "most": 30}
    }  # set by hand between
    assert remembered(*[{"a": no}] * 9, patience=None)["stopped"] == {}
    assert remembered({"a": no}, {"b": no}, patience=1)["stopped"] == {
        "a": {"since": 2, "most": 10},
        "b": {"since": 3, "most": 20},
    }


def choice_files(run, *states):
    """choice.json of rounds 1 .., None: a round without."""
    files.write_json(run.data / "classes.json", {"classes": ["a", "b", "c"]})
    for number, state in enumerate(states, 1):
        if state is not None:
            folder = ratio_folders(run, number)[1]
            files.write_json(folder / ratio.CHOICE, state)
            files.write_json(folder / step_folder.MANIFEST, {"fingerprint": f"choice {number}"})


def test_caps_come_from_the_last_choice_before_and_hold_in_rounds_that_choose(tmp_path):
    run, auto = RunDir(tmp_path), check({"mix": {"synthetic_ratio": "auto"}}, "x")
    stopped = {"c": {"since": 2, "most": 7}, "a": {"since": 2, "most": 0}}
    choice_files(
        run,
        {"in_a_row": {}, "stopped": stopped, "chosen": 2.5},
        None,
        {"in_a_row": {}, "stopped": {}, "chosen": 0.0},
    )
    assert [ratio.caps(run, n) for n in (1, 2, 3, 4)] == [{}, {2: 7, 0: 0}, {2: 7, 0: 0}, {}]
    assert ratio.resolve(auto.mix, run, 1) == arms.Added(None, {})
    assert ratio.resolve(auto.mix, run, 3) == arms.Added(None, {2: 7, 0: 0})
    assert ratio.resolve(check({}, "x").mix, run, 3) == arms.Added(0.5, {})


def test_a_choice_that_is_not_finished_is_none(tmp_path):
    files.write_json(ratio_folders(RunDir(tmp_path), 1)[1] / ratio.CHOICE, {"chosen": 1.0})
    assert ratio.read(RunDir(tmp_path), 1) is None and ratio.before(RunDir(tmp_path), 2) is None


# ---- set by hand ---------------------------------------------------------------------------------


def test_a_request_holds_for_rounds_that_have_not_begun(tmp_path):
    run, auto, number = (
        RunDir(tmp_path),
        check({"rounds": 3, "mix": {"synthetic_ratio": "auto"}}, "x"),
        check({"rounds": 3}, "x"),
    )
    assert swept(auto, run) == [1, 2, 3] and swept(number, run) == []
    run.round(1).mkdir(parents=True)
    control.request(run, None, {"mix.synthetic_ratio": 0.25})
    assert swept(auto, run) == [1]
    control.request(run, None, {"mix.synthetic_ratio": "auto"})
    assert swept(auto, run) == [1, 2, 3] and swept(number, run) == [2, 3]
    control.enter_round(run, 2, {"mix.synthetic_ratio": 0.5, "mine.budget": 64})
    run.round(2).mkdir()
    control.request(run, None, {"mix.synthetic_ratio": 0.5})
    assert swept(number, run) == [2]
    assert {s.round for s in stages(number, run) if ratio_folders(run, 2)[1] in s.folders} == {2}


def test_zero_by_hand_is_refused_in_the_same_words(tmp_path):
    config = check({}, "x")
    with pytest.raises(
        UserError,
        match="mix.synthetic_ratio 0 leaves the arms replay, unguided, guided without images; "
        "give a ratio",
    ):
        loop.changed(config, {"mix.synthetic_ratio": 0})
    assert loop.changed(config, {"mix.synthetic_ratio": "auto"}).mix.synthetic_ratio == "auto"


def test_by_hand_to_a_number_and_back_between_rounds(tiny, tmp_path):
    """Without generation: replay is swept."""
    config = short(tiny, rounds=3, mix={"arms": ["real", "replay"], "ratios": [0, 0.1, 5]})
    root, requests = tmp_path / "run", [None, 0.05, "auto"]
    for value in requests:
        if value is not None:
            control.request(RunDir(root), None, {"mix.synthetic_ratio": value})
        go(config, root, until="evaluate")
    run = go(config, root)
    summary = json.loads(run.summary.read_text())
    assert list(summary["ratio"]) == ["1", "3"] and summary["settings"] == {
        "2": {"mix.synthetic_ratio": 0.05}
    }
    assert {r["arm"] for r in summary["ratio"].values()} == {"replay"}
    assert (
        files.read_json(run.arm(2, "replay") / "mix" / step_folder.RECIPE)["config"][
            "synthetic_ratio"
        ]
        == 0.05
    )
    assert files.read_json(ratio_folders(run, 3)[1] / step_folder.RECIPE)["inputs"][
        "choice-1"
    ] == fingerprint(ratio_folders(run, 1)[1])
    assert not ratio_folders(run, 2)[0].exists() and any(
        "tuned for replay" in n for n in summary["notes"]
    )


# ---- trials --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curated(tiny, tmp_path_factory):
    """(config, root) of a run of two rounds that has the verdicts of the first. Read only."""
    config, root = (
        short(tiny, rounds=2, evaluate={"seeds": 2}, seed=2),  # whose images all pass the filter
        tmp_path_factory.mktemp("curated") / "run",
    )
    go(config, root, until="curate")
    return config, root


@pytest.fixture
def copy(curated, tmp_path):
    shutil.copytree(curated[1], tmp_path / "run")
    return SimpleNamespace(config=curated[0], run=RunDir(tmp_path / "run"), root=tmp_path / "run")


class Cut(BaseException):
    """A power cut."""


def trained(monkeypatch, cut_at=None):
    """The trials that are begun from now on; the `cut_at`-th is cut off after its classifier."""
    begun, score = [], evaluate.score

    def scored(engine, models, examples, *rest):
        if "ratio" in rest[-1].parts:
            begun.append(rest[-1].parent.parent.name)
            if len(begun) == cut_at:
                raise Cut
        score(engine, models, examples, *rest)

    monkeypatch.setattr(evaluate, "score", scored)
    return begun


def test_a_sweep_that_was_cut_off_goes_on_and_chooses_the_same(copy, tmp_path, monkeypatch):
    shutil.copytree(copy.root, tmp_path / "whole")
    whole = go(copy.config, tmp_path / "whole", until="evaluate")
    begun = trained(monkeypatch, 2)
    with pytest.raises(Cut):
        go(copy.config, copy.root, until="evaluate")
    assert (
        begun == ["r-0", "r-0.02"]
        and not (ratio_folders(copy.run, 1)[0] / step_folder.MANIFEST).exists()
    )
    done = [
        p
        for p in copy.run.round(1, "ratio").rglob(step_folder.MANIFEST)
        if p.parts[-3].startswith("seed-")
    ]
    assert (
        len(done) == 3
    )  # a classifier and its predictions, and the classifier of the trial that was cut off
    before = {p: p.stat().st_mtime_ns for p in done}
    go(copy.config, copy.root, until="evaluate")
    assert {p: p.stat().st_mtime_ns for p in done} == before
    one, other = (files.read_json(ratio_folders(r, 1)[1] / ratio.CHOICE) for r in (whole, copy.run))
    assert one == other and fingerprint(ratio_folders(whole, 1)[1]) == fingerprint(
        ratio_folders(copy.run, 1)[1]
    )
    assert begun == [
        "r-0",
        "r-0.02",
        "r-0.02",
        "r-0.05",
        "r-2.5",
        "r-0",
        "r-0.02",
        "r-0.05",
        "r-2.5",
    ]


def test_trials_travel_and_are_shown_while_they_run(copy):
    search = ratio_folders(copy.run, 1)[0]
    stage = next(s for s in stages(copy.config, copy.run) if s.name == "evaluate")
    assert stage.folders[:2] == ratio_folders(copy.run, 1) and not stage.is_finished
    seen = []

    class Watching(LocalEngine):
        def search(self, trials, report):
            assert pickle.loads(pickle.dumps(trials[1].work)).args == trials[1].work.args
            seen.extend(t.name for t in trials)
            report(
                {"done": 1, "total": 3, "unit": "trial", "running": [trials[1].name], "failed": 1}
            )
            seen.append(view.tasks(copy.run, stage)[-1].line())
            raise Cut

    with pytest.raises(Cut):
        go(copy.config, copy.root, "evaluate", Watching(1, 1))
    assert seen[:3] == ["ratio 0 seed 0", "ratio 0.02 seed 0", "ratio 0.05 seed 0"] and len(
        set(seen)
    ) == len(seen)
    assert (
        seen[-1].startswith("round-001/ratio/search: 1 of 3 trials")
        and "1 failed; now ratio 0.02 seed 0" in seen[-1]
    )
    assert not step_folder.is_finished(search)


def test_a_plan_counts_the_trials(copy):
    role = plan.roles(copy.config, copy.run)
    stage = next(s for s in stages(copy.config, copy.run) if s.name == "evaluate")
    works = [w for w in plan.work_of(stage, copy.config, copy.run, role) if w.by == "trials"]
    steps_, looks = (
        sum(w.amount for w in works if w.kind == kind) for kind in ("classifier", "score")
    )
    assert steps_ == 10 * copy.config.classifier.steps and looks == 10 * 2 * role["select"]
    assert [w.bound for w in works] == [False, False, True, True]
    number = copy.config.model_copy(
        update={"mix": copy.config.mix.model_copy(update={"synthetic_ratio": 0.5})}
    )
    assert not [w for w in plan.work_of(stage, number, copy.run, role) if w.by == "trials"]


# ---- a whole run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(curated, tmp_path_factory):
    """(config, run) of two rounds. The first is made to choose ratio 0.05 and to find that images
    helped all classes but the one with most hard cases (`no`); the second chooses for itself.
    """
    config, root = curated[0], tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(curated[1], root)
    run = RunDir(root)
    config = config.model_copy(update={"mix": config.mix.model_copy(update={"patience": 1})})
    saved = files.read_json(run.recipe)
    saved["recipe"]["mix"]["patience"] = 1
    files.write_json(run.recipe, saved)
    labels = tables.read(run.round(1, "hard"))["label"].to_pylist()
    no = max(set(labels), key=lambda c: (labels.count(c), c))
    choose, helped, classes = (
        choosing.choose,
        choosing.help_by_class,
        run_folder.classes_of(run.data),
    )

    def one(*args):
        found = choose(*args)
        return found if ratio.read(run, 1) else replace(found, chosen=0.05)

    def words(*args):
        return {
            n: replace(h, word=NOT_HELPED if n == classes[no] else HELPED)
            for n, h in helped(*args).items()
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "choose", one)
        patch.setattr(choosing, "help_by_class", words)
        go(config, root)
    return SimpleNamespace(config=config, run=run, no=no, classes=classes)


def test_every_round_is_matched_and_takes_what_was_chosen(whole):
    config, run = whole.config, whole.run
    for n in (1, 2):
        chosen = ratio.read(run, n)
        assert parity_check.check(config, run, n)["added_by_class"] == next(
            row["added_by_class"] for row in chosen["ratios"] if row["ratio"] == chosen["chosen"]
        )
        for arm in retrained(config):
            asked = files.read_json(run.arm(n, arm) / "mix" / step_folder.RECIPE)["config"]
            assert asked["synthetic_ratio"] == chosen["chosen"] and "ratios" not in asked
    assert (
        ratio.read(run, 1)["chosen"] == 0.05
        and sum(parity_check.check(config, run, 1)["added_by_class"]) > 0
    )


def test_the_trial_of_the_chosen_ratio_is_the_arms_classifier_to_the_bit(whole):
    for n in (1, 2):
        at = ratio.folder_of(whole.run, n, ratio.read(whole.run, n)["chosen"])
        assert fingerprint(at / "mix") == fingerprint(whole.run.arm(n, "guided") / "mix")
        for seed in (0, 1):
            assert fingerprint(at / f"seed-{seed}" / "classifier") == fingerprint(
                whole.run.arm(n, "guided", seed) / "classifier"
            )
        none = ratio.folder_of(
            whole.run, n, 0.0
        )  # the guided arm without its images is the real arm
        assert tables.read(none / "mix").equals(tables.read(whole.run.arm(n, "real") / "mix"))
        assert fingerprint(none / "seed-0" / "classifier") == fingerprint(
            whole.run.arm(n, "real", 0) / "classifier"
        )


def test_ratios_that_cannot_be_filled_say_what_was_reached(whole):
    rows = {row["ratio"]: row for row in ratio.read(whole.run, 1)["ratios"]}
    assert list(rows) == [0.0, 0.02, 0.05, 2.5, 5.0]
    assert (
        [rows[r]["same_as"] for r in rows] == [None, None, None, None, 2.5]
        and not rows[5.0]["filled"]
        and rows[0.05]["filled"]
    )
    assert (
        [row["seeds"] for row in rows.values()] == [2, 2, 2, 2, 0]
        and rows[5.0]["mean"] is None
        and rows[5.0]["reached"] == rows[2.5]["reached"] < 2.5
        and rows[0.0]["added"] == 0
    )
    assert not (ratio.folder_of(whole.run, 1, 5.0) / "seed-0").exists()


def test_a_stopped_class_gets_no_requests_and_no_more_images(whole, tmp_path):
    config, run = whole.config, whole.run
    stop = ratio.read(run, 1)["stopped"]
    assert list(stop) == [whole.classes[whole.no]] and stop[whole.classes[whole.no]]["since"] == 2
    most = stop[whole.classes[whole.no]]["most"]
    assert most == step_folder.manifest(run.arm(1, "guided") / "mix")["added_by_class"][whole.no]
    assert parity_check.check(config, run, 2)["added_by_class"][whole.no] <= most
    assert max(row["added_by_class"][whole.no] for row in ratio.read(run, 2)["ratios"]) <= most
    assert files.read_json(ratio.folder_of(run, 2, 5.0) / "mix" / step_folder.RECIPE)["config"][
        "most"
    ] == {str(whole.no): most}
    by = pipeline_folders.attacked_in(config, run, 2), pipeline_folders.trained_in(config, 2)
    name = run_folder.run_id(loop.recipe_of(config))
    planning.plan(
        run.round(2, "hard"), None, name, 2, config.mix.arms, config.generate, tmp_path / "all", by
    )
    every, planned = (
        tables.read(f).to_pylist() for f in (tmp_path / "all", run.round(2, "requests"))
    )
    assert planned == [r for r in every if r["label"] != whole.no]


def test_the_summary_tells_the_choice(whole):
    summary = json.loads(whole.run.summary.read_text())
    assert {n: r["chosen"] for n, r in summary["ratio"].items()} == {
        str(n): ratio.read(whole.run, n)["chosen"] for n in (1, 2)
    }
    assert all(
        {"rule", "ratios", "stopped", "classes", "bar", "best"} <= r.keys()
        for r in summary["ratio"].values()
    )
    name = whole.classes[whole.no]
    notes = "\n".join(summary["notes"])
    assert (
        f"from round 2 on {name} gets no more images" in notes
        and "the ratio was tuned for guided on select" in notes
    )
    assert "round 1: there were images for a ratio of" in notes
    spent = summary["cost"]
    searched = sum(
        step_folder.manifest(ratio_folders(whole.run, n)[0])["device_seconds"] for n in (1, 2)
    )
    assert searched > 0 and spent["guided"]["device_seconds"] > searched
    assert all(
        f"round-00{n}/ratio/{step}" in summary["seconds"]
        for n in (1, 2)
        for step in ("search", "choice")
    )


def test_nothing_is_left_to_do(whole):
    assert all(s.is_finished for s in stages(whole.config, whole.run))
    assert loop.run(whole.config, whole.run, LocalEngine(1, 1), told) is None


def test_ratio_zero_is_a_result_and_the_notes_say_why(tmp_path):
    run, config = RunDir(tmp_path), check({"mix": {"synthetic_ratio": "auto"}, "rounds": 1}, "x")
    row = {"same_as": None, "filled": True, "reached": 0.0, "added": 0}
    rows = [
        row | {"ratio": 0.0, "mean": 0.7, "se": 0.02},
        row | {"ratio": 1.0, "mean": 0.71, "se": 0.03, "reached": 1.0},
    ]
    for best, mean, why in (
        (
            1.0,
            0.71,
            "ratio 0 has a balanced accuracy of 0.700, the best, ratio 1, 0.710 with a "
            "standard error of 0.030",
        ),
        (0.0, 0.69, "no other ratio was better than 0.700 of balanced accuracy"),
    ):
        rows[1]["mean"] = mean
        choice_files(run, {"chosen": 0.0, "best": best, "ratios": rows, "stopped": {}})
        assert ratio.notes(config, run)[0] == (
            f"round 1: ratio 0 was chosen on select: no synthetic image enters training; {why}"
        )
    choice_files(run, {"chosen": 0.0, "best": 0.0, "ratios": rows[:1], "stopped": {}})
    assert ratio.notes(config, run)[0].endswith("enters training; there was none to try")
    assert ratio.notes(config, RunDir(tmp_path / "elsewhere")) == []
