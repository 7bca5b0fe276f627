"""Metrics followed into TensorBoard (for real), MLflow and W&B (fakes in their place); nothing
imported unless asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types

import pytest

from adversa.run import tracking
from adversa.types import UserError


@pytest.fixture
def run(tmp_path):
    root = tmp_path / "run"
    write(root / "denoiser", range(1, 3))
    return root


def write(folder, steps, torn=""):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": s, "loss": 10.0 / s, "lr": 1e-3, "init": "scratch"} for s in steps]
    (folder / tracking.METRICS).write_text("".join(json.dumps(r) + "\n" for r in rows) + torn)


def scalars(root, name, key="loss"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "tracking" / "tensorboard" / name))
    events.Reload()
    return [(e.step, pytest.approx(e.value)) for e in events.Scalars(key)]


def test_tensorboard_has_every_training_and_line_once(run):
    write(run / "round-000" / "real" / "seed-0" / "classifier", [5])
    with tracking.Follow(["tensorboard"], run):
        pass
    assert scalars(run, "denoiser") == [(1, 10.0), (2, 5.0)]
    assert scalars(run, "round-000/real/seed-0/classifier") == [(5, 2.0)]
    with tracking.Follow(["tensorboard"], run):
        pass
    assert scalars(run, "denoiser") == [(1, 10.0), (2, 5.0)]


def test_steps_stay_monotone_where_a_training_resumes(run):
    """A training cut off at step 4 goes on from step 2 and writes 3 and 4 again: none of them is
    sent twice.
    """
    write(run / "denoiser", [1, 2, 3, 4])
    with tracking.Follow(["tensorboard"], run):
        pass
    write(run / "denoiser", [1, 2])
    with tracking.Follow(["tensorboard"], run) as follow:
        follow.poll()
        write(run / "denoiser", [1, 2, 3])
        follow.poll()
        write(run / "denoiser", [1, 2, 3, 4, 5])
    assert [step for step, _ in scalars(run, "denoiser")] == [1, 2, 3, 4, 5]


def test_lines_of_one_step_are_all_sent(run):
    rows = [
        {"step": 50, "loss": 0.5},
        {"step": 50, "validation_loss": 0.7},
        {"step": 100, "loss": 0.4},
    ]
    path, sent = run / "denoiser" / tracking.METRICS, []
    for known in (1, 2, 3, 3):  # the second line of the step comes later than the first, or with it
        path.write_text("".join(json.dumps(r) + "\n" for r in rows[:known]))
        sent += follow_once(run)
    assert sent == [
        ("denoiser", r["step"], {k: v for k, v in r.items() if k != "step"}) for r in rows
    ]


def test_a_training_begun_afresh_is_sent_whole_and_under_a_name_of_its_own(run):
    assert [s[:2] for s in follow_once(run)] == [("denoiser", 1), ("denoiser", 2)]
    path = run / "denoiser" / tracking.METRICS
    path.write_text("")  # a resumed training that has no line yet
    assert follow_once(run) == []
    path.write_text(
        '{"step": 1, "loss": 9.0}\n'
    )  # another training, not as far yet as the first one was
    assert follow_once(run) == [("denoiser-2", 1, {"loss": 9.0})]
    path.write_text(
        '{"step": 1, "loss": 9.0}\n{"step": 2, "loss": 8.0}\n{"step": 3, "loss": 7.0}\n'
    )
    assert [s[:2] for s in follow_once(run)] == [
        ("denoiser-2", 2),
        ("denoiser-2", 3),
    ] and follow_once(run) == []
    write(run / "denoiser", [1])
    assert [s[:2] for s in follow_once(run)] == [("denoiser-3", 1)]


def follow_once(root):
    """What one command that follows the run sends, going by what the commands before it noted."""
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tracking.SINKS, "wandb", lambda root, state: Recorder(sent))
        with tracking.Follow(["wandb"], root):
            pass
    return sent


def test_a_line_being_written_waits(run):
    write(run / "denoiser", [1], torn='{"step": 2, "lo')
    assert [step for step, _ in tracking.lines(run / "denoiser" / tracking.METRICS)] == [1]


def test_only_finite_numbers_are_metrics(tmp_path):
    path = tmp_path / tracking.METRICS
    path.write_text(
        '{"step": 3, "loss": 0.5, "note": "x", "gone": null, "bad": NaN, "flag": true, "n": 2}\n'
    )
    assert list(tracking.lines(path)) == [(3, {"loss": 0.5, "n": 2.0})]


def test_lines_are_sent_while_the_run_goes_on(run, monkeypatch):
    monkeypatch.setattr(tracking, "SECONDS", 0.01)
    sent = []
    monkeypatch.setitem(tracking.SINKS, "tensorboard", lambda root, state: Recorder(sent))
    with tracking.Follow(["tensorboard"], run):
        until = time.monotonic() + 30
        while len(sent) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert [s[:2] for s in sent] == [("denoiser", 1), ("denoiser", 2)]


class Recorder:
    def __init__(self, sent, fails_at=None):
        self.sent, self.fails_at = sent, fails_at

    def send(self, name, step, values):
        if step == self.fails_at:
            raise ConnectionError("no route to host")
        self.sent.append((name, step, values))

    def flush(self): ...

    def close(self): ...


def test_a_service_that_fails_ends_no_run_and_gets_the_rest_later(run, monkeypatch, caplog):
    sent, other = [], []
    monkeypatch.setitem(tracking.SINKS, "mlflow", lambda root, state: Recorder(sent, fails_at=2))
    monkeypatch.setitem(tracking.SINKS, "wandb", lambda root, state: Recorder(other))
    with tracking.Follow(["mlflow", "wandb"], run):
        pass
    assert "mlflow failed" in caplog.text and "no route to host" in caplog.text
    assert [s for _, s, _ in sent] == [1] and [s for _, s, _ in other] == [1, 2]
    monkeypatch.setitem(tracking.SINKS, "mlflow", lambda root, state: Recorder(sent))
    with tracking.Follow(["mlflow"], run):
        pass
    assert [s for _, s, _ in sent] == [1, 2]


def test_mlflow_gets_a_run_for_each_training_and_goes_on_with_it(run, monkeypatch):
    calls = []

    class Client:
        def __init__(self, tracking_uri):
            self.uri = tracking_uri

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return "7"

        def create_run(self, experiment, tags):
            calls.append(("create", experiment, tags["mlflow.runName"], self.uri))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="id-1"))

        def log_metric(self, run_id, key, value, step):
            calls.append((run_id, key, value, step))

        def set_terminated(self, run_id):
            calls.append(("end", run_id))

    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Client))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with tracking.Follow(["mlflow"], run):
        pass
    local = f"sqlite:///{run}/tracking/mlflow/mlflow.db"
    first = [
        ("id-1", "loss", 10.0, 1),
        ("id-1", "lr", 1e-3, 1),
        ("id-1", "loss", 5.0, 2),
        ("id-1", "lr", 1e-3, 2),
    ]
    assert calls == [("create", "7", "run/denoiser", local), *first, ("end", "id-1")]
    calls.clear()
    write(run / "denoiser", [1, 2, 5])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    with tracking.Follow(["mlflow"], run):
        pass
    assert calls == [("id-1", "loss", 2.0, 5), ("id-1", "lr", 1e-3, 5), ("end", "id-1")]


@pytest.mark.parametrize(
    ("environment", "mode"),
    [({}, "offline"), ({"WANDB_API_KEY": "k"}, None), ({"WANDB_MODE": "online"}, None)],
)
def test_wandb_is_offline_unless_told_otherwise(run, monkeypatch, environment, mode):
    started, logged, metrics, ended = [], [], [], []
    fake = types.SimpleNamespace(
        define_metric=lambda pattern, step_metric: metrics.append((pattern, step_metric)),
        log=logged.append,
        finish=lambda: ended.append(True),
    )
    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=lambda **kw: started.append(kw) or fake)
    )
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        with tracking.Follow(["wandb"], run):
            pass
    assert [s["mode"] for s in started] == [mode] and started[0]["dir"] == str(run / "tracking")
    assert metrics == [("denoiser/*", "denoiser/step")] and ended == [True]
    assert logged == [
        {"denoiser/step": s, "denoiser/loss": 10.0 / s, "denoiser/lr": 1e-3} for s in (1, 2)
    ]


@pytest.mark.parametrize(
    ("service", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow"), ("wandb", "wandb")],
)
def test_a_missing_package_stops_the_run_before_any_work(
    tiny, tmp_path, monkeypatch, service, module
):
    from adversa.pipeline import loop

    monkeypatch.setitem(sys.modules, module, None)  # importing it now raises ImportError
    config = tiny(tracking=[service])
    run = loop.open_run(config, tmp_path / "run")
    with pytest.raises(UserError, match=f"tracking: {service} .*pip install {service}"):
        loop.run(config, run, None, None)
    assert not run.data.exists()


def test_tracking_is_no_part_of_what_a_run_is(tiny):
    from adversa.pipeline import loop

    assert loop.recipe_of(tiny(tracking=["tensorboard"])) == loop.recipe_of(tiny())


def test_nothing_is_imported_or_written_unless_asked(run):
    code = (
        "import sys; from pathlib import Path; from adversa.run import tracking\n"
        f"with tracking.Follow([], Path({str(run)!r})): pass\n"
        "print([m for m in ('tensorboard', 'mlflow', 'wandb', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and not (run / "tracking").exists()


def test_a_training_of_the_loop_is_followed(tiny, tmp_path, monkeypatch):
    """Through the cycle itself, on the local engine: what metrics.jsonl says of each training is
    what was sent.
    """
    from adversa.engine.local import LocalEngine
    from adversa.pipeline import loop

    sent = []
    monkeypatch.setitem(tracking.SINKS, "wandb", lambda root, state: Recorder(sent))
    config = tiny(
        tracking=["wandb"],
        mix={"arms": ["real"]},
        classifier={"steps": 4},
        data={"phantom": {"images": 100}},
    )
    run = loop.open_run(config, tmp_path / "run")
    loop.run(config, run, LocalEngine(1, 1), lambda root: root, "train")
    lines = (run.arm(0, "real", 0) / "classifier" / tracking.METRICS).read_text().splitlines()
    assert [(n, s) for n, s, _ in sent] == [
        ("round-000/real/seed-0/classifier", json.loads(x)["step"]) for x in lines
    ] and lines
