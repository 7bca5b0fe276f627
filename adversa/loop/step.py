"""A step is a function from folders to a folder. Recipe first, parts, manifest last: so running it again is how it resumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adversa import runs
from adversa.loop.engine import Done

Facts = dict[str, Any]


def run_step(folder: Path, recipe: runs.Recipe, body: Callable[[runs.Progress], Facts]) -> None:
    """Run `body` unless the step is finished; it must write every part and return at least `rows`.

    UserError where the folder was made by another recipe, or cannot be written.
    """
    with runs.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if runs.begin(folder, recipe):
            return
        for leftover in folder.glob(".part-*"):
            leftover.unlink()  # half-written by a process that was killed
        progress = runs.Progress(folder)
        facts = body(progress)
        seconds = progress.elapsed
        runs.finish(folder, recipe, **({"seconds": seconds, "compute_seconds": seconds, "device_seconds": seconds} | facts))


def cost(done: Sequence[Done], workers: int) -> Facts:
    """Compute seconds on the critical path (parts shared evenly among the workers) and device seconds in all."""
    total = sum(d.seconds for d in done)
    return {"compute_seconds": total / max(1, min(workers, len(done))), "device_seconds": total}


def inputs(**folders: Path) -> dict[str, str]:
    """The fingerprints of what a step reads."""
    return {name: runs.fingerprint(folder) for name, folder in folders.items()}
