"""The coordinator on a Ray cluster of its own, in processes: what it makes is what the local engine
makes, whoever dies.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests

from adversa.cli import view
from adversa.config import dump
from adversa.pipeline.metrics import NAMES, NUMBERS
from adversa.run import control, run_lock
from adversa.run.folder import RunDir
from adversa.storage import files

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.slow]

# A head of one node, which ends with its parent's stdin: whatever becomes of the tests, no Ray
# stays behind.
HEAD = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(True, head_node_args={
    "num_cpus": 2, "object_store_memory": 200 << 20,
    "include_dashboard": True, "dashboard_host": "127.0.0.1",
    "dashboard_port": int(sys.argv[4]),  # which Ray Train asks whether a controller has died
    "gcs_server_port": int(sys.argv[1]), "temp_dir": sys.argv[2],
    "metrics_export_port": int(sys.argv[3]),
})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def results(run):
    spec = importlib.util.spec_from_file_location(
        "kill_and_resume", ROOT / "tools" / "kill_and_resume.py"
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool.results(run)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """RAY_ADDRESS of a cluster."""
    import tempfile

    before = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "RAY_AUTH_MODE": "disabled",
    }
    with tempfile.TemporaryDirectory(
        prefix="adv", ignore_cleanup_errors=True
    ) as folder:  # short: sockets lie in it
        metrics = str(free_port())
        command = [sys.executable, "-c", HEAD, str(free_port()), folder, metrics, str(free_port())]
        head = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | before,
        )
        try:
            address = ""
            while ":" not in address or " " in address.strip():
                assert (address := head.stdout.readline()), "the head did not start"
            yield before | {"RAY_ADDRESS": address.strip(), "METRICS": metrics}
        finally:
            children = psutil.Process(head.pid).children(recursive=True)
            head.stdin.close()
            try:
                head.wait(60)
            except subprocess.TimeoutExpired:
                head.kill()
            for child in psutil.wait_procs(children, timeout=5)[1]:
                child.kill()


@pytest.fixture
def go(cluster, finished, tmp_path):
    """Starts `adversa loop` on the cluster for a run in tmp_path; what still runs is killed in the
    end.
    """
    config, _ = finished
    (tmp_path / "tiny.yaml").write_text(dump(config))
    started, run = [], RunDir(tmp_path / "run")

    def start(*more, command="loop"):
        words = [
            sys.executable,
            "-m",
            "adversa.cli",
            command,
            str(tmp_path / "tiny.yaml"),
            "--run-dir",
            str(run.root),
            *more,
        ]
        environment = os.environ | cluster | {"COLUMNS": "200"}
        started.append(
            subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
            )
        )
        return started[-1]

    yield start, run
    for process in started:
        process.kill()
        process.communicate()
    if view.state_of(run)[0] in ("running", "paused"):
        control.request(run, control.STOP)
        wait_for(lambda: view.state_of(run)[0] not in ("running", "paused"))


def wait_for(condition, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.05)


def has(run, pattern):
    return lambda: next(run.root.glob(pattern), None) is not None


def worker_of(run):
    """The coordinator's process, as the lock has it."""
    return run_lock.holder(run).pid


def served(cluster):
    """What Prometheus would read on the head."""
    return requests.get(f"http://127.0.0.1:{cluster['METRICS']}/metrics", timeout=10).text


def said(process, seconds=300):
    return process.communicate(timeout=seconds)[0]


def test_the_run_goes_on_without_its_command_and_the_same_command_follows_it(go, finished, cluster):
    start, run = go
    first = start()
    wait_for(has(run, "denoiser/progress.json"))
    assert worker_of(run) != first.pid
    wait_for(lambda: all(f"ray_{name}{{" in served(cluster) for name in NAMES))
    stage = re.search(r'ray_adversa_stage\{.*run="run".*\} (\S+)', served(cluster))
    assert float(stage[1]) == NUMBERS["train"]
    other = subprocess.run(
        [*first.args, "--engine", "local"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
        timeout=120,
    )
    assert (
        other.returncode == 2
        and "is being worked on by coordinator-" in other.stderr
        and other.stderr.count("\n") == 1
    )
    first.send_signal(signal.SIGSTOP)  # a laptop that goes to sleep
    stopped, before = time.monotonic(), len(list(run.root.rglob("manifest.json")))
    wait_for(lambda: len(list(run.root.rglob("manifest.json"))) > before)  # and the run goes on
    time.sleep(max(0.0, 5 - (time.monotonic() - stopped)))
    first.kill()  # and is then switched off
    again = start()
    text = said(again)
    assert again.returncode == 0, text
    assert "is worked on already; following it" in text and "report: " in text
    assert results(run.root) == results(finished[1].root)
    assert control.restarts(run)[0] == 0 and run_lock.holder(run) is None


def test_a_coordinator_that_is_killed_comes_back_and_ends_the_same(go, finished):
    start, run = go
    command = start()
    killed = []
    for pattern in ("denoiser/checkpoint.json", "round-001/synthetic/part-*.parquet"):
        wait_for(has(run, pattern))
        killed.append(worker_of(run))
        before = {p: p.stat().st_mtime_ns for p in run.root.rglob("manifest.json")}
        os.kill(killed[-1], signal.SIGKILL)
        wait_for(lambda: (found := run_lock.holder(run)) is None or found.pid != killed[-1])
        assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    text = said(command)
    assert command.returncode == 0, text
    assert results(run.root) == results(finished[1].root)
    assert control.restarts(run)[0] == 2 and control.restarts(run)[1] > 0


def test_pause_resume_stop_and_errors(go):
    start, run = go
    first = start()
    words = [sys.executable, "-m", "adversa.cli"]

    def adversa(command, *more):
        wide = os.environ | {"COLUMNS": "200"}
        done = subprocess.run(
            [*words, command, str(run.root), *more],
            capture_output=True,
            text=True,
            timeout=200,
            env=wide,
        )
        return done.returncode, done.stdout + done.stderr

    wait_for(has(run, "data/progress.json"))
    first.kill()
    assert adversa("pause")[0] == 0
    wait_for(lambda: files.read_json(run.status)["state"] == "paused")
    assert "paused" in adversa("status")[1].splitlines()[0]
    manifests = sorted(run.root.rglob("manifest.json"))
    time.sleep(2)
    assert sorted(run.root.rglob("manifest.json")) == manifests
    code, text = adversa("resume", "--set", "mine.budget=6")
    assert code == 0 and "from round 1 on: mine.budget 6" in text and "goes on" in text
    following = start()
    assert any("following it" in line for line in following.stdout)  # else it would begin anew
    wait_for(lambda: files.read_json(run.status)["state"] == "running")
    code, text = adversa("stop")
    assert code == 0 and "is stopped" in text
    text = said(following)
    assert following.returncode == 130 and "Resume with: " in text
    assert adversa("pause")[0] == 2

    wrong = start("--set", "cluster.sampler_threads=64")  # found by the engine, in the actor
    text = said(wrong)
    assert (
        wrong.returncode == 2
        and "error: cluster.sampler_threads 64: there are 2 CPUs" in text
        and "Traceback" not in text
    )
    assert "failed" in adversa("status")[1].splitlines()[0]
