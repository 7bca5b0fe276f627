"""Ray's cluster launcher, by its own commands: where the head is, a tunnel to its jobs server, up
and down.

The commands run as lists of words, never through a shell of ours; what a cluster file says reaches
them as the file's name alone.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import requests

from adversa.distributed import jobs
from adversa.distributed.cluster_file import ClusterFile, is_loopback
from adversa.types import UserError

# The `ray` of this environment, whatever PATH says, and whatever modules lie in the folder one is
# in (-P).
RAY = [sys.executable, "-P", "-m", "ray.scripts.scripts"]
PORT = 8265  # of the dashboard on the head, where cluster files leave it
HEAD_SECONDS = 120.0  # a cloud's API may take its time
TUNNEL_SECONDS = 90.0
NODE_SECONDS = 1800.0  # a spot machine comes, pulls an image, installs


@contextlib.contextmanager
def session(cluster: ClusterFile) -> Iterator[jobs.Client]:
    """A client of the cluster's jobs server, for as long as the context lasts. UserError, one line,
    where there is none, or where it falls silent.
    """
    try:
        with _reached(cluster) as client:
            yield client
    except requests.exceptions.RequestException as e:
        raise UserError(
            f"the cluster of {cluster.path} has stopped answering ({type(e).__name__}); "
            "jobs on it may go on"
        ) from None


@contextlib.contextmanager
def _reached(cluster: ClusterFile) -> Iterator[jobs.Client]:
    if cluster.asks.address:
        opened = (
            "is it up, and the tunnel to it open?"
            if is_loopback(cluster.asks.address)
            else "is it up?"
        )
        hint = f"{opened} (address in {cluster.path})"
        yield jobs.connect(cluster.asks.address, hint, cluster.asks.plain_http)
        return
    if cluster.kind == "kuberay":
        raise UserError(
            f"{cluster.path}: no address in the annotation adversa; `kubectl port-forward "
            f"svc/NAME-head-svc {PORT}:{PORT}` and set "
            f"address: http://127.0.0.1:{PORT}"
        )
    ip = head_ip(cluster)
    hint = f"is Ray running there? `ray up {cluster.path}` starts it"
    if ipaddress.ip_address(ip).is_loopback:
        yield jobs.connect(f"http://{ip}:{PORT}", hint)
        return
    with tunnel(cluster) as address:
        yield jobs.connect(address, hint)


def head_ip(cluster: ClusterFile) -> str:
    """UserError where the launcher knows of no head."""
    words = [*RAY, "get-head-ip", str(cluster.path.resolve())]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=HEAD_SECONDS,
            stdin=subprocess.DEVNULL,
            env=_quiet(),
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"`ray get-head-ip {cluster.path}` took more than {HEAD_SECONDS:.0f} s; is "
            f"{cluster.provider} reachable?"
        ) from None
    for line in reversed(done.stdout.split() if done.returncode == 0 else []):
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(line))
    raise UserError(
        f"no head of the cluster {cluster.name} is up "
        f"({_reason(done.stderr or done.stdout)}); bring it up with --up, or `ray up "
        f"{cluster.path}`"
    )


@contextlib.contextmanager
def tunnel(cluster: ClusterFile) -> Iterator[str]:
    """The address, on this machine's loopback, of an ssh tunnel to the head's jobs server (`ray
    dashboard`).
    """
    port = _free_port()
    words = [
        *RAY,
        "dashboard",
        str(cluster.path.resolve()),
        "--port",
        str(port),
        "--remote-port",
        str(PORT),
    ]
    with tempfile.TemporaryFile("w+") as said:
        # A session of its own: Ctrl-C is ours alone, and all it starts can be ended together.
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_quiet(),
        )
        try:
            _wait_open(process, port, said, cluster)
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_open(
    process: subprocess.Popen[bytes], port: int, said: IO[str], cluster: ClusterFile
) -> None:
    ends = time.monotonic() + TUNNEL_SECONDS
    while time.monotonic() < ends:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None:
            break
        time.sleep(0.2)
    said.seek(0)
    raise UserError(
        f"no ssh tunnel to the head of {cluster.name} ({_reason(said.read())}); try `ray "
        f"attach {cluster.path}`"
    )


def up(cluster: ClusterFile) -> None:
    """`ray up`, with its own output. UserError where it fails, or would after it has started the
    head.
    """
    if missing := [m for m in cluster.mounts if not Path(m).expanduser().exists()]:
        fix = (
            "make it: ray get-auth-token --generate"
            if missing[0].endswith("auth_token")
            else "run this where it is, or correct it"
        )
        raise UserError(
            f"{cluster.path}: file_mounts names {missing[0]}, which is not on this machine; {fix}"
        )
    _run(cluster, "up", "--yes")


def down(cluster: ClusterFile) -> None:
    _run(cluster, "down", "--yes")


def wait_for_nodes(
    client: jobs.Client,
    cluster: ClusterFile,
    show: Callable[[str], None],
    seconds: float = NODE_SECONDS,
) -> None:
    """Until the workers that the file wants from the start are there: a run looks at its beginning
    at what the cluster has.
    """
    wanted, ends, told = cluster.workers + 1, time.monotonic() + seconds, -1
    while (there := jobs.alive(client)) < wanted:
        if time.monotonic() > ends:
            raise UserError(
                f"{there} of {wanted} machines came within {seconds:.0f} s; see `ray "
                f"monitor {cluster.path}`"
            )
        if there != told:
            show(f"{there} of {wanted} machines are up")
            told = there
        time.sleep(min(2.0, seconds))


def _run(cluster: ClusterFile, *words: str) -> None:
    if cluster.kind == "kuberay":
        verb = "apply" if words[0] == "up" else "delete"
        raise UserError(
            f"--{words[0]}: {cluster.path} is a KubeRay manifest; use `kubectl {verb} -f "
            f"{cluster.path}`"
        )
    code = subprocess.run(
        [*RAY, words[0], str(cluster.path.resolve()), *words[1:]],
        stdin=subprocess.DEVNULL,
        env=_quiet(),
    ).returncode
    if code:
        raise UserError(
            f"`ray {words[0]} {cluster.path}` ended with exit code {code}; its own lines "
            "above say why"
        )


def _quiet() -> dict[str, str]:
    return {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}


def _reason(text: str) -> str:
    """The last line a command said, without colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
