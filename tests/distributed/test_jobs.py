"""A run on a cluster, end to end: a head started as on a cluster (`ray start --head`), commands as
a user types them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil
import pytest
import requests
import yaml

from adversa.config import dump

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ENOUGH = 400  # seconds for one command on a machine that is busy with other things
# Names are data: this one wants to be a command of every shell it passes.
NAME = "ham $(touch executed); touch executed"

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(what, seconds=ENOUGH):
    ends = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.2)
    return found


class Head:
    """Ray's head in a process of its own, with a token; and what a user's shell needs to work with
    it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, f"http://127.0.0.1:{free_port()}"
        self.secret = uuid.uuid4().hex
        # The head's `python` and `adversa` are this environment's. A busy machine must not take it
        # for dead.
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": "",
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_num_workers_soft_limit": "16",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.secret,
            "RAY_health_check_timeout_ms": "120000",
            "RAY_health_check_failure_threshold": "20",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "300",
        }
        start = [
            BIN / "ray",
            "start",
            "--head",
            "--port",
            free_port(),
            "--dashboard-port",
            self.address.rsplit(":", 1)[1],
        ]
        start += [
            "--dashboard-host",
            "127.0.0.1",
            "--dashboard-agent-listen-port",
            free_port(),
            "--ray-client-server-port",
            free_port(),
        ]
        start += [
            "--temp-dir",
            folder / "ray",
            "--num-cpus",
            2,
            "--include-dashboard",
            "true",
            "--block",
        ]
        start += ["--object-store-memory", 200 << 20]
        self.log = open(folder / "head.log", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [str(word) for word in start],
            cwd=folder,
            env=self.env,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.shell = {k: v for k, v in self.env.items() if k != "RAY_AUTH_MODE"} | {
            "PYTHONPATH": str(ROOT),
            "RAY_ADDRESS": "127.0.0.1:1",
        }
        self.cluster = folder / "cluster.yaml"
        asks = {"address": self.address, "run_storage": str(folder / "runs"), "training_workers": 1}
        tree = {
            "cluster_name": "test",
            "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
        }
        self.cluster.write_text(yaml.safe_dump({**tree, "metadata": {"adversa": asks}}))

    def answers(self) -> bool:
        try:
            headers = {"Authorization": f"Bearer {self.secret}"}
            return (
                requests.get(f"{self.address}/api/version", headers=headers, timeout=5).status_code
                == 200
            )
        except requests.exceptions.RequestException:
            return False

    def adversa(self, *words: object) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-u",
            "-m",
            "adversa.cli",
            *map(str, words),
            "--cluster",
            str(self.cluster),
        ]
        out = subprocess.PIPE
        # Ctrl-C as in a terminal: a shell starts what is in the background deaf to it, these tests
        # too.
        heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.shell,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            **heard,
        )

    def run(self, *words: object) -> tuple[int, str]:
        process = self.adversa(*words)
        return ended(process)

    def close(self) -> None:
        """End what we started, by id: the command, then whatever of its children is left."""
        family = (
            [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
            if self.process.poll() is None
            else []
        )
        self.process.send_signal(signal.SIGTERM)
        psutil.wait_procs([p for p in family if isinstance(p, psutil.Process)], timeout=20)
        for process in [
            p
            for p in psutil.process_iter(["cmdline"])
            if str(self.folder) in " ".join(p.info["cmdline"] or [])
        ]:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
                process.kill()
        self.process.wait(30)
        self.log.close()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out = process.communicate(timeout=ENOUGH)[0]
    return process.returncode, out


def reads(process: subprocess.Popen[str], words: str) -> str:
    """What it printed up to a line that begins so (a regular expression)."""
    said = ""
    for line in process.stdout:
        said += line
        if re.match(words, line):
            return said
    raise AssertionError(f"it ended without {words!r}: {said}")


@pytest.fixture(scope="module")
def head():
    for tries_left in (
        2,
        1,
        0,
    ):  # Ray gives its own processes a minute to start, which a busy machine may not have
        folder = Path(tempfile.mkdtemp(prefix="adv"))  # short: Ray puts sockets below it
        started = Head(folder)
        try:
            until(lambda head=started: head.answers() or head.process.poll() is not None)
            if started.process.poll() is None:
                yield started
                return
            assert tries_left, (folder / "head.log").read_text()
        finally:
            started.close()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def config(tiny, head) -> Path:
    """A run that trains until it is stopped; with SHORT, one of seconds."""
    arms = {
        "mix": {"arms": ["real"]},
        "evaluate": {"bootstrap": 100},
        "data": {"phantom": {"images": 120}},
    }
    path = head.folder / "tiny.yaml"
    path.write_text(dump(tiny(classifier={"steps": 100_000, "checkpoint_steps": 100_000}, **arms)))
    return path


# Nothing hangs on the number of steps before the first checkpoint: a run may be resumed with
# another.
SHORT = [
    "--set",
    "classifier.steps=4",
    "--set",
    "classifier.checkpoint_steps=4",
    "--set",
    "classifier.evaluations=1",
]


def test_submit_detach_find_again_stop_resume(head, config):
    run, begin = head.folder / "runs" / NAME, ["loop", config, "--run-dir", NAME]
    first = head.adversa(*begin)
    said = reads(first, r"\d\d:\d\d:\d\d train")
    assert (
        re.search(r"submitted adversa-ham-touch-executed-touch-executed-\w{8}-1, run ", said)
        and "prepare" in said
    )

    first.send_signal(signal.SIGINT)  # the laptop's lid
    code, said = ended(first)
    assert (
        code == 130
        and "goes on. Come back: adversa watch" in said
        and "Stop it: adversa stop" in said
    ), said
    data = (run / "data" / "manifest.json").read_text()

    code, said = head.run("status", NAME)
    assert code == 0 and "running" in said and "attempt 1" in said and "train" in said
    code, said = head.run("runs")
    assert code == 0 and "running" in said and "touch executed" in said

    second = head.adversa(*begin)  # the same command does not start a second job
    reads(second, "already at work: following adversa-ham-")
    code, said = head.run("pause", NAME)
    assert code == 0 and "pauses after the parts in flight" in said
    code, said = head.run("resume", NAME, "--set", "mine.budget=6")
    assert code == 0 and "from round 1 on: mine.budget 6" in said and "goes on" in said
    code, said = head.run("resume", NAME, "--set", "seed=6")
    assert code == 2 and "error: --set seed: only mix.synthetic_ratio" in said
    code, said = head.run("stop", NAME)
    assert code == 0 and "is stopped; everything finished is kept" in said
    code, said = ended(second)
    assert code == 143 and "was stopped" in said
    assert (
        json.loads((run / "status.json").read_text())["state"] == "stopped"
    )  # it had the time to leave its folder in order
    code, said = head.run("stop", NAME)  # the run's own folder is asked, on the cluster
    assert code == 2 and "is stopped: there is nothing to stop; go on with: adversa loop " in said

    code, said = head.run(*begin, *SHORT)
    assert code == 0 and re.search(r"submitted \S+-2, run ", said) and "report: " in said, said
    assert (run / "report.html").is_file() and (run / "data" / "manifest.json").read_text() == data
    code, said = head.run("watch", NAME)  # a run that is over: its lines, its exit code
    assert code == 0 and "report: " in said
    assert not list(head.folder.rglob("executed"))


def test_the_exit_code_and_the_reason_are_the_jobs(head, config):
    code, said = head.run("loop", config, "--run-dir", "/proc/nowhere/run", *SHORT)
    assert code == 2 and "error: " in said and "/proc/nowhere" in said
    code, said = head.run("status", "/proc/nowhere/run")
    assert code == 0 and "failed (exit code 2)" in said


def test_faults_on_this_side_are_one_line_and_submit_nothing(head, config):
    for words, line in (
        (["loop", config, "--set", "data.pth=x"], "did you mean data.path?"),
        (
            ["loop", config, "--set", "data.source=csv", "--set", "data.path=here.csv"],
            "data.path here.csv: a job on a cluster starts",
        ),
        (["loop", config, "--engine", "local"], "--engine local beside --cluster"),
        (["status", "never"], "the cluster has had no job on "),
    ):
        code, said = head.run(*words)
        assert code == 2 and line in said and said.count("\n") == 1, said


def test_a_plan_is_made_where_the_run_would_work(head, config):
    code, said = head.run(
        "plan", config, "--run-dir", "planned", *SHORT, "--json", head.folder / "plan.json"
    )
    assert code == 0 and "Where it runs" in said and "How long" in said, said
    figures = json.loads((head.folder / "plan.json").read_text())
    assert [s["stage"] for s in figures["stages"]][:2] == ["prepare", "train"]
    assert not (head.folder / "runs" / "planned").exists()
    code, said = head.run("plan", config, "--set", "cluster.sampler_threads=64")
    assert code == 2 and "error: cluster.sampler_threads 64: there are 2 CPUs" in said, said


def test_rays_own_tool_submits_it_too(head, config):
    """`ray job submit --working-dir . -- adversa ...` from a checkout."""
    run = head.folder / "runs" / "submitted"
    shutil.copy(config, head.folder / "runs" / "tiny.yaml")
    command = [
        BIN / "ray",
        "job",
        "submit",
        "--address",
        head.address,
        "--working-dir",
        ROOT,
        "--",
        "adversa",
        "prepare",
    ]
    command += [head.folder / "runs" / "tiny.yaml", "--run-dir", run]
    env = head.env | {"RAY_RUNTIME_ENV_IGNORE_GITIGNORE": "0"}
    done = subprocess.run(
        [str(w) for w in command],
        cwd=head.folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=ENOUGH,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "data" / "manifest.json").is_file()
    code, said = head.run("status", run)
    assert code == 0 and "finished" in said and str(run) in said
