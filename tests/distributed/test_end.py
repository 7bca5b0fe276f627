"""Processes that stay behind when Ray is shut down, without Ray."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

from adversa.distributed.engine import end


def test_what_lingers_is_killed_and_what_ends_by_itself_is_not():
    lingering, ending = (
        subprocess.Popen(["sleep", "60"]),
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"]),
    )
    started = time.monotonic()
    end([psutil.Process(p.pid) for p in (lingering, ending)], 3.0)
    assert lingering.wait(5) == -9 and ending.wait(5) == 0 and time.monotonic() - started < 10


def test_nothing_to_wait_for_takes_no_time():
    gone = subprocess.Popen(["true"])
    process = psutil.Process(gone.pid)
    gone.wait()
    started = time.monotonic()
    end([process], 30.0)
    end([], 30.0)
    assert time.monotonic() - started < 5
