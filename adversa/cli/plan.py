"""`adversa plan`: what a run amounts to on the machines there are, before it begins."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from adversa.cli.console import say
from adversa.types import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from adversa.config import Config
    from adversa.engine.resources import Kind, Node
    from adversa.estimate.measure import Measured
    from adversa.estimate.plan import Cost, Placement
    from adversa.run.folder import RunDir
    from adversa.storage.path import StoragePath

FIGURES = "adversa-plan-figures "  # begins the line of a job's log that holds them


def plan(config: Config, run: RunDir, record: Path | None, screen: Console, seconds: float) -> None:
    """Print the plan of a run on the cluster that RAY_ADDRESS names, or on this machine.

    record: a JSON file for the figures; "-": a line of the output. UserError for what cannot fit:
    before anything is measured, or for want of memory after the plan.
    """
    from adversa import distributed
    from adversa.engine import resources
    from adversa.estimate import memory, plan
    from adversa.storage import files

    role, found = plan.roles(config, run), nodes(config)
    faults = resources.faults(found, config.cluster, distributed.address() is not None)
    resources.refuse([*faults, *memory.disk_faults(config, run.root, role)])
    with screen.status("measuring"):
        measured, found = measure(config, found, seconds)
    at = plan.placement(found, config)
    costs = plan.costs(config, run, role, at, measured)
    needs = memory.needs(measured, found)
    takes = ", ".join(f"{kind} {memory.size(takes)}" for kind, takes in needs.items())
    said = [f"Memory of each {'GPU' if resources.on_gpus(found) else 'process'}, at most: {takes}."]
    if any(at.waiting):
        said.append("No room yet for {} training workers, {} samplers.".format(*at.waiting))
    for part in (where(at), how_long(costs), *said, note(measured)):
        screen.print(part, highlight=False, markup=False, emoji=False)
    each = zip(at.nodes, at.shares["workers"], at.shares["samplers"], strict=True)
    figures = {
        "nodes": [asdict(n) | {"training_workers": w, "samplers": s} for n, w, s in each],
        "waiting": dict(zip(("training_workers", "samplers"), at.waiting, strict=True)),
        "memory_bytes": needs,
        "disk_bytes": memory.disk_bytes(config, role),
        "stages": [asdict(cost) for cost in costs],
        "seconds": sum(c.seconds for c in costs),
        "device_seconds": sum(c.device_seconds for c in costs),
        "measured": [{"kind": kind, **asdict(one)} for kind, one in measured.items()],
    }
    if str(record) == "-":
        typer.echo(FIGURES + json.dumps(figures))
    elif record is not None:
        with files.writing(record.parent, "--json"):
            files.write_json(record, figures)
    resources.refuse(memory.faults(needs, config, found))


def where(at: Placement) -> Table:
    """Machines of one kind, with the same share of the work, are one row."""
    from adversa.estimate.memory import size

    made = table("Where it runs", "machines", "memory", "of a GPU", "training workers", "samplers")
    each = zip(at.nodes, at.shares["workers"], at.shares["samplers"], strict=True)
    rows = Counter((*n.kind, n.memory, n.gpu_memory, w, s) for n, w, s in each)
    for (cpus, gpus, gpu, memory, gpu_memory, *shares), many in rows.items():
        what = f"{many} x {cpus:g} CPUs" + (f", {gpus:g} x {gpu or 'GPU'}" if gpus else "")
        made.add_row(what, *(size(m) if m else "" for m in (memory, gpu_memory)), *map(str, shares))
    return made


def how_long(costs: list[Cost]) -> Table:
    made = table("How long", "stage", "amount", "time", "device-hours")
    for cost in filter(lambda c: c.work, costs):
        amount = ", ".join("at most " * w.bound + w.shown for w in cost.work if w.shown)
        times = ["done"] if cost.done else [clock(cost.seconds), hours(cost.device_seconds)]
        made.add_row(cost.stage, amount, *times)
    wall, device = sum(c.seconds for c in costs), sum(c.device_seconds for c in costs)
    made.add_row("in all", "", clock(wall), hours(device), style="bold")
    return made


def nodes(config: Config) -> list[Node]:
    """The nodes of the cluster, else this machine."""
    from adversa import distributed
    from adversa.distributed import nodes, start

    if distributed.address() is None:
        return [nodes.here(config.cluster)]
    start.start(config.cluster, verbose=False)
    return nodes.there()


def measure(
    config: Config, found: list[Node], seconds: float
) -> tuple[Mapping[Kind, Measured], list[Node]]:
    """(what was measured on a node of each kind, the nodes with their GPUs' memory)."""
    from adversa import distributed
    from adversa.distributed import nodes
    from adversa.estimate import measure

    if distributed.address() is None:
        return {found[0].kind: measure.measure(config, int(found[0].cpus), seconds)}, found
    measured = nodes.measured(config, found, seconds)
    return measured, nodes.with_memory(found, measured)


def note(measured: Mapping[Kind, Measured]) -> str:
    """What must be known to read the figures."""
    from adversa.estimate.plan import BESIDE

    took = max(m.took for m in measured.values())
    return (
        f"Measured in {took:.0f} s: the median steps of a process alone. A run takes up to "
        f"{BESIDE:g} times as long, and less where mining finds few hard cases."
    )


def table(title: str, *columns: str) -> Table:
    from rich.table import Table

    made = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for name in columns:
        made.add_column(name, overflow="fold")
    return made


def clock(seconds: float) -> str:
    from adversa.cli.view import clock

    return clock(max(1.0, round(seconds)))


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.{3 if seconds < 360 else 2 if seconds < 36000 else 0}f}"


# ---- on a cluster -------------------------------------------------------------------------------


def there(
    file: Path,
    path: Path | None,
    run_dir: StoragePath | None,
    settings: list[str],
    options: dict[str, Any],
    record: Path | None,
    screen: Console,
) -> None:
    """The same as a short job on a cluster; raises typer.Exit with its exit code."""
    from adversa.cli import cluster
    from adversa.distributed import jobs, launcher
    from adversa.storage import files

    requested = cluster.ready(file, path, run_dir, settings, options)
    words = cluster.words(options) + (["--json", "-"] if record is not None else [])
    entrypoint = jobs.command("plan", requested.run, requested.settings, words)
    figures: list[str] = []

    def show(line: str) -> None:
        if line.startswith(FIGURES):
            figures.append(line.removeprefix(FIGURES))
        else:
            say(screen, line)

    with launcher.session(requested.cluster) as client, tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(requested.text)
        job = jobs.beside(client, requested.run, "plan", entrypoint, Path(folder))
        ended = jobs.follow(client, job, show)
    if record is not None and figures:
        with files.writing(record.parent, "--json"):
            files.write_json(record, json.loads(figures[-1]))
    if ended.status == "FAILED" and ended.exit_code is None:
        raise UserError(f"the job {ended.id} failed: {ended.message[:500]}")
    raise typer.Exit(ended.code)
