"""What every benchmark shares: --quick, --json FILE, the table, the record, memory of a command."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from adversa.run import environment


@dataclass(frozen=True)
class Result:
    """A measured figure; bar: what it must reach, as text; holds: whether it does (None: no
    bar).
    """

    name: str
    value: float
    unit: str
    bar: str = ""
    holds: bool | None = None


class Memory:
    """Largest sum of the proportional set sizes (shared pages counted once) of a process and its
    descendants, in bytes.
    """

    def __init__(self, pid: int, seconds: float = 1.0) -> None:
        """seconds: between two looks; what comes and goes between them is not seen."""
        self.pid, self.seconds, self.peak, self.stopped = pid, seconds, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stopped.wait(self.seconds):
            self.peak = max(self.peak, pss(self.pid))

    def stop(self) -> int:
        self.stopped.set()
        self.thread.join()
        return self.peak


def pss(pid: int) -> int:
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended while we looked
    return total


def parser(doc: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--quick", action="store_true", help="the same measurements on less work, under a minute"
    )
    found.add_argument("--json", type=Path, help="write the results to this file too")
    return found


def publish(results: list[Result], path: Path | None) -> None:
    """Print the table; write the JSON; exit with 1 where a bar does not hold."""
    table = Table(box=None, pad_edge=False)
    for column in ("name", "value", "unit", "bar", "holds"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for r in results:
        table.add_row(
            r.name,
            f"{r.value:.3g}" if abs(r.value) < 1000 else f"{r.value:.0f}",
            r.unit,
            r.bar,
            {None: "", True: "yes", False: "NO"}[r.holds],
        )
    Console().print(table)
    if path is not None:
        record = {
            "commit": environment.git_commit(),
            "machine": environment.machine(),
            "results": [asdict(r) for r in results],
        }
        path.write_text(json.dumps(record, indent=2) + "\n")
    if any(r.holds is False for r in results):
        sys.exit(1)
