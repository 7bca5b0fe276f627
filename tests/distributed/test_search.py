"""Trials on Ray Tune: concurrency, order, faults, workers that die; the same table as the local
engine's.
"""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import pytest

from adversa.config import Cluster
from adversa.engine import resources
from adversa.engine.interface import Trial
from adversa.engine.local import LocalEngine
from adversa.engine.step import run_step
from adversa.pipeline import loop
from adversa.run import control, step_folder
from adversa.run.control import NULL_HANDLE
from adversa.storage import files
from adversa.sweep import run as sweep_run
from adversa.types import UserError

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def work(out, seconds, engine, tell):
    began = time.time()

    def body(progress):
        time.sleep(seconds)
        return {
            "rows": 1,
            "pid": os.getpid(),
            "began": began,
            "ended": time.time(),
            "threads": engine.training_threads,
        }

    run_step(out, step_folder.Recipe("test", 1, {}, {}), body, NULL_HANDLE)


def trials(root, count, seconds, *needs):
    return [
        Trial(f"{root.name}{i}", root / str(i), partial(work, root / str(i), seconds), needs)
        for i in range(count)
    ]


def made(trial):
    return step_folder.manifest(trial.out)


def meet(out, other, engine, tell):
    """Ends when the other trial has begun too."""
    out.parent.mkdir(parents=True, exist_ok=True)
    (out.parent / f"{out.name}-begun").touch()
    until = time.time() + 120
    while not (other.parent / f"{other.name}-begun").exists():
        assert time.time() < until, "never two at a time"
        time.sleep(0.1)
    work(out, 0.1, engine, tell)


def test_two_actors_are_used_again_and_again_and_what_waits_comes_later(ray_engine, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    first = [Trial("a", a, partial(meet, a, b)), Trial("b", b, partial(meet, b, a))]
    rest = trials(tmp_path / "c", 5, 1.0, a, b)
    told = []
    ray_engine.search([*rest, *first], told.append)
    ended = max(made(t)["ended"] for t in first)
    assert all(made(t)["began"] >= ended and made(t)["threads"] == 1 for t in rest)
    actors = {made(t)["pid"] for t in first}
    assert len(actors) == 2 and {made(t)["pid"] for t in rest} <= actors
    assert told[-1]["done"] == 7 and max(len(t["running"]) for t in told) == 2
    before = [t.out.stat().st_mtime_ns for t in rest]
    ray_engine.search([*rest, *first], told.append)
    assert before == [t.out.stat().st_mtime_ns for t in rest]


def failing(engine, tell):
    raise UserError("classifier.lr 9: too large; take less")


def test_what_a_user_can_mend_is_one_line_and_the_others_are_done(ray_engine, tmp_path):
    good = trials(tmp_path / "a", 2, 0.1)
    bad = Trial("bad", tmp_path / "bad", failing)
    waiting = trials(tmp_path / "w", 1, 0.1, bad.out)
    with pytest.raises(
        UserError,
        match=r"1 of 4 trials failed; 1 more wait .* the first, bad: classifier.lr 9: too large",
    ) as found:
        ray_engine.search([bad, *good, *waiting], lambda _: None)
    assert "\n" not in str(found.value) and all(step_folder.is_finished(t.out) for t in good)


def faulty(engine, tell):
    raise RuntimeError("a fault of ours")


def test_a_fault_of_ours_comes_home_as_one(ray_engine, tmp_path):
    with pytest.raises(Exception, match="a fault of ours") as found:
        ray_engine.search([Trial("bad", tmp_path / "bad", faulty)], lambda _: None)
    assert not isinstance(found.value, UserError)


def dying(out, engine, tell):
    out.mkdir(parents=True, exist_ok=True)
    if len(list(out.parent.glob("died-*"))) < 1:
        (out.parent / f"died-{os.getpid()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    work(out, 0.1, engine, tell)


def test_a_lane_whose_process_is_killed_does_its_trial_again(ray_engine, tmp_path):
    others = trials(tmp_path / "a", 2, 0.1)
    ray_engine.search(
        [Trial("dies", tmp_path / "x" / "out", partial(dying, tmp_path / "x" / "out")), *others],
        lambda _: None,
    )
    assert len(list((tmp_path / "x").glob("died-*"))) == 1 and step_folder.is_finished(
        tmp_path / "x" / "out"
    )


def test_a_pause_lets_what_is_in_flight_end(ray_engine, tmp_path, monkeypatch):
    paused = []

    class Paused(control.NullHandle):
        def poll(self, force=False):
            if any(step_folder.is_finished(t.out) for t in asked):
                paused.append(1)
                raise control.Pause

    asked = trials(tmp_path / "a", 6, 2.0)
    monkeypatch.setattr(ray_engine, "handle", Paused())
    with pytest.raises(control.Pause):
        ray_engine.search(asked, lambda _: None)
    done = [t for t in asked if step_folder.is_finished(t.out)]
    assert (
        paused
        and 1 <= len(done) < 6
        and all(step_folder.is_finished(t.out) or not t.out.exists() for t in asked)
    )
    monkeypatch.undo()
    ray_engine.search(asked, lambda _: None)
    assert all(step_folder.is_finished(t.out) for t in asked)


def test_concurrency_on_cpus_and_on_gpus():
    eight, four = (
        [resources.Node("a", 8)],
        [resources.Node("head", 64), *(resources.Node(f"w{i}", 4, 1) for i in range(4))],
    )
    assert (
        resources.trial_asks(Cluster(), 0) == {"cpu": 1.0}
        and resources.trials_at_once(Cluster(), eight) == 8
    )
    assert (
        resources.trials_at_once(Cluster(training_threads=4), eight) == 2
        and resources.trials_at_once(Cluster(trials=3), eight) == 3
    )
    assert (
        resources.trial_asks(Cluster(), 4) == {"gpu": 1.0, "cpu": 1.0}
        and resources.trials_at_once(Cluster(), four) == 4
    )
    assert resources.trials_at_once(Cluster(gpus_per_trial=0.5), four) == 8
    assert resources.trials_at_once(Cluster(training_workers=2), eight) == 1


def page(config, run):
    return run.root / "sweep.html"


def test_ray_and_local_have_the_same_table(ray_engine, swept, tiny_sweep, tmp_path):
    config = tiny_sweep()
    run = sweep_run.open_run(config, tmp_path / "run")
    sweep_run.run(config, run, ray_engine, page)
    rows = [
        sweep_run.table(*x).drop_columns(["device_seconds", "wall_seconds"])
        for x in ((config, run), swept)
    ]
    assert rows[0].equals(rows[1])


def test_trials_of_several_workers_are_launches_of_ray_train(
    ray_engine, tiny_sweep, tmp_path, monkeypatch
):
    many = Cluster(cpus=2, object_store_mb=200, training_threads=1, training_workers=2)
    monkeypatch.setattr(ray_engine, "cluster", many)
    config = tiny_sweep(
        real=[2], ratios=[0, 1], arms=["replay"], keep_models=True, cluster=many.model_dump()
    )
    run = sweep_run.open_run(config, tmp_path / "run")
    sweep_run.run(config, run, ray_engine, page)
    assert len(sweep_run.table(config, run)) == 2
    for point in sweep_run.grid.points(config):
        made = step_folder.manifest(sweep_run.grid.trial_dir(run, point) / "classifier")
        assert made["workers"] == 2 and made["rows"] == 12 * 32


def test_the_loop_chooses_the_same_ratio_on_ray(ray_engine, tiny, tmp_path):
    config = tiny(
        mix={"arms": ["real", "replay"], "synthetic_ratio": "auto", "ratios": [0, 0.1, 0.2]},
        cluster={"cpus": 2},
    )
    chosen = []
    for name, engine in (("ray", ray_engine), ("local", LocalEngine(1, 1))):
        run = loop.open_run(config, tmp_path / name)
        loop.run(config, run, engine, page, until="evaluate")
        assert step_folder.is_finished(
            run.round(1, "ratio") / "choice"
        ) and step_folder.is_finished(run.round(1, "evaluate"))
        chosen.append(files.read_json(run.round(1, "ratio") / "choice" / "choice.json"))
    assert chosen[0] == chosen[1] and chosen[0]["chosen"] in (0, 0.1, 0.2)
