"""`watch` and `runs` on this machine, and what `--cluster`'s options refuse. No Ray, no cluster."""

from __future__ import annotations

import threading
import time

import pytest

from adversa.pipeline import loop
from adversa.run import file_lock, status


@pytest.fixture
def run(tiny, tmp_path):
    """A run folder that nobody works on."""
    return loop.open_run(tiny(), tmp_path / "runs" / "one")


def test_runs_lists_what_a_folder_holds(adversa, run, tmp_path):
    status.set_status(run, "stopped", "train")
    (tmp_path / "runs" / "no-run").mkdir()
    done = adversa("runs", tmp_path / "runs")
    assert (
        done.exit_code == 0
        and "stopped" in done.output
        and "train" in done.output
        and " s ago" in done.output
    )
    assert "no-run" not in done.output and done.output.count("\n") == 2


def test_a_run_whose_process_is_gone_is_listed_as_killed(adversa, run):
    status.set_status(run, "running", "train")
    assert "killed" in adversa("runs", run.root.parent).output


def test_runs_of_a_folder_without_any(adversa, tmp_path):
    assert adversa("runs", tmp_path).output == f"no run in {tmp_path}\n"
    done = adversa("runs", tmp_path / "nothing")
    assert done.exit_code == 2 and f"no folder {tmp_path / 'nothing'}" in done.output.replace(
        "\n", ""
    )


def test_watching_lasts_as_long_as_somebody_works(adversa, run):
    begun = threading.Event()

    def work():
        with file_lock.lock(run):
            status.set_status(run, "running", "prepare")
            begun.set()
            time.sleep(2)
            status.set_status(run, "finished")

    worker = threading.Thread(target=work)
    worker.start()
    assert begun.wait(10)
    started = time.monotonic()
    done = adversa("watch", run.root)
    worker.join()
    assert done.exit_code == 0 and "prepare" in done.output and 1 < time.monotonic() - started < 30


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_watching_what_nobody_works_on_shows_it_and_says_so_by_its_exit_code(adversa, run, state):
    status.set_status(run, state)
    done = adversa("watch", run.root)
    assert done.exit_code == 1 and state in done.output


@pytest.mark.parametrize(
    "words, said",
    [
        (["loop", "--up"], "--up goes with --cluster FILE"),
        (
            ["runs", "s3://KEY:SECRET@bucket/x"],
            "s3://bucket/x: an address must not carry credentials",
        ),
        (["loop", "s3://KEY:SECRET@bucket/x"], "s3:/***@bucket/x"),
        (["loop", "--down"], "--down goes with --cluster FILE"),
        (["loop", "--detach"], "--detach goes with --cluster FILE"),
        (["loop", "--cluster", "nothing.yaml"], "no cluster file at nothing.yaml"),
        (["runs", "here", "--cluster", "nothing.yaml"], "here beside --cluster nothing.yaml"),
        (["watch", "runs/nothing"], "runs/nothing is not a run"),
    ],
)
def test_what_does_not_go_together_is_one_line(adversa, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    done = adversa(*words)
    assert done.exit_code == 2 and said in done.output


def test_a_relative_place_without_storage_is_refused_before_anything_is_asked(
    adversa, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(
        "cluster_name: c\nprovider: {type: local, head_ip: 192.0.2.9, worker_ips: []}\n"
    )
    done = adversa("loop", "--cluster", "c.yaml", "--run-dir", "mine")
    assert (
        done.exit_code == 2
        and "--run-dir mine is relative, and the cluster file names no run_storage" in done.output
    )
