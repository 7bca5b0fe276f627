"""Ray: the only package that imports it. `RayEngine` runs the same work as `LocalEngine` on a
machine or a cluster.
"""

import os

# Set before ray is imported: no usage report from a machine that may have no internet, no chatter.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault(
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1"
)  # a task that asked for no GPU sees none
# Seconds between two looks of Ray Train's controller at its workers (2 by default): their end and
# their reports wait for one.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# Ray Tune: no result files of its own beside ours, no tables on the terminal; Ctrl-C stays with the
# command; a trial keeps the user's folder; the experiment's state, which nobody reads, is written
# every hour.
for _name, _value in {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
}.items():
    os.environ.setdefault(_name, _value)


def address() -> str | None:
    """Of the cluster to work on; None: there is none, and Ray is embedded in this process."""
    named = os.environ.get("RAY_ADDRESS", "")
    return None if named in ("", "local") else named
