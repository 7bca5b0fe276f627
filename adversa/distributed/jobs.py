"""Ray's Jobs API from outside the cluster: reach the head, hand it a run, follow it, stop it.

Everything goes over HTTP to the jobs server, the part of Ray's dashboard on the head that takes
commands; this process never joins the cluster, so it may go to sleep or away without harm to the
job.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import platform
import re
import shlex
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray is imported, as in engine.py

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from adversa.distributed.cluster_file import is_loopback
from adversa.pipeline.stages import of_loop
from adversa.types import UserError, digest

RUN = "adversa_run"  # key of a job's metadata: the run folder, as on the cluster
TIMEOUTS = (
    10.0,
    60.0,
    # seconds: to connect, to wait for an answer. Ray sets none: a head that is gone would hang us
    # for ever
)
# seconds without an answer after which following gives up: a head may restart, a laptop may wake up
PATIENCE = 300.0
YOUNG_SECONDS = 120.0  # that a head which has just started may lack the agent which takes jobs
STOP_SECONDS = (
    30  # that a job which is told to stop has to leave its folder in order; then Ray kills it
)
VERSION = "/api/version"
TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
# The address beside loopback that the user's token is for. A variable and no key of the cluster
# file: who writes the file for another would bind that person's token to a server of their own.
TOKEN_ADDRESS = "ADVERSA_TOKEN_ADDRESS"
# Commands that work on a run.
WORKING = {"loop", *(s.name for s in of_loop() if s.phase < 2)}
STOPPED = 143  # exit code of a job that was stopped, as of a command that SIGTERM stops


class Client(JobSubmissionClient):
    """Ray's client, at the address it is given, with time limits.

    Ray lets the environment (RAY_API_SERVER_ADDRESS, RAY_ADDRESS) override the address. A cluster
    file says which cluster is meant. In a process that has had an embedded Ray, Ray's client would
    tell every server that Ray's token: this one sends ours alone.
    """

    def __init__(self, address: str, headers: dict[str, str], hint: str) -> None:
        """hint: what to do about a head that does not answer."""
        self._given, self._hint = dict(headers), hint
        with _without("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            super().__init__(address, headers=headers)

    def _check_connection_and_version(self, *_: object, **__: object) -> None:
        """In place of Ray's, whose errors do not say what was reached."""
        at = self._address
        try:
            self._server_ray_version = str(self._do_request("GET", VERSION).json()["ray_version"])
        except requests.exceptions.Timeout:
            raise UserError(
                f"no Ray head answers at {at} within {TIMEOUTS[1]:.0f} s; {self._hint}"
            ) from None
        except (requests.exceptions.RequestException, ValueError, KeyError, TypeError) as e:
            # A connection that was refused has a reason; else something answered, and not Ray.
            if getattr(e.args[0] if e.args else None, "reason", None) is not None:
                raise UserError(f"no Ray head answers at {at}; {self._hint}") from None
            raise UserError(
                f"what answers at {at} is no Ray jobs server; give the dashboard's port (8265, or "
                "what `ray start --dashboard-port` says), not Ray's own (6379)"
            ) from None

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        self._headers = dict(self._given)
        return super()._do_request(method, endpoint, timeout=TIMEOUTS, **kwargs)

    def get(self, endpoint: str, **params: str) -> Any:
        """The `data` of an answer of the dashboard's other endpoints; None where there is none."""
        answer = self._do_request("GET", endpoint, params=params)
        return answer.json().get("data") if answer.status_code == 200 else None


@dataclass(frozen=True)
class Job:
    """A job of the cluster that works on a run. Times are Unix seconds; exit_code is None while it
    runs, or where it had none.
    """

    id: str
    run: str
    status: str  # PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED
    message: str
    exit_code: int | None
    began: float | None
    ended: float | None

    @property
    def is_over(self) -> bool:
        return JobStatus(self.status).is_terminal()

    @property
    def code(self) -> int:
        """What a command that followed the job to its end exits with."""
        if self.exit_code is not None:
            return self.exit_code
        return {"SUCCEEDED": 0, "STOPPED": STOPPED}.get(self.status, 1)


def connect(address: str, hint: str, plain_http: bool = False) -> Client:
    """A client of a jobs server.

    Args:
        address: Its URL.
        hint: What to do about a head that does not answer.
        plain_http: Whether the token may go to another machine without encryption.

    Returns:
        The client, which has the token where the server asks for one.

    Raises:
        UserError: In one line: none answers there, it is no jobs server, it runs other versions
            than we do, or asks for a token that is not for it.
    """
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):  # the second has a level of its own
        logging.getLogger(name).setLevel(logging.ERROR)
    client = _client(address, hint, plain_http)
    theirs = str(client._server_ray_version)
    if _minor(theirs) != _minor(ray.__version__):
        raise UserError(
            f"the cluster at {address} runs Ray {theirs}, this machine {ray.__version__}; "
            "install the same minor version on both "
            f"(here: pip install 'ray[train,tune,data,default]=={theirs}')"
        )
    python = str((client.get("/api/v0/cluster_metadata") or {}).get("pythonVersion", ""))
    if python and _minor(python) != _minor(platform.python_version()):
        raise UserError(
            f"the cluster at {address} runs Python {python}, this machine "
            f"{platform.python_version()}; use the same minor version"
        )
    return client


def _client(address: str, hint: str, plain_http: bool) -> Client:
    try:
        return Client(address, {}, hint)
    except AuthenticationError:  # only who asks for the token is told it
        check_token_address(address, plain_http)
        known = token()
    try:
        return Client(address, {"Authorization": f"Bearer {known}"}, hint)
    except AuthenticationError:
        raise UserError(
            f"the cluster at {address} refuses our token; put that cluster's own into "
            f"{TOKENS[0]}, or into ~/.ray/auth_token"
        ) from None


def check_token_address(address: str, plain_http: bool) -> None:
    """UserError where the user's token is not for that address: it is for loopback, and for the
    one that TOKEN_ADDRESS names, over https unless plain_http.
    """
    if is_loopback(address):
        return
    fixes = []
    if os.environ.get(TOKEN_ADDRESS, "").rstrip("/") != address:
        fixes.append(f"if it is that cluster's own, set {TOKEN_ADDRESS}={address}")
    if not address.startswith("https://") and not plain_http:
        fixes.append(
            "use https or an ssh tunnel, or, to let everybody on the way read it, set "
            "plain_http: true beside address in the cluster file"
        )
    if fixes:
        raise UserError(
            f"the cluster at {address} asks for a token; yours was not sent, since it is for this "
            f"machine's loopback: {'; and '.join(fixes)}"
        )


def token() -> str:
    """The cluster's token, from where Ray looks for it, in the same order. UserError where there is
    none.
    """
    if text := os.environ.get(TOKENS[0], "").strip():
        return text
    path = Path(os.environ.get(TOKENS[1]) or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip()
    except OSError:
        raise UserError(
            f"the cluster asks for a token and there is none at {path}; put the cluster's "
            f"own into {TOKENS[0]} or there"
        ) from None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


# ---- jobs ----------------------------------------------------------------------------------------


def base_id(run: str) -> str:
    """The first part of the ids of all jobs on a run: the same from any machine, so that a second
    command finds the first's.
    """
    name = re.sub(r"[^a-z0-9]+", "-", run.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")[:40]
    return f"adversa-{name or 'run'}-{digest(run.rstrip('/'), size=4)}"


def command(stage: str, run: str, settings: list[str], options: list[str]) -> str:
    """What the head's shell is given: every word quoted, so that a name can not be read as a
    command.
    """
    made = ["config.yaml", "--run-dir", run]
    given = [word for setting in settings for word in ("--set", setting)]
    return shlex.join(["python", "-m", "adversa.cli", stage, *made, *given, *options])


def jobs(client: Client) -> list[Job]:
    """Those that work, or worked, on a run of ours, the oldest first; also what `ray job submit --
    adversa loop ...` started.
    """
    found = [
        _job(details, run)
        for details in client.list_jobs()
        if details.submission_id and (run := run_of(details))
    ]
    return sorted(found, key=lambda job: job.began or 0.0)


def run_of(details: Any) -> str | None:
    """The run folder a job works on: as we noted it, or as its command says. None where it is not
    adversa's.
    """
    if noted := (details.metadata or {}).get(RUN):
        return str(noted)
    try:
        words = shlex.split(details.entrypoint)
    except ValueError:
        return None
    commands = [
        after
        for word, after in itertools.pairwise(words)
        if word.rsplit("/", 1)[-1] in ("adversa", "adversa.cli")
    ]
    if not set(commands[:1]) & WORKING:  # others look at a run, or make a plan of one
        return None
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word == "--run-dir" or word.startswith("--run-dir="):
            return (after if word == "--run-dir" else word.partition("=")[2]) or None
    return None


def job(client: Client, job_id: str, run: str) -> Job:
    return _job(client.get_job_info(job_id), run)


def _job(details: JobDetails, run: str) -> Job:
    message = " ".join((details.message or "").split())
    began, ended = (None if t is None else t / 1000 for t in (details.start_time, details.end_time))
    return Job(
        details.submission_id or "",
        run,
        details.status.value,
        message,
        details.driver_exit_code,
        began,
        ended,
    )


def of_run(client: Client, run: str) -> list[Job]:
    """The jobs on one run, the latest last; one that is at work after all that are over."""
    found = [job for job in jobs(client) if job.run.rstrip("/") == run.rstrip("/")]
    return sorted(found, key=lambda job: not job.is_over)


def submit(
    client: Client, run: str, entrypoint: str, config_yaml: str, folder: Path
) -> tuple[Job, bool]:
    """(the job on the run, whether it is new): the one that is at work, or a new one where none is.

    The runtime environment carries this adversa and the configuration; what adversa needs must be
    installed on the cluster. folder: an empty one, for the files that go along.
    """
    known = of_run(client, run)
    if known and not known[-1].is_over:
        return known[-1], False
    (folder / "config.yaml").write_text(config_yaml)
    job_id = f"{base_id(run)}-{_attempt(known, run)}"
    new = _hand_over(
        client, job_id, entrypoint, {"working_dir": str(folder)}, {RUN: run}
    )  # else another was a moment faster
    return job(client, job_id, run), new


def beside(client: Client, run: str, stage: str, entrypoint: str, files: Path | None = None) -> Job:
    """Let a command run beside the job that works on a run, and whatever else the cluster does.
    files: a folder that goes along.
    """
    job_id = f"adversa-{stage}-{uuid.uuid4().hex[:8]}"
    _hand_over(client, job_id, entrypoint, {} if files is None else {"working_dir": str(files)}, {})
    return job(client, job_id, run)


def _hand_over(
    client: Client, job_id: str, entrypoint: str, files: dict[str, str], notes: dict[str, str]
) -> bool:
    """Whether the job is new; the cluster may know that id already."""
    environment = files | {
        "py_modules": [str(Path(__file__).resolve().parents[1])],
        "excludes": ["__pycache__"],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), "RAY_USAGE_STATS_ENABLED": "0"},
    }
    ends = time.monotonic() + YOUNG_SECONDS
    while True:
        try:
            client.submit_job(
                entrypoint=entrypoint, submission_id=job_id, runtime_env=environment, metadata=notes
            )
            return True
        except RuntimeError as e:
            if "already exists" in str(e):
                return False
            if "No available agent" not in str(e) or time.monotonic() > ends:
                raise UserError(f"the cluster did not take the job: {_last_line(str(e))}") from None
        time.sleep(1)


def _attempt(known: list[Job], run: str) -> int:
    tried = [found.id.rsplit("-", 1) for found in known]
    return 1 + max((int(n) for base, n in tried if base == base_id(run) and n.isdigit()), default=0)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    return lines[-1] if lines else "no reason given"


def follow(
    client: Client, start: Job, show: Callable[[str], None], patience: float = PATIENCE
) -> Job:
    """Hand every line of a job's log to `show`, as they come, until the job is over; the job at its
    end.

    Polls, because a poll survives what a stream does not (a laptop that slept, a tunnel that was
    opened anew). Ray hands out a log whole, so the longer it gets the rarer we ask. UserError when
    nothing has answered for `patience` seconds.
    """
    seen, silent = 0, None
    while True:
        current, text = None, None
        try:
            current = job(client, start.id, start.run)
            text = client.get_job_logs(start.id)
            silent = None
        except (RuntimeError, ConnectionError, requests.exceptions.RequestException) as e:
            if current is not None and current.is_over:
                return current  # its log died with its node
            silent = _silence(e, silent, start, show, patience)
        if current is not None and text is not None:
            end = len(text) if current.is_over else text.rfind("\n") + 1
            for line in text[seen:end].splitlines():
                show(line)
            seen = max(seen, end)
            if current.is_over:
                return current
        time.sleep(min(10.0, 1.0 + seen / 100_000))


def _silence(
    error: Exception,
    since: float | None,
    followed: Job,
    show: Callable[[str], None],
    patience: float,
) -> float:
    """Since when the cluster has not answered; a line at the beginning, a UserError at the end of
    our patience.
    """
    if "does not exist" in str(error):  # the head was replaced by one that knows nothing of the job
        raise UserError(
            f"the cluster no longer knows the job {followed.id}; run the same command "
            "again to resume"
        ) from None
    if since is None:
        show(f"the cluster does not answer; waiting for it, {patience:.0f} s at most")
        return time.monotonic()
    if time.monotonic() - since > patience:
        raise UserError(
            f"the cluster has not answered for {patience:.0f} s; the job {followed.id} may "
            "still run"
        ) from None
    return since


def stop(client: Client, running: Job, seconds: float = STOP_SECONDS + 30) -> Job:
    """Ask a job to stop, as Ctrl-C would, and wait; the job at its end, or as it is after so
    long.
    """
    client.stop_job(running.id)
    ends = time.monotonic() + seconds
    while not (now := job(client, running.id, running.run)).is_over and time.monotonic() < ends:
        time.sleep(0.5)
    return now


def last_lines(client: Client, job_id: str, count: int) -> list[str]:
    """The end of a job's log."""
    return client.get_job_logs(job_id).splitlines()[-count:]


def alive(client: Client) -> int:
    """Nodes that are up, the head among them."""
    summary = (client.get("/nodes", view="summary") or {}).get("summary", [])
    return sum(node.get("raylet", {}).get("state") == "ALIVE" for node in summary)
