"""`adversa plan`: what a run amounts to on the machines there are, before it begins. torch and ray
are imported inside.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from adversa.types import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from adversa.config import Config
    from adversa.engine.resources import Node
    from adversa.estimate.measure import Measured
    from adversa.estimate.plan import Cost, Placement, Range
    from adversa.run.folder import RunDir

FIGURES = "adversa-plan-figures "  # begins the line of a job's log that holds them
BUSY = 0.7  # share of a core below which a measurement was held up by other work


def plan(config: Config, run: RunDir, record: Path | None, screen: Console, seconds: float) -> None:
    """Print the plan of a run on the cluster that RAY_ADDRESS names, or on this machine without
    starting Ray.

    record: a JSON file for the figures; "-": a line of the output. UserError, after the plan, where
    the run cannot fit.
    """
    from adversa import distributed
    from adversa.engine import resources
    from adversa.estimate import measure
    from adversa.estimate import plan as estimate_plan
    from adversa.storage import files

    images = estimate_plan.images_of(config, run)
    if images is None:
        from adversa.data import sources

        images = len(sources.list_records(config.data).records)
    grows, nodes = distributed.address() is not None, _nodes(config)
    faults = resources.faults(nodes, config.cluster, grows)
    if fault := estimate_plan.disk_fault(config, run.root, images):
        faults.append(fault)
    resources.refuse(faults)  # what cannot fit need not be measured
    with screen.status("measuring"):
        measured, nodes = _measured(config, nodes, seconds)
    for found in measured.values():
        measure.check_kinds(found, config)
    at = estimate_plan.placement(nodes, config)
    needs = memory(measured, at)
    costs = estimate_plan.costs(config, run, estimate_plan.roles(config, images, run), at, measured)
    for part in (
        nodes_table(at),
        memory_table(needs, at, config),
        stages_table(costs),
        *notes(at, costs, measured, images),
    ):
        screen.print(part, highlight=False, markup=False, emoji=False)
    figures = _figures(at, needs, costs, measured, estimate_plan.disk_bytes(config, images))
    if str(record) == "-":
        typer.echo(FIGURES + json.dumps(figures))
    elif record is not None:
        with files.writing(record.parent, "--json"):
            files.write_json(record, figures)
    resources.refuse(estimate_plan.memory_faults(needs, config, nodes))


def _nodes(config: Config) -> list[Node]:
    from adversa import distributed
    from adversa.distributed import nodes, start

    if distributed.address() is None:
        return [nodes.here(config.cluster)]
    start.start(config.cluster, verbose=False)
    return nodes.there()


def _measured(
    config: Config, found: list[Node], seconds: float
) -> tuple[Mapping[Any, Measured], list[Node]]:
    from adversa import distributed
    from adversa.distributed import nodes
    from adversa.estimate import measure

    if distributed.address() is None:
        return {found[0].kind: measure.measure(config, int(found[0].cpus), seconds)}, found
    measured = nodes.measured(config, found, seconds)
    return measured, nodes.with_memory(found, measured)


def memory(measured: Mapping[Any, Measured], at: Placement) -> dict[str, int]:
    """Bytes that each training, and a sampler, takes of what it works on: the most that was
    measured.
    """
    from adversa.estimate.plan import CONTEXT

    context = CONTEXT if any(n.gpus >= 1 for n in at.nodes) else 0
    found: dict[str, int] = {}
    for one in measured.values():
        for name, takes in one.memory.items():
            found[name] = max(found.get(name, 0), takes + context)
    return found


# ---- what is shown -------------------------------------------------------------------------------


def _table(title: str, columns: Sequence[str], right: int = 1) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < right else "right", overflow="fold")
    return table


def nodes_table(at: Placement) -> Any:
    """Machines of one kind and with one share of the work are one row."""
    from adversa.estimate.plan import size

    rows: dict[Any, list[str]] = {}
    for node, workers, samplers in zip(at.nodes, at.workers, at.samplers, strict=True):
        rows.setdefault((node.kind, node.memory, node.gpu_memory, workers, samplers), []).append(
            node.name
        )
    table = _table(
        "Where it runs", ["machine", "CPUs", "memory", "GPUs", "training workers", "samplers"]
    )
    for (kind, memory, gpu_memory, workers, samplers), names in rows.items():
        cpus, gpus, gpu_type = kind
        shown = f"{gpus:g}" + (
            f" x {gpu_type or 'GPU'}" + (f", {size(gpu_memory)}" if gpu_memory else "")
            if gpus
            else ""
        )
        name = names[0] + (f" and {len(names) - 1} like it" if len(names) > 1 else "")
        each = " each" if len(names) > 1 else ""
        table.add_row(
            name,
            f"{cpus:g}",
            size(memory) if memory else "?",
            shown,
            f"{workers}{each}",
            f"{samplers}{each}",
        )
    return table


NAMES = {"paint": "a sampler"}


def memory_table(needs: Mapping[str, int], at: Placement, config: Config) -> Any:
    from adversa.estimate.plan import size

    gpus = [n.gpu_memory for n in at.nodes if n.gpus >= 1]
    memories = [m for m in gpus if m] if gpus else [n.memory for n in at.nodes if n.memory]
    has = size(min(memories)) if memories else "not known"
    per = (
        max(1, int(1 / config.cluster.gpus_per_sampler + 1e-6))
        if gpus
        else max(at.samplers, default=1)
    )
    workers = 1 if gpus else max(at.workers, default=1)
    of = "of a GPU" if gpus else "of a machine"
    table = _table(f"Memory {of}, estimated", ["for", "each", "at a time", "in all", "there is"])
    for name, takes in needs.items():
        many = per if name == "paint" else workers
        table.add_row(
            NAMES.get(name, f"training the {name}"), size(takes), str(many), size(many * takes), has
        )
    return table


def stages_table(costs: Sequence[Cost]) -> Any:
    from adversa.estimate.plan import total

    table = _table("How long", ["stage", "amount", "time", "range", "device-hours"], right=2)
    for cost in costs:
        if not cost.work:
            continue
        amount = (
            ", ".join(("at most " if w.bound else "") + w.shown for w in cost.work if w.shown)
            or "scoring"
        )
        row = (
            ("done", "", "")
            if cost.done
            else (_clock(cost.seconds.mid), _range(cost.seconds), _hours(cost.device_seconds.mid))
        )
        table.add_row(cost.stage.title, amount, *row)
    wall, device = total(costs)
    table.add_row(
        "in all", "", _clock(wall.mid), _range(wall), f"{_hours(device.mid)}", style="bold"
    )
    return table


def _clock(seconds: float) -> str:
    from adversa.cli.view import clock

    return clock(max(1.0, seconds))


def _range(r: Range) -> str:
    unit, name = next(
        (u, n) for u, n in ((3600, "h"), (60, "min"), (1, "s")) if r.high >= 2 * u or u == 1
    )
    low, high = (f"{x / unit:.{1 if x < 10 * unit and unit > 1 else 0}f}" for x in (r.low, r.high))
    return f"{low}-{high} {name}"


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.3f}" if hours < 0.1 else f"{hours:.2f}" if hours < 10 else f"{hours:.0f}"


def notes(
    at: Placement, costs: Sequence[Cost], measured: Mapping[Any, Measured], images: int
) -> list[str]:
    """What must be known to read the tables."""
    from adversa.estimate.plan import DOUBT, doubt

    seconds = max(m.seconds for m in measured.values())
    scaled = sorted({kind for m in measured.values() for kind, t in m.timings.items() if t.scaled})
    found = [
        f"From {seconds:.0f} s of measurement; {images} images. The range is what measured "
        f"steps differ by, from 1/{DOUBT:g} to "
        f"{doubt(measured):g} of it for what so short a look cannot see; its lower end has "
        "no painted image, for mining may find "
        "any number up to the bound."
    ]
    if doubt(measured) > DOUBT:
        found.append(
            "Without a GPU, Ray's processes share the cores with the work: expect the "
            "upper half of the range."
        )
    if scaled:
        found.append(
            f"Scaled from smaller batches, a whole one took too long: {', '.join(scaled)}."
        )
    if (
        share := min((m.share for m in measured.values() if m.device == "cpu"), default=1.0)
    ) < BUSY:
        found.append(
            f"There was other work on the machine: the measurement had {share:.0%} of a "
            "core, and all times are too long for an "
            "idle one. Measure again when it is."
        )
    if at.waiting[0] or at.waiting[1]:
        found.append(
            f"No room yet for {at.waiting[0]} training workers and {at.waiting[1]} "
            "samplers: they wait until machines join."
        )
    if any(not m.memory for m in measured.values()):
        found.append(
            "Memory was not counted: the measurement took too long, on a machine that is busy."
        )
    device = (
        "a GPU"
        if any(n.gpus >= 1 for n in at.nodes)
        else "a worker, a sampler or a task (there are no GPUs)"
    )
    found.append(
        f"A device is {device}. Memory is counted by tensors, without what a library takes "
        "for itself."
    )
    return found


def _figures(
    at: Placement,
    needs: Mapping[str, int],
    costs: Sequence[Cost],
    measured: Mapping[Any, Measured],
    disk: int,
) -> Any:
    from adversa.estimate.plan import total

    wall, device = total(costs)
    return {
        "nodes": [
            {**asdict(n), "training_workers": w, "samplers": s}
            for n, w, s in zip(at.nodes, at.workers, at.samplers, strict=True)
        ],
        "waiting": {"training_workers": at.waiting[0], "samplers": at.waiting[1]},
        "memory_bytes": dict(needs),
        "disk_bytes": disk,
        "stages": [
            {
                "stage": c.stage.title,
                "done": c.done,
                "seconds": asdict(c.seconds),
                "device_seconds": asdict(c.device_seconds),
                "work": [asdict(w) for w in c.work],
            }
            for c in costs
        ],
        "seconds": asdict(wall),
        "device_seconds": asdict(device),
        "measured": [{"kind": list(kind), **asdict(m)} for kind, m in measured.items()],
    }


# ---- on a cluster --------------------------------------------------------------------------------


def there(
    file: Path,
    path: Path | None,
    run_dir: Path | None,
    settings: list[str],
    options: dict[str, Any],
    record: Path | None,
    screen: Console,
) -> None:
    """The same as a short job on a cluster; raises typer.Exit with its exit code."""
    from adversa.cli import cluster
    from adversa.distributed import jobs, launcher
    from adversa.storage import files

    asked = cluster.ready(file, path, run_dir, settings, options)
    words = cluster.words(options) + (["--json", "-"] if record is not None else [])
    entrypoint = jobs.command("plan", asked.run, asked.settings, words)
    figures: list[str] = []

    def show(line: str) -> None:
        if line.startswith(FIGURES):
            figures.append(line.removeprefix(FIGURES))
        else:
            screen.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)

    with (
        launcher.session(asked.cluster) as client,
        tempfile.TemporaryDirectory(prefix="adversa-") as folder,
    ):
        ended = jobs.follow(
            client,
            jobs.aside(client, asked.run, "plan", entrypoint, asked.text, Path(folder)),
            show,
        )
    if record is not None and figures:
        with files.writing(record.parent, "--json"):
            files.write_json(record, json.loads(figures[-1]))
    if ended.status == "FAILED" and ended.exit_code is None:
        raise UserError(f"the job {ended.id} failed: {ended.message[:500]}")
    raise typer.Exit(ended.code)
