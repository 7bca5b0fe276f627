"""The time, the versions, the commit and the machine that a manifest records."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

from adversa.types import Json


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in (
        "adversa",
        "torch",
        "ray",
        "timm",
        "diffusers",
        "numpy",
        "pyarrow",
        "scikit-learn",
        "pillow",
    ):
        with contextlib.suppress(
            metadata.PackageNotFoundError
        ):  # ray and diffusers are absent where only the core is installed
            found[package] = metadata.version(package)
    return found


@cache
def git_commit() -> str | None:
    """The commit of the checkout adversa runs from, with + when changed; None when installed."""
    here = Path(__file__).parents[1]
    if not (here.parent / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (
        commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")
        if commit.returncode == 0
        else None
    )


CPU_MAX = Path(
    "/sys/fs/cgroup/cpu.max"
)  # of a container: "QUOTA PERIOD" in microseconds, or "max PERIOD"


def cpus() -> int:
    """How many CPUs this process may use: affinity (taskset, batch systems) and a container's
    quota; the machine may have more.
    """
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_MAX.read_text().split()
        return max(1, min(free, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or no quota
        return max(1, free)


@cache
def machine() -> Json:
    return {"platform": platform.platform(), "cpus": os.cpu_count()}
