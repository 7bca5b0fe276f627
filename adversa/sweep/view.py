"""What a person sees of a sweep: how many trials are done, running and left in each cell, and the
best of each arm so far.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adversa.config import Config
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.storage.path import StoragePath
from adversa.sweep import grid

FRESH = 10.0  # seconds after which nobody is at work on what progress.json names
WORDS = {
    "balanced_accuracy": "balanced accuracy",
    "auroc_macro": "macro AUROC",
    "worst_class": "worst class's sensitivity",
}
_known: dict[StoragePath, dict[str, Any]] = {}  # manifests of finished trials: they do not change


def _made(folder: StoragePath) -> dict[str, Any] | None:
    if (
        folder not in _known
        and (found := files.read_json(folder / step_folder.MANIFEST)) is not None
    ):
        _known[folder] = found
    return _known.get(folder)


def table(config: Config, run: RunDir) -> Table:
    """A row a cell: trials by state, and of each arm the ratio that is best so far (mean over its
    seeds), on `select`.
    """
    if config.sweep.search is not None:
        return searched(config, run)
    metric, progress = (
        config.sweep.metric,
        files.read_json(run.root / "trials" / step_folder.PROGRESS) or {},
    )
    running = (
        progress.get("running", []) if time.time() - progress.get("updated", 0) < FRESH else []
    )
    names = list(
        dict.fromkeys(
            v.name
            for c in grid.cells(config.sweep)
            for v in [grid.Variant("real"), *grid.variants(config, c)]
        )
    )
    shown = Table(
        title=f"best {WORDS.get(metric, metric)} on select so far (ratio)",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for column in ("real a class", "done", "running", "left", *names):
        shown.add_column(
            column.replace("-", "-\n"),
            justify="left" if column == "real a class" else "right",
            vertical="bottom",
            overflow="fold",
        )
    for cell in grid.cells(config.sweep):
        points = [p for p in grid.points(config) if p.cell == cell]
        scores: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        done = 0
        for p in points:
            if (made := _made(grid.result_dir(run, p))) is not None:
                done += 1
                scores[p.variant.name][p.ratio].append(made["metrics"].get(metric, np.nan))
        busy = sum(name.startswith(f"{cell.name}/") for name in running)
        left = max(0, len(points) - done - sum(p.name in running for p in points))
        best = [_best(scores[name]) for name in names]
        shown.add_row(
            "all" if cell.count is None else str(cell.count),
            str(done),
            str(busy),
            str(left),
            *map(Text, best),
        )
    return shown


def searched(config: Config, run: RunDir, most: int = 10) -> Table:
    """The best trials of a search in place of the grid."""
    metric = config.sweep.metric
    shown = Table(
        title=f"{WORDS.get(metric, metric)} on select",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for column in ("trial", "state", "score"):
        shown.add_column(column, justify="right" if column == "score" else "left", overflow="fold")
    found = (files.read_json(run.root / grid.SEARCHED) or {}).get("trials") or _so_far(run, metric)
    asks = config.sweep.search.space if config.sweep.search is not None else {}
    for row in found[:most]:
        reported = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in row["asks"].items()
            if k in asks
        )
        score = row["metrics"][metric] if row["state"] == "finished" else row["score"]
        shown.add_row(Text(reported), row["state"], f"{score:.3f}")
    return shown


def _so_far(run: RunDir, metric: str) -> list[dict[str, Any]]:
    """The finished trials of a search that goes on, the best first."""
    folder = run.root / "search"
    made = (
        [_made(p.parent) for p in folder.rglob(step_folder.MANIFEST) if p.parent.name == "result"]
        if folder.exists()
        else []
    )
    rows = [
        {"asks": m["trial"]["asks"], "state": "finished", "metrics": m["metrics"]}
        for m in made
        if m is not None
    ]
    return sorted(rows, key=lambda r: -r["metrics"][metric])


def _best(scores: Mapping[float, list[float]]) -> str:
    means = {ratio: float(np.mean(x)) for ratio, x in scores.items()}
    if not means:
        return "-"
    ratio = max(means, key=lambda r: (means[r], -r))
    return f"{means[ratio]:.3f}" + (f" ({ratio:g})" if ratio else "")


def closing(console: Console, config: Config, run: RunDir, page: object) -> None:
    """The last lines of a sweep."""
    console.print(table(config, run))
    found = files.read_json(run.root / "sweep.json") or {}
    for line in found.get("sentences", []):
        console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)
