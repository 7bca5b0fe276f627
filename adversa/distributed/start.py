"""How a process comes to Ray: an embedded one on this machine, or the cluster that RAY_ADDRESS
names. No Ray Data, no Ray Train.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import ray
from ray._private import ray_constants
from ray.job_config import JobConfig

from adversa import distributed
from adversa.config import Cluster
from adversa.run.environment import cpus
from adversa.types import UserError

KNOCK_SECONDS = 10.0
# Settings of an embedded Ray; what the environment has comes first.
EMBEDDED = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # no node of it is taken away
    # Nobody asks it for metrics or for its tasks' history: a third of what its processes take from
    # a training.
    "RAY_event_stats": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    # Its workers are the command, and have the command's priority; by default they give way (15).
    "RAY_worker_niceness": "0",
}
# By default as many workers as there are CPUs, actors among them, are kept while they are idle: on
# a small machine each stream would wait for new ones (two fifths of a short run's CPU time).
KEPT_WORKERS = 16


class _Job(JobConfig):
    """Ray puts the folder that the command was started in before all others in its workers' search
    for modules: in a folder from a stranger a file `numpy.py` would be run there. Only where this
    process itself looks for modules do they.
    """

    def _serialize(self) -> Any:  # bytes, where Ray's own annotation says str
        known = {os.path.abspath(p) for p in sys.path}
        self._py_driver_sys_path = [
            p for p in self._py_driver_sys_path if os.path.abspath(p) in known
        ]
        return super()._serialize()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts in here listens on this machine's loopback alone: whoever reaches its ports
    can run any code. On Linux Ray would take the machine's own address, for nodes that may join;
    this switch is what keeps it from that on Windows and macOS.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def start(cluster: Cluster, verbose: bool) -> None:
    """UserError where no Ray can be had. In a worker of a cluster there is one already."""
    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(level)
    init = partial(
        ray.init,
        log_to_driver=verbose,
        logging_level=level,
        ignore_reinit_error=True,
        job_config=_Job(),
    )
    named = distributed.address()
    on_terminate = signal.getsignal(signal.SIGTERM)
    if named and not ray.is_initialized():
        _knock(named)
    try:
        if named:
            init(address=named)
        else:
            store = cluster.object_store_mb << 20
            kept = max(cluster.cpus or cpus(), KEPT_WORKERS)
            for name, value in (EMBEDDED | {"RAY_num_workers_soft_limit": str(kept)}).items():
                os.environ.setdefault(name, value)
            with _on_loopback():
                init(
                    address="local",
                    num_cpus=cluster.cpus,
                    object_store_memory=store,
                    include_dashboard=False,
                )
    except Exception as e:  # of any class: a node that is late at its start is a plain Exception
        where = f"the Ray cluster RAY_ADDRESS={named}" if named else "Ray on this machine"
        fix = f"{_short_folder()}; " if "AF_UNIX path" in str(e) else ""
        raise UserError(
            f"cannot start {where}: {' '.join(str(e).split())[:300]}; {fix}or try --engine local"
        ) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, on_terminate
        )  # ray puts a handler of its own in its place, which prints stacks and dies


def _short_folder() -> str:
    """What to do about sockets whose names are too long: they lie in the temporary folder."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    given = os.environ.get(name, tempfile.gettempdir())
    return f"set {name} (now {given}) to a folder with a shorter name, such as /tmp"


def _knock(named: str) -> None:
    """UserError where nothing listens at HOST:PORT: Ray itself would try for a quarter of an hour.
    Other forms are left to it.
    """
    host, _, port = named.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()
    except (OSError, OverflowError) as e:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={named} ({e}); see whether its head is "
            "up (`ray status`), correct the address, "
            "or unset it to work on this machine"
        ) from None


def stop() -> None:
    """Leave the cluster. What detached actors do there goes on."""
    on_terminate = signal.getsignal(signal.SIGTERM)
    ray.shutdown()
    signal.signal(
        signal.SIGTERM, on_terminate
    )  # Ray's own code below Python has put the system's default in its place
