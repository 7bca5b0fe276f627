"""The commands: exit codes, one line for what is fixable by the user, stages on one run folder, and
how little `--help` loads.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import typer
import yaml

from adversa.cli.options import exits
from adversa.pipeline import prepare
from adversa.run import create as run_create
from adversa.run import file_lock, step_folder
from adversa.run.folder import RunDir
from adversa.types import UserError

MICRO = {
    "data": {"source": "phantom", "resolution": 32, "part_rows": 64, "phantom": {"images": 120}},
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
        "weights": None,
        "steps": 4,
        "batch_size": 8,
        "checkpoint_steps": 2,
    },
    "mine": {"budget": 4},
    "generate": {"per_case": 1, "steps": 2, "batch_size": 8},
    "curate": {"min_agreement": 0.0},
    "evaluate": {"bootstrap": 100},
    "cluster": {"training_threads": 1},
}


@pytest.fixture
def micro(tmp_path):
    path = tmp_path / "micro.yaml"
    path.write_text(yaml.safe_dump(MICRO))
    return path


def mendable(result, *parts):
    """Exit code 2 and one line on stderr that holds all the parts."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr
    return result.stderr


def times(root):
    changing = ("clock.json", ".lock", "status.json")
    return {
        p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name not in changing
    }


def loaded(*args):
    """Heavy packages in a process that ran a command."""
    code = (
        "import sys\nfrom adversa.cli.app import app\ntry:\n    app(sys.argv[1:])\nexcept "
        "SystemExit as e:\n    code = e.code\n"
    )
    code += "heavy = ('torch', 'ray', 'pyarrow', 'timm', 'diffusers', 'sklearn')\n"
    code += "print([m for m in heavy if m in sys.modules], code, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=60
    )
    return done.stderr.strip().splitlines()[-1]


# ---- what is loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["loop", "--help"], ["config", "show"]])
def test_help_loads_nothing_heavy(args):
    assert loaded(*args) == "[] 0"


def test_status_needs_neither_torch_nor_ray(tmp_path):
    run_create.open_run(tmp_path / "run", {}, "seed: 0\n")
    assert loaded("status", tmp_path / "run") == "['pyarrow'] 0"


def test_several_workers_in_this_process_are_refused_before_there_is_a_run(
    adversa, micro, tmp_path
):
    words = (
        "loop",
        micro,
        "--engine",
        "local",
        "--run-dir",
        tmp_path / "run",
        "--set",
        "cluster.training_workers=2",
    )
    mendable(
        adversa(*words),
        "cluster.training_workers 2: --engine local trains in this process alone; set 1, "
        "or use --engine ray",
    )
    assert not (tmp_path / "run").exists()


# ---- the run folder, stage by stage --------------------------------------------------------------


def test_stage_commands_bring_one_folder_to_its_end(adversa, micro, tmp_path):
    root = tmp_path / "run"
    run = RunDir(root)
    made = {
        "prepare": run.data,
        "train": run.arm(0, "real", 0) / "classifier",
        "mine": run.round(1, "hard"),
        "generate": run.round(1, "synthetic"),
        "curate": run.round(1, "verdicts"),
        "evaluate": run.round(1, "evaluate"),
    }
    for i, (command, folder) in enumerate(made.items()):
        # The first command is given the configuration; the others go on with the run's own.
        result = adversa(
            command, *([micro] if i == 0 else []), "--engine", "local", "--run-dir", root
        )
        assert result.exit_code == 0, (command, result.output, result.exception)
        assert f"{command} is done in {root}" in result.output
        assert step_folder.is_finished(folder)
        later = list(made.values())[i + 1 :]
        assert not any(
            step_folder.is_finished(f) for f in later
        )  # not a stage more than was asked for
        status = adversa("status", root)
        assert status.exit_code == 0 and "stopped" in status.output.splitlines()[0]
        assert sum(line.startswith("done") for line in status.output.splitlines()) == i + 1

        before = times(root)
        again = adversa(command, "--engine", "local", "--run-dir", root)
        assert again.exit_code == 0 and f"{command}: nothing left to do" in again.output
        assert times(root) == before
    mendable(
        adversa("report", "--run-dir", root),
        "test is next",
        f"adversa loop {run.config} --run-dir {root}",
    )
    assert not run.test.exists()

    assert adversa("loop", run.config, "--engine", "local", "--run-dir", root).exit_code == 0
    assert run.summary.exists() and step_folder.is_finished(run.test)
    status = adversa("status", "--run-dir", root)
    assert "finished" in status.output.splitlines()[0] and "to do" not in status.output

    before = times(root)
    again = adversa("loop", micro, "--engine", "local", "--run-dir", root)
    assert again.exit_code == 0 and "guided (after)" in again.output and times(root) == before

    (root / "report.html").unlink()
    result = adversa("report", "--run-dir", root)
    assert result.exit_code == 0 and result.output.strip() == str(root / "report.html")
    assert (root / "report.html").stat().st_size > 10_000
    assert adversa("report", root).exit_code == 0


def test_a_refused_run_folder_lists_the_fields_and_changes_nothing(adversa, micro, tmp_path):
    root = tmp_path / "run"
    assert adversa("train", micro, "--engine", "local", "--run-dir", root).exit_code == 0
    before = times(root)
    result = adversa(
        "loop", micro, "--engine", "local", "--run-dir", root, "--set", "mine.budget=9", "--seed", 4
    )
    mendable(result, "mine.budget: 4 -> 9", "seed: 0 -> 4", "another --run-dir")
    assert times(root) == before
    assert (
        adversa(
            "prepare", micro, "--engine", "local", "--run-dir", root, "--set", "cluster.samplers=3"
        ).exit_code
        == 0
    )


def test_a_run_in_use_is_refused(adversa, micro, tmp_path):
    root = tmp_path / "run"
    assert adversa("prepare", micro, "--engine", "local", "--run-dir", root).exit_code == 0
    with file_lock.lock(RunDir(root)):
        mendable(
            adversa("loop", micro, "--engine", "local", "--run-dir", root),
            "in use by process",
            str(os.getpid()),
        )


# ---- what is fixable by the user -----------------------------------------------------------------


def test_an_unknown_key_is_named_with_the_nearest(adversa, micro):
    args = ("--set", "data.resolutoin=64")
    for command in (("loop", micro, "--engine", "local"), ("config", "check", micro)):
        mendable(
            adversa(*command, *args), "unknown key data.resolutoin; did you mean data.resolution?"
        )


def test_config_check_tells_of_a_model_that_cannot_take_the_images(adversa):
    small = ("--set", "data.resolution=16", "--set", "denoiser.weights=null")
    small += ("--set", "denoiser.patch=2")
    model = "{model: convnext_atto, model_args: {}}"
    check = ("config", "check", *small)
    for key, said in {"classifier": "classifier.model", "curate.judge": "the verifier"}.items():
        told = adversa(*check, "--set", "classifier.input_size=32", "--set", f"{key}={model}")
        mendable(told, said, "cannot take images of 16 px")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["loop", "none.yaml"], ["none.yaml", "give a YAML file"]),
        (["loop", "--engine", "spark"], ["spark", "use ray or local"]),
        (["loop", "--rounds", "0"], ["rounds = 0"]),
        (["loop", "--seed", "-1"], ["seed = -1"]),
        (["loop", "--set", "data.source=folder"], ["data.path is missing"]),
        (["loop", "--set", "oops"], ["oops", "write key.sub=value"]),
        (["status", "nowhere"], ["nowhere is not a run"]),
        (["report", "--run-dir", "nowhere"], ["nowhere is not a run"]),
        (["status", "here", "--run-dir", "there"], ["here", "there", "give one"]),
    ],
)
def test_mistakes_on_the_command_line(adversa, tmp_path, monkeypatch, args, parts):
    monkeypatch.chdir(tmp_path)
    mendable(adversa(*args), *parts)
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_printed_word_for_word(adversa, tmp_path):
    mendable(adversa("status", tmp_path / "[red]:bug:[/]"), "[red]:bug:[/] is not a run")


def test_an_error_has_all_that_was_added_on_its_way_and_no_password(capsys):
    @exits
    def failing():
        error = UserError("s3://key:secret@host/x cannot be read")
        error.add_note("status.json could not be written either")
        raise error

    with pytest.raises(typer.Exit) as ended:
        failing()
    told = "error: s3://***@host/x cannot be read; status.json could not be written either\n"
    assert (ended.value.exit_code, capsys.readouterr().err) == (2, told)


def test_config_show_prints_what_config_reads(adversa, micro, tmp_path):
    shown = adversa("config", "show", micro, "--set", "seed=9")
    assert shown.exit_code == 0 and yaml.safe_load(shown.output)["seed"] == 9
    (tmp_path / "resolved.yaml").write_text(shown.output)
    again = adversa("config", "show", tmp_path / "resolved.yaml").output
    assert yaml.safe_load(again) == yaml.safe_load(shown.output)
    assert "valid" in adversa("config", "check", micro).output


# ---- our own faults, and being stopped -----------------------------------------------------------


def breaking(monkeypatch, action):
    monkeypatch.setattr(prepare, "prepare", lambda *_: action())


def test_a_fault_of_ours_exits_with_1_and_status_tells(adversa, micro, tmp_path, monkeypatch):
    def fault():
        raise RuntimeError("a bug\nof ours")

    breaking(monkeypatch, fault)
    result = adversa("loop", micro, "--engine", "local", "--run-dir", tmp_path / "run")
    assert result.exit_code == 1 and isinstance(result.exception, RuntimeError)
    shown = adversa("status", tmp_path / "run").output
    assert "failed" in shown.splitlines()[0] and "a bug of ours" in shown


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_keeps_what_is_finished_and_tells_how_to_resume(
    adversa, micro, tmp_path, monkeypatch, number, code
):
    def stop():
        os.kill(os.getpid(), number)
        time.sleep(5)

    root = tmp_path / "run"
    args = ["prepare", str(micro), "--engine", "local", "--run-dir", str(root)]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/adversa", *args])
    before = signal.getsignal(signal.SIGTERM)
    # A shell that starts the tests in the background has told them to ignore Ctrl-C.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as m:
            breaking(m, stop)
            result = adversa(*args)
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert result.exit_code == code
    assert f"Resume with: adversa {' '.join(args)}\n" in result.output
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopped" in adversa("status", root).output.splitlines()[0]
    assert adversa(*args).exit_code == 0
