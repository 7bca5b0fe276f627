"""A run's numbers to Prometheus, the way Ray's own take: each node has a port that serves them.
cluster/grafana.json shows them.
"""

from __future__ import annotations

import logging
import threading
import time

from ray.util.metrics import Gauge

from adversa.config import Config
from adversa.pipeline.metrics import NAMES, run_metrics
from adversa.run.folder import RunDir

log = logging.getLogger("adversa.metrics")
LOOK_SECONDS = 5.0


def follow(config: Config, run: RunDir) -> threading.Thread:
    """Export the numbers from this process until it ends. A run goes on where that fails."""
    thread = threading.Thread(target=_export, args=(config, run), daemon=True)
    thread.start()
    return thread


def _export(config: Config, run: RunDir) -> None:
    gauges = {name: Gauge(name, text, tag_keys=("run",)) for name, text in NAMES.items()}
    read, failing = run_metrics(config, run), False
    while True:
        try:
            for name, value in read().items():
                gauges[name].set(value, tags={"run": run.root.name})
            failing = False
        except Exception as e:  # whatever it is, it must not end the run it tells of
            if not failing:
                log.warning("metrics are not exported for now: %s", e)
            failing = True
        time.sleep(LOOK_SECONDS)
