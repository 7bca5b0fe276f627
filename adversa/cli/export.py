"""The command `export`: what a run made, as a data set and as models. `cli.py` declares it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from adversa.api import Run
from adversa.cli.console import progress, say
from adversa.types import UserError

if TYPE_CHECKING:
    from adversa.export.run import ExportPlan, Published
    from adversa.storage.path import StoragePath


def export(
    run: StoragePath,
    out: Path,
    form: str,
    what: str,
    arm: str | None,
    number: int | None,
    rejected: bool,
    shard_mb: float,
    screen: Console,
) -> None:
    """`adversa export`: kept images with a dataset card, classifiers with model cards, into a
    folder.
    """
    from adversa.export import run as export_run

    saved = Run(run)
    if not 0 < shard_mb < float("inf"):
        raise UserError(f"--shard-mb {shard_mb:g}: give a number of megabytes above 0")
    chosen = export_run.plan(
        saved.config,
        saved.folder,
        export_run.Selection(what, form, arm, number, rejected, int(shard_mb * 1e6)),
    )
    with progress(screen) as show:
        found = export_run.publish(chosen, out, show)
    for line in _reported(found, chosen, out):
        say(screen, line)


def _reported(found: Published, chosen: ExportPlan, out: Path) -> list[str]:
    lines = []
    if found.images is not None:
        counts = ", ".join(f"{n} {name}" for name, n in found.by_class.items())
        lines.append(f"{found.images} images in {out}" + (f": {counts}" if counts else ""))
    elif chosen.selection.what == "all":
        lines.append(f"no images: {chosen.selection.arm or 'the run'} generates none")
    if found.models:
        lines.append(f"{len(found.models)} models in {out}: {', '.join(found.models)}")
    return [
        *lines,
        f"{found.written} files written"
        if found.written
        else "nothing was missing: no file written",
    ]
