"""How a process comes to Ray: an embedded one on this machine, or the cluster that RAY_ADDRESS names. No Ray Data, no Ray Train."""

from __future__ import annotations

import logging
import os
import signal
import threading

import ray

from adversa import distributed
from adversa.config import Cluster
from adversa.types import UserError


def start(cluster: Cluster, verbose: bool) -> None:
    """UserError where no Ray can be had. In a worker of a cluster there is one already."""
    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(level)
    shared = {"log_to_driver": verbose, "logging_level": level, "ignore_reinit_error": True}
    named = distributed.address()
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        if named:
            ray.init(address=named, **shared)
        else:
            store = cluster.object_store_mb << 20
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # no node of an embedded Ray is taken away
            # Nobody asks an embedded Ray for metrics or for its tasks' history: a third of what its processes take from a training.
            for name in ("RAY_event_stats", "RAY_enable_metrics_collection", "RAY_task_events_report_interval_ms"):
                os.environ.setdefault(name, "0")
            ray.init(address="local", num_cpus=cluster.cpus, object_store_memory=store, include_dashboard=False, **shared)
    except Exception as e:  # of any class: a node that is late at its start is a plain Exception
        where = f"the Ray cluster RAY_ADDRESS={named}" if named else "Ray on this machine"
        raise UserError(f"cannot start {where}: {' '.join(str(e).split())[:300]}; or try --engine local") from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # ray puts a handler of its own in its place, which prints stacks and dies


def stop() -> None:
    """Leave the cluster. What detached actors do there goes on."""
    ray.shutdown()
