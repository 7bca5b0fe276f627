"""What every benchmark shares: --quick, --json FILE, the table, the record."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from adversa import runs


@dataclass(frozen=True)
class Result:
    """A measured figure; bar: what it must reach, as text; holds: whether it does (None: no bar)."""

    name: str
    value: float
    unit: str
    bar: str = ""
    holds: bool | None = None


def parser(doc: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--quick", action="store_true", help="the same measurements on less work, under a minute")
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
        record = {"commit": runs.git_commit(), "machine": runs.machine(), "results": [asdict(r) for r in results]}
        path.write_text(json.dumps(record, indent=2) + "\n")
    if any(r.holds is False for r in results):
        sys.exit(1)
