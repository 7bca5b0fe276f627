"""A sweep as an ordinary search of Ray Tune: the trainable, a space that is extended, schedulers
and searchers by name.
"""

from __future__ import annotations

import pytest
from ray import tune

from adversa.config import Search
from adversa.distributed import explore, trainable
from adversa.pipeline import precision, prepare
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.sweep import grid
from adversa.sweep import run as sweep_run
from adversa.types import UserError

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def prepared(tiny_sweep, ray_engine, tmp_path_factory):
    """(config, run) with `data` alone."""
    config = tiny_sweep(real=[2], arms=["guided"])
    run = sweep_run.open_run(config, tmp_path_factory.mktemp("explore") / "run")
    prepare.prepare(ray_engine, config.data, run.data)
    return config, run


def test_the_trainable_is_one_for_any_tuner(prepared, tmp_path):
    """With a learning rate, a guidance scale and a mix of strategies of the user's own."""
    config, run = prepared
    space = trainable.space(config) | {
        "ratio": 1.0,
        "classifier.lr": tune.grid_search([1e-3, 4e-3]),
        "generate.guidance": 1.5,
        "strategies": {"img2img": 0.5, "sample": 0.5},
    }
    tuner = tune.Tuner(
        tune.with_resources(trainable.trainable(config, run), {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(metric="score", mode="max"),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    )
    found = tuner.fit()
    assert len(found) == 2 and not found.errors
    scores = [r.metrics["score"] for r in found]
    assert all(0 <= s <= 1 for s in scores) and found.get_best_result().metrics["score"] == max(
        scores
    )
    rows = explore.rows(run.root / "search" / "own", "balanced_accuracy")
    assert sorted(r["asks"]["classifier.lr"] for r in rows) == [1e-3, 4e-3] and {
        r["state"] for r in rows
    } == {"finished"}
    pools = sorted(p.name for p in (run.root / "pools" / "0002").iterdir())
    assert (
        len(pools) == 2
        and pools[0].startswith("guided-img2img-")
        and pools[1].startswith("guided-sample-")
    )
    mixes = [p for p in (run.root / "search").rglob("mix") if p.is_dir()]
    from adversa.storage import tables

    for mix in mixes:
        ids = [
            r["id"]
            for r in tables.read(mix, schema=tables.MIX).to_pylist()
            if r["kind"] == "synthetic"
        ]
        whose = [
            set(i for i, _ in sweep_run.accepted(run.root / "pools" / "0002" / name))
            for name in pools
        ]
        shares = [sum(i in w for i in ids) for w in whose]
        assert ids and sum(shares) == len(ids) and min(shares) > 0


def test_the_same_configuration_is_not_trained_twice_and_says_the_same_again(prepared, monkeypatch):
    config, run = prepared
    asks = {"real": 2, "ratio": 1.0, "arm": "replay", "seed": 0}
    told: list[dict] = []
    first = trainable.carry_out(config, run, asks, 1, told.append, run.root / "search" / "own")
    assert [t["step"] for t in told] == [6] and 0 <= told[-1]["score"] <= 1 and first["step"] == 12
    monkeypatch.setattr(sweep_run, "fit_and_score", lambda *_: pytest.fail("it was trained again"))
    again: list[dict] = []
    assert (
        trainable.carry_out(config, run, asks, 1, again.append, run.root / "search" / "own")
        == first
        and again == told
    )


def test_settings_of_a_trial_that_are_wrong_are_one_line(prepared, tmp_path):
    config, run = prepared
    with pytest.raises(
        UserError,
        match=r"classifier.rate: no such setting; a trial takes real, ratio, .* or generate.NAME",
    ):
        trainable.resolve(config, {"classifier.rate": 1})
    with pytest.raises(UserError, match=r"the trial: classifier.lr = -1"):
        trainable.resolve(config, {"classifier.lr": -1})
    with pytest.raises(
        UserError, match=r"trial: ratio 3 does not lie in 0 ... 2, the largest of sweep.ratios"
    ):
        trainable.carry_out(config, run, {"real": 2, "ratio": 3}, 1, print, tmp_path)
    with pytest.raises(UserError, match="strategies: smudge is no strategy"):
        trainable.carry_out(
            config,
            run,
            {"real": 2, "ratio": 1.0, "arm": "guided", "strategies": {"smudge": 1.0}},
            1,
            print,
            tmp_path,
        )


@pytest.mark.parametrize("scheduler", ["fifo", "asha"])
def test_a_search_by_names_ends_and_goes_on(ray_engine, tiny_sweep, prepared, tmp_path, scheduler):
    space = {"classifier.lr": {"loguniform": [1e-5, 1e-2]}, "ratio": {"choice": [1, 2]}}
    given = {"reduction_factor": 2} if scheduler == "asha" else {}
    search = Search(space=space, samples=4, scheduler=scheduler, scheduler_args=given)
    config = tiny_sweep(real=[2], arms=["replay"], search=search.model_dump())
    explore.check(config)
    run = sweep_run.open_run(config, tmp_path / "run")
    found = explore.run(config, run, ray_engine)
    states = [r["state"] for r in found]
    assert (
        len(found) == 4 and states.count("finished") >= 1 and set(states) <= {"finished", "stopped"}
    )
    assert scheduler == "asha" or states == ["finished"] * 4
    assert (
        explore.is_finished(config, run)
        and files.read_json(run.root / grid.SEARCHED)["role"] == "select"
    )
    rates = {r["asks"]["classifier.lr"] for r in found}
    assert (
        len(rates) == 4
        and all(1e-5 <= r <= 1e-2 for r in rates)
        and {r["asks"]["ratio"] for r in found} <= {1, 2}
    )
    before = {p: p.stat().st_mtime_ns for p in (run.root / "search").rglob("*.json")}
    (run.root / grid.SEARCHED).unlink()
    assert not explore.is_finished(config, run)
    again = explore.run(
        config, run, ray_engine
    )  # the same seed: the same trials, none of them made again
    assert again == found and before == {p: p.stat().st_mtime_ns for p in before}


def test_a_trial_has_the_precision_of_its_run(tiny_sweep, tmp_path, monkeypatch):
    config, run, given = tiny_sweep(real=[2], arms=["guided"]), RunDir(tmp_path), []
    sections = ("classifier", "generate")
    automatic = {n: getattr(config, n).model_copy(update={"amp": "auto"}) for n in sections}
    said = {"amp": True, "hardware": "a CPU", "here": "a CPU", "amp_here": True}
    files.write_json(tmp_path / precision.FILE, said)
    monkeypatch.setattr(trainable, "carry_out", lambda own, *_: given.append(own) or {})
    trainable.trainable(config.model_copy(update=automatic), run)({})
    assert given[0].classifier.amp is given[0].generate.amp is True


def test_what_tune_does_not_know_is_one_line(tiny_sweep):
    def config(_metric="balanced_accuracy", _arm="replay", **search):
        space = {"space": {"classifier.lr": {"uniform": [0.001, 0.01]}}}
        return tiny_sweep(real=[2], arms=[_arm], metric=_metric, search=space | search)

    explore.check(config())
    explore.check(
        config(space={"classifier.lr": {"loguniform": ["1e-4", "1e-2"]}})
    )  # so YAML reads 1e-4
    for search, said in (
        (
            {"searcher": "guess"},
            "sweep.search.searcher guess: The `search_alg` argument must be one of",
        ),
        ({"searcher": "bohb"}, "sweep.search.searcher bohb: .*must be installed"),
        (
            {"scheduler": "never"},
            "sweep.search.scheduler never: The `scheduler` argument must be one of",
        ),
        (
            {"space": {"classifier.lr": {"around": [1]}}},
            "sweep.search.space.classifier.lr .*: give one of choice, uniform",
        ),
        ({"space": {"classifier.lr": {"uniform": [1]}}}, "sweep.search.space.classifier.lr"),
        ({"space": {"classifier.lr": {"choice": []}}}, "give one of choice, .* and a list"),
        ({"space": {"ratio": {"quniform": [0, 1, 0]}}}, "space.ratio .*: division by zero"),
        ({"space": {"seed": {"randint": [3, 3]}}}, "space.seed .*: low >= high"),
        ({"space": {"seed": {"qrandint": [0, 9, 0]}}}, "space.seed .*: .*zero"),
        ({"space": {"classifier.steps": {"uniform": [8, 9]}}}, r"classifier.steps = 8\..*integer"),
        ({"scheduler": "pbt"}, "sweep.search.scheduler pbt: You must specify"),
        ({"scheduler": "asha", "scheduler_args": {"metric": "x"}}, "compares by sweep.metric"),
        (
            {"space": {"data.path": {"choice": [1]}}},
            "sweep.search.space.data.path: data.path: no such setting",
        ),
        (
            {"space": {"classifier.lr": {"choice": [-1]}}},
            "sweep.search.space.classifier.lr: classifier.lr = -1",
        ),
        (
            {"space": {"ratio": {"uniform": [-1, 1]}}},
            "sweep.search.space.ratio: ratio = -1: Input should be greater than or equal to 0",
        ),
        (
            {"space": {"ratio": {"choice": [1, 100]}}},
            r"sweep.search.space.ratio: ratio 100 does not lie in 0 \.\.\. 2",
        ),
        ({"space": {"seed": {"choice": [0.5]}}}, "sweep.search.space.seed: seed = 0.5"),
        (
            {"space": {"strategies": {"choice": [{"smudge": 1}]}}, "_arm": "guided"},
            "smudge is no strategy",
        ),
        (
            {"space": {"generate.strategy": {"choice": ["img2img"]}}},
            "a search does not vary it; give strategies",
        ),
        (
            {"space": {"generate.adaptive": {"choice": [True]}}},
            "a search does not vary it; give generate.sigma_start",
        ),
        ({"space": {"arm": {"choice": ["real"]}}}, "a search does not vary it; give sweep.arms"),
        ({"scheduler_args": {"graze": 1}}, "sweep.search.scheduler_args: fifo knows no graze"),
        (
            {"scheduler": "asha", "_metric": "accuracy"},
            "scheduler asha beside sweep.metric accuracy: .* only balanced_accuracy",
        ),
    ):
        with pytest.raises(UserError, match=said):
            explore.check(config(**search))
