"""The client of the jobs server and of Ray's launcher, against servers and commands that pretend.
No Ray runs.
"""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import psutil
import pytest
import ray
import requests

from adversa.cli import cluster as cli_cluster
from adversa.distributed import cluster_file, jobs, launcher
from adversa.distributed.cluster_file import Asks
from adversa.types import UserError

HOSTILE = "/runs/a b; touch executed $(touch executed) `touch executed` '\"\n&& touch executed #"


class Server:
    """An HTTP server with canned answers: path -> (status, JSON or text)."""

    def __init__(self, answers, secret=None):
        self.asked = []  # (path, Authorization header)
        self.target = None  # whereto it redirects who knows the secret
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append((self.path, self.headers.get("Authorization")))
                status, body = answers.get(self.path.partition("?")[0], (404, "not here"))
                if secret is not None and self.headers.get("Authorization") != f"Bearer {secret}":
                    status, body = (
                        (403, "wrong")
                        if self.headers.get("Authorization")
                        else (401, "who are you")
                    )
                elif outer.target:
                    self.send_response(307)
                    self.send_header("Location", outer.target + self.path)
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def answers(ray_version=ray.__version__, python=None):
    about = {"version": "4", "ray_version": ray_version, "ray_commit": "0", "session_name": "s"}
    return {
        "/api/version": (200, about),
        "/api/v0/cluster_metadata": (
            200,
            {"result": True, "data": {"pythonVersion": python or platform.python_version()}},
        ),
        "/nodes": (
            200,
            {
                "data": {
                    "summary": [
                        {"raylet": {"state": "ALIVE"}},
                        {"raylet": {"state": "DEAD"}},
                        {"raylet": {}},
                    ]
                }
            },
        ),
        "/api/jobs/": (200, []),
    }


@pytest.fixture
def serve():
    made = []

    def start(*args, **kwargs):
        made.append(Server(*args, **kwargs))
        return made[-1]

    yield start
    for server in made:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in (
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_AUTH_MODE",
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def refusal(address) -> str:
    with pytest.raises(UserError) as told:
        jobs.connect(address, "FIX IT")
    assert "\n" not in str(told.value) and address in str(told.value)
    return str(told.value)


# ---- one clear line ------------------------------------------------------------------------------


def test_a_cluster_of_our_versions_is_taken(serve):
    client = jobs.connect(serve(answers()).address, "")
    assert jobs.alive(client) == 1 and jobs.jobs(client) == []


def test_the_environment_does_not_name_another_cluster(serve, monkeypatch):
    meant, other = serve(answers()), serve(answers())
    monkeypatch.setenv("RAY_ADDRESS", other.address)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", other.address)
    jobs.connect(meant.address, "")
    assert meant.asked and not other.asked
    assert os.environ["RAY_ADDRESS"] == os.environ["RAY_API_SERVER_ADDRESS"] == other.address


def test_a_head_that_is_down():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    said = refusal(f"http://127.0.0.1:{port}")
    assert said == f"no Ray head answers at http://127.0.0.1:{port}; FIX IT"


def test_a_head_that_accepts_and_says_nothing(monkeypatch):
    monkeypatch.setattr(jobs, "TIMEOUTS", (1.0, 1.0))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        assert "no Ray head answers at" in refusal(f"http://127.0.0.1:{s.getsockname()[1]}")


@pytest.mark.parametrize(
    "answer", [(404, "not here"), (200, "<html>hello</html>"), (200, {"version": "1"}), (500, "oh")]
)
def test_a_wrong_port_where_another_web_server_answers(serve, answer):
    assert "is no Ray jobs server; give the dashboard's port" in refusal(
        serve({"/api/version": answer}).address
    )


def test_a_wrong_port_where_something_else_answers():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()

        def speak():
            other = s.accept()[0]
            other.recv(1000)
            other.sendall(b"\x00\x00\x18\x04 this is another protocol\n")
            other.close()

        thread = threading.Thread(target=speak)
        thread.start()
        assert "is no Ray jobs server" in refusal(f"http://127.0.0.1:{s.getsockname()[1]}")
        thread.join()


def test_another_ray(serve):
    said = refusal(serve(answers("2.40.0")).address)
    assert (
        f"runs Ray 2.40.0, this machine {ray.__version__}; install the same minor version" in said
    )


def test_another_python(serve):
    assert f"runs Python 3.9.1, this machine {platform.python_version()}; use the same" in refusal(
        serve(answers(python="3.9.1")).address
    )


def test_another_patch_level_is_no_other_version(serve):
    minor = ".".join(ray.__version__.split(".")[:2])
    jobs.connect(
        serve(
            answers(f"{minor}.99", ".".join(platform.python_version().split(".")[:2]) + ".99")
        ).address,
        "",
    )


def test_the_token_is_told_to_who_asks_for_it_alone(serve, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    open_one, closed = serve(answers()), serve(answers(), secret="abc")
    jobs.connect(open_one.address, "")
    assert all(header is None for _, header in open_one.asked)
    assert jobs.alive(jobs.connect(closed.address, "")) == 1
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    said = refusal(closed.address)
    assert "refuses our token" in said and "wrong" not in said


@pytest.fixture
def elsewhere(monkeypatch):
    """elsewhere(server): its address under a name that is not loopback's."""
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **kwargs: resolve(
            "127.0.0.1" if host == "127.example.org" else host, *args, **kwargs
        ),
    )
    return lambda server: server.address.replace("127.0.0.1", "127.example.org")


def listed(tmp_path, said):
    """What `runs --cluster FILE` says of a cluster file."""
    from typer.testing import CliRunner

    from adversa.cli.app import app

    path = tmp_path / "theirs.yaml"
    asked = "".join(f"    {line}\n" for line in said)
    path.write_text(f"cluster_name: c\nprovider: {{type: local}}\nmetadata:\n  adversa:\n{asked}")
    return CliRunner().invoke(app, ["runs", "--cluster", str(path)])


def test_a_cluster_file_does_not_take_the_token_to_another_address(
    serve, elsewhere, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    theirs = serve(answers(), secret="abc")
    address = elsewhere(theirs)
    asks, told = [f"address: {address}"], listed(tmp_path, [f"address: {address}"])
    assert told.exit_code == 2 and told.stderr.count("\n") == 1 and "abc" not in told.output
    assert "yours was not sent, since it is for this machine's loopback" in told.stderr
    assert f"set ADVERSA_TOKEN_ADDRESS={address}" in told.stderr and "plain_http" in told.stderr
    plain = [*asks, "plain_http: true"]
    assert f"ADVERSA_TOKEN_ADDRESS={address}" in listed(tmp_path, plain).stderr
    for other in ("http://127.example.org", address.replace("http:", "https:"), f"{address}0"):
        monkeypatch.setenv("ADVERSA_TOKEN_ADDRESS", other)
        assert listed(tmp_path, plain).exit_code == 2
    monkeypatch.setenv("ADVERSA_TOKEN_ADDRESS", address)
    told = listed(tmp_path, asks)
    assert told.exit_code == 2 and "set plain_http: true beside address" in told.stderr
    assert "ADVERSA_TOKEN_ADDRESS" not in told.stderr
    assert theirs.asked and all(header is None for _, header in theirs.asked)
    assert listed(tmp_path, plain).exit_code == 0
    assert {header for _, header in theirs.asked} == {None, "Bearer abc"}


def test_a_redirect_does_not_take_the_token_along(serve, elsewhere, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    theirs, ours = serve(answers()), serve({}, secret="abc")
    ours.target = elsewhere(theirs)
    jobs.connect(ours.address, "")
    assert theirs.asked and all(header is None for _, header in theirs.asked)


@pytest.mark.parametrize(
    "address, ours",
    [
        ("http://127.0.0.1:8265", True),
        ("http://[::1]:8265", True),
        ("http://localhost", True),
        ("http://127.evil.org:8265", False),
        ("http://localhost.evil.org", False),
        ("http://10.0.0.1:8265", False),
        ("https://[fe80::1]", False),
    ],
)
def test_which_addresses_are_this_machine(address, ours):
    assert cluster_file.is_loopback(address) is ours


def test_a_token_that_is_nowhere(serve, tmp_path):
    closed = serve(answers(), secret="abc")
    with pytest.raises(UserError, match="asks for a token and there is none at .*auth_token"):
        jobs.connect(closed.address, "")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("abc\n")
    jobs.connect(closed.address, "")


# ---- where a run lies, what is run ---------------------------------------------------------------


def test_where_a_run_lies(tmp_path):
    from pathlib import Path

    from adversa.storage.path import storage_path

    shared, none = Asks(run_storage="/shared/"), Asks()
    assert cli_cluster.place(Path("configs/ham.yaml"), None, shared) == "/shared/ham"
    assert cli_cluster.place(None, None, shared) == "/shared/demo"
    assert cli_cluster.place(None, Path("mine/one"), shared) == "/shared/mine/one"
    assert (
        cli_cluster.place(None, Path("/runs/one"), none)
        == cli_cluster.place(None, Path("/runs/one"), shared)
        == "/runs/one"
    )
    assert cli_cluster.place(None, storage_path("s3://bucket/ham"), none) == "s3://bucket/ham"
    assert cli_cluster.place(None, Path("x"), Asks(run_storage="gs://bucket")) == "gs://bucket/x"
    with pytest.raises(
        UserError, match="--run-dir mine is relative, and the cluster file names no run_storage"
    ):
        cli_cluster.place(None, Path("mine"), none)
    with pytest.raises(UserError, match="no --run-dir, and the cluster file names no run_storage"):
        cli_cluster.place(Path("ham.yaml"), None, none)


def test_no_name_becomes_a_command(tmp_path):
    """The head's shell gets our words back, whatever they are."""
    line = jobs.command("loop", HOSTILE, [f"data.path={HOSTILE}"], ["--rounds", "2"])
    said = [
        "python",
        "-m",
        "adversa.cli",
        "loop",
        "config.yaml",
        "--run-dir",
        HOSTILE,
        "--set",
        f"data.path={HOSTILE}",
        "--rounds",
        "2",
    ]
    assert shlex.split(line) == said
    show = f"{shlex.quote(sys.executable)} -c 'import sys; print(ascii(sys.argv[1:]))' {line}"
    heard = subprocess.run(["sh", "-c", show], capture_output=True, text=True, cwd=tmp_path)
    assert heard.stdout.strip() == ascii(said) and not list(tmp_path.iterdir())


def test_ids_name_the_run_and_nothing_else():
    assert jobs.base_id("/shared/Ham 10000!") == jobs.base_id("/shared/Ham 10000!/")
    assert jobs.base_id("/shared/Ham 10000!").startswith("adversa-ham-10000-")
    assert jobs.base_id("/a/ham") != jobs.base_id("/b/ham")
    for run in (HOSTILE, "/", "s3://b/x", "/" + "x" * 300, "/runs/日本"):
        assert (
            set(jobs.base_id(run)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
            and len(jobs.base_id(run)) < 64
        )


@pytest.mark.parametrize(
    "entrypoint, run",
    [
        ("adversa loop c.yaml --run-dir /shared/ham", "/shared/ham"),
        ("/opt/bin/adversa loop --run-dir='/shared/a b'", "/shared/a b"),
        ("python -m adversa.cli train --run-dir /x --seed 1", "/x"),
        ("adversa loop c.yaml", None),
        ("adversa plan c.yaml --run-dir /x", None),
        ("python -m adversa.cli pause /x --run-dir /x", None),
        ("adversa loop --run-dir", None),
        ("python train.py --run-dir /x", None),
        ("adversa loop 'unclosed --run-dir /x", None),
    ],
)
def test_jobs_that_others_submitted_are_known_by_their_command(entrypoint, run):
    assert jobs.run_of(SimpleNamespace(metadata=None, entrypoint=entrypoint)) == run


# ---- submitting and following --------------------------------------------------------------------


class Cluster:
    """Stands in for a jobs client: jobs are lists of (status, log) or errors, one a poll; the last
    one stays.
    """

    def __init__(self, **scripts):
        self.scripts, self.submitted, self.now = {k: list(v) for k, v in scripts.items()}, [], {}

    def _details(self, job_id, status, run="/r"):
        code = {"SUCCEEDED": 0, "FAILED": 3}.get(status)
        return SimpleNamespace(
            submission_id=job_id,
            status=jobs.JobStatus(status),
            message="a\nb",
            driver_exit_code=code,
            start_time=1000,
            end_time=None,
            metadata={jobs.RUN: run},
            entrypoint="",
        )

    def list_jobs(self):
        return [self._details(job_id, script[0][0]) for job_id, script in self.scripts.items()]

    def get_job_info(self, job_id):
        script = self.scripts[job_id]
        self.now[job_id] = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(self.now[job_id], Exception):
            raise self.now[job_id]
        return self._details(job_id, self.now[job_id][0])

    def get_job_logs(self, job_id):
        if isinstance(self.now[job_id][1], Exception):
            raise self.now[job_id][1]
        return self.now[job_id][1]

    def submit_job(self, entrypoint, submission_id, runtime_env, metadata):
        if submission_id in self.scripts:
            raise RuntimeError(
                f"Request failed\nValueError: Job with submission_id {submission_id} "
                "already exists.\n."
            )
        self.scripts[submission_id] = [("PENDING", "")]
        self.submitted.append((submission_id, entrypoint, runtime_env, metadata))


@pytest.fixture
def no_waiting(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(
        jobs,
        "time",
        SimpleNamespace(
            monotonic=lambda: clock[0], sleep=lambda s: clock.__setitem__(0, clock[0] + s)
        ),
    )


def followed(script, patience=300.0):
    lines, cluster = [], Cluster(j=script)
    start = jobs.Job("j", "/r", "RUNNING", "", None, 1.0, None)
    return jobs.follow(cluster, start, lines.append, patience), lines


def test_following_shows_each_line_once_and_ends_with_the_job(no_waiting):
    script = [
        ("PENDING", ""),
        ("RUNNING", "one\ntw"),
        ("RUNNING", "one\ntwo\n"),
        ("FAILED", "one\ntwo\nthree"),
    ]
    job, lines = followed(script)
    assert lines == ["one", "two", "three"] and (job.status, job.code, job.message) == (
        "FAILED",
        3,
        "a b",
    )


def test_following_outlives_a_head_that_is_away_for_a_while(no_waiting):
    lost = requests.exceptions.ConnectionError("gone")
    job, lines = followed(
        [
            ("RUNNING", "one\n"),
            lost,
            lost,
            ("RUNNING", RuntimeError("500")),
            ("SUCCEEDED", "one\ntwo\n"),
        ]
    )
    assert job.code == 0 and lines == [
        "one",
        "the cluster does not answer; waiting for it, 300 s at most",
        "two",
    ]


def test_following_gives_up_on_a_head_that_stays_away(no_waiting):
    with pytest.raises(UserError, match="has not answered for 300 s; the job j may still run"):
        followed([("RUNNING", "one\n"), requests.exceptions.ReadTimeout("gone")])


def test_following_a_job_that_a_new_head_knows_nothing_of(no_waiting):
    with pytest.raises(
        UserError, match="no longer knows the job j; run the same command again to resume"
    ):
        followed(
            [
                ("RUNNING", "one\n"),
                RuntimeError("Request failed with status code 404: Job j does not exist."),
            ]
        )


def test_following_ends_where_the_log_died_with_its_node(no_waiting):
    job, lines = followed([("RUNNING", "one\n"), ("FAILED", RuntimeError("500"))])
    assert job.status == "FAILED" and lines == ["one"]


@pytest.mark.parametrize("status, code", [("SUCCEEDED", 0), ("STOPPED", 143), ("FAILED", 1)])
def test_the_exit_code_of_a_job_that_has_none(status, code):
    assert jobs.Job("j", "/r", status, "", None, 1.0, 2.0).code == code


def test_a_second_command_follows_the_first_and_a_third_makes_a_new_attempt(tmp_path):
    cluster = Cluster()
    first, new = jobs.submit(cluster, "/r", "run it", "seed: 0\n", tmp_path)
    assert (
        new
        and first.id == f"{jobs.base_id('/r')}-1"
        and (tmp_path / "config.yaml").read_text() == "seed: 0\n"
    )
    again, new = jobs.submit(cluster, "/r", "run it", "seed: 0\n", tmp_path)
    assert not new and again.id == first.id and len(cluster.submitted) == 1
    cluster.scripts[first.id] = [("STOPPED", "")]
    third, new = jobs.submit(cluster, "/r", "run it", "seed: 0\n", tmp_path)
    assert new and third.id == f"{jobs.base_id('/r')}-2"
    job_id, entrypoint, environment, metadata = cluster.submitted[0]
    assert (entrypoint, metadata) == ("run it", {jobs.RUN: "/r"}) and environment[
        "working_dir"
    ] == str(tmp_path)
    assert [m.rsplit("/", 1)[-1] for m in environment["py_modules"]] == ["adversa"]


def test_two_commands_at_the_same_moment_share_a_job(tmp_path, monkeypatch):
    cluster = Cluster()
    jobs.submit(cluster, "/r", "run it", "", tmp_path)
    monkeypatch.setattr(
        jobs, "of_run", lambda client, run: []
    )  # it looked before the other had submitted
    job, new = jobs.submit(cluster, "/r", "run it", "", tmp_path)
    assert not new and job.id == f"{jobs.base_id('/r')}-1"


def test_a_head_that_is_too_young_to_take_jobs_is_waited_for(tmp_path, no_waiting):
    cluster, refused = (
        Cluster(),
        [RuntimeError("status code 500: No available agent to submit job, please try again later.")]
        * 3,
    )
    take = cluster.submit_job

    def submit_job(**kwargs):
        if refused:
            raise refused.pop()
        take(**kwargs)

    cluster.submit_job = submit_job
    assert jobs.submit(cluster, "/r", "run it", "", tmp_path)[1] and not refused
    refused += [RuntimeError("No available agent")] * 1000
    cluster.scripts.clear()
    with pytest.raises(UserError, match="did not take the job"):
        jobs.submit(cluster, "/r", "run it", "", tmp_path)


def test_a_cluster_that_does_not_take_the_job(tmp_path):
    cluster = Cluster()
    cluster.submit_job = lambda **kwargs: (_ for _ in ()).throw(
        RuntimeError("Request failed: Traceback\n  x\nOSError: disk full\n.\n")
    )
    with pytest.raises(UserError, match="did not take the job: OSError: disk full$"):
        jobs.submit(cluster, "/r", "run it", "", tmp_path)


# ---- Ray's launcher, played by a script ----------------------------------------------------------

PRETEND = """
import http.server, json, sys
said, port = json.loads(sys.argv[1]), sys.argv
with open(said["log"], "a") as f:
    f.write(json.dumps(sys.argv[2:]) + chr(10))
if sys.argv[2] == "dashboard":
    if said.get("no_tunnel"):
        sys.exit("ssh: no route to host")
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = said["answers"].get(self.path.partition("?")[0], [404, ""])[1]
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
    at = "127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])
    http.server.ThreadingHTTPServer(at, Handler).serve_forever()
print(said.get("out", ""))
print(said.get("err", ""), file=sys.stderr)
sys.exit(said.get("code", 0))
"""


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """pretend(out=..., code=...): what `ray` answers from now on; gives a function that tells what
    it was asked.
    """
    (tmp_path / "ray.py").write_text(PRETEND)
    log = tmp_path / "asked"

    def make(**said):
        said = json.dumps({"log": str(log), "answers": answers(), **said})
        monkeypatch.setattr(launcher, "RAY", [sys.executable, str(tmp_path / "ray.py"), said])
        return lambda: [json.loads(line) for line in log.read_text().splitlines()]

    return make


@pytest.fixture
def cluster(tmp_path):
    """A cluster file whose own name wants to be a command."""
    folder = tmp_path / "a $(touch executed); b"
    folder.mkdir()
    path = folder / "--cluster.yaml"
    path.write_text(
        "cluster_name: mine; touch executed\nprovider: {type: local, head_ip: 10.0.0.1, "
        "worker_ips: [10.0.0.2]}\n"
    )
    return cluster_file.read(path)


def test_the_head_is_found_and_reached_through_a_tunnel(pretend, cluster):
    asked = pretend(out="2026-11-22 INFO some line\n10.0.0.1")
    with launcher.session(cluster) as client:
        assert jobs.alive(client) == 1
        port = int(client.get_address().rsplit(":", 1)[1])
        opened = [c for c in psutil.Process().children() if "dashboard" in c.cmdline()]
        assert len(opened) == 1
    path = str(cluster.path.resolve())
    assert asked() == [
        ["get-head-ip", path],
        ["dashboard", path, "--port", str(port), "--remote-port", "8265"],
    ]
    assert not opened[0].is_running()


@pytest.mark.parametrize(
    "said, line",
    [
        (
            {"code": 1, "err": "Traceback\nRuntimeError: Head node of cluster (mine) not found!"},
            "Head node of cluster .mine. not found",
        ),
        ({"out": "None"}, "no head of the cluster mine; touch executed is up"),
        (
            {"out": "10.0.0.1", "no_tunnel": True},
            "no ssh tunnel to the head of .*ssh: no route to host",
        ),
    ],
)
def test_a_head_that_cannot_be_reached_is_one_line(pretend, cluster, said, line):
    pretend(**said)
    with pytest.raises(UserError, match=line) as told, launcher.session(cluster):
        pass
    assert "\n" not in str(told.value)


def test_up_and_down_ask_ray_and_fail_in_one_line(pretend, cluster):
    asked = pretend()
    launcher.up(cluster)
    launcher.down(cluster)
    path = str(cluster.path.resolve())
    assert asked() == [["up", path, "--yes"], ["down", path, "--yes"]]
    pretend(code=3)
    with pytest.raises(UserError, match="`ray up .*` ended with exit code 3"):
        launcher.up(cluster)


def test_it_waits_for_the_machines_that_the_file_wants(pretend, cluster, monkeypatch):
    there, told = iter([1, 1, 2]), []
    monkeypatch.setattr(jobs, "alive", lambda client: next(there))
    monkeypatch.setattr(launcher.time, "sleep", lambda s: None)
    launcher.wait_for_nodes(None, cluster, told.append)
    assert told == ["1 of 2 machines are up"]
    monkeypatch.setattr(jobs, "alive", lambda client: 1)
    with pytest.raises(UserError, match="1 of 2 machines came within 0 s"):
        launcher.wait_for_nodes(None, cluster, told.append, 0)


def test_a_cluster_that_falls_silent_is_one_line(serve, cluster):
    server = serve(answers())
    known = dataclasses.replace(cluster, asks=Asks(address=server.address))
    with (
        pytest.raises(UserError, match=r"has stopped answering \(ConnectionError\)"),
        launcher.session(known) as client,
    ):
        server.http.shutdown()
        server.http.server_close()
        jobs.jobs(client)


def test_a_manifest_needs_an_address_and_kubectl(tmp_path):
    path = tmp_path / "k.yaml"
    path.write_text("apiVersion: ray.io/v1\nkind: RayJob\nmetadata: {name: a}\n")
    manifest = cluster_file.read(path)
    with (
        pytest.raises(
            UserError, match="no address in the annotation adversa; `kubectl port-forward"
        ),
        launcher.session(manifest),
    ):
        pass
    with pytest.raises(UserError, match="--up: .* use `kubectl apply -f"):
        launcher.up(manifest)
