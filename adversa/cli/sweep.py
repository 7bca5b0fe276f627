"""`adversa sweep`: how much synthetic data helps. torch and ray are imported inside."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adversa.api.start import check_engine, engine_of
from adversa.cli.console import say
from adversa.cli.run import KEPT, STARTED, stoppable
from adversa.types import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from adversa.config import Config
    from adversa.run.control import RunHandle
    from adversa.run.folder import RunDir
    from adversa.storage.path import StoragePath


def sweep(
    path: Path | None,
    run_dir: StoragePath | None,
    overrides: list[str],
    seed: int | None,
    engine_name: str,
    verbose: bool,
    screen: Console,
) -> None:
    """Run a sweep, or go on with it."""
    from adversa.run import file_lock
    from adversa.run.hold import hold
    from adversa.storage import files, once
    from adversa.sweep import grid, report, view
    from adversa.sweep import run as sweeps

    config, root = settings(path, run_dir, overrides, seed)
    check_engine(engine_name, config)
    if config.sweep.search is not None and engine_name == "local":
        raise UserError(
            "--engine local: sweep.search is Ray Tune's; use --engine ray, or the grid "
            "(sweep.search: null)"
        )
    with once.command():
        seen = files.read_json(root / "status.json")
        run = sweeps.open_run(config, root)
        if config.sweep.search is not None and _searched(config, run):
            page = run.root / grid.SEARCHED
        elif config.sweep.search is None and sweeps.is_finished(
            config, run
        ):  # its figures may be asked for anew: another metric
            with file_lock.lock(run):
                sweeps.settle(config, run)
                page = report.write(config, run)
            say(screen, f"sweep: no trial left to do in {run.root}")
        else:
            work = partial(_work, config, run, engine_name, verbose, screen)
            tell = partial(say, screen)
            with stoppable(KEPT):
                held = sweeps.COMMAND, run, work, lambda: "finished", tell, seen
                page = hold(*held, command=sweeps.COMMAND)
    view.closing(screen, config, run, page)


def _searched(config: Config, run: RunDir) -> bool:
    from adversa.distributed import explore

    return explore.is_finished(config, run)


def settings(
    path: Path | None, run_dir: StoragePath | None, overrides: list[str], seed: int | None
) -> tuple[Config, StoragePath]:
    """(configuration, the sweep's folder). UserError for a grid that makes no sense, before
    anything is written.
    """
    from adversa.config import load, packaged
    from adversa.data import sources
    from adversa.sweep import grid

    path = path or packaged("phantom-sweep.yaml")
    config = load(path, overrides, seed=seed)
    grid.check(config)
    if config.sweep.search is not None:
        from adversa.distributed import explore

        explore.check(config)
    if config.sweep.scarce == "fail":
        counts: dict[str, int] = {}
        for record in sources.list_records(config.data).records:
            counts[record.label] = counts.get(record.label, 0) + 1
        grid.check_counts(config, counts, exact=False)
    return config, run_dir or Path("runs") / path.stem


def _work(
    config: Config, run: RunDir, engine_name: str, verbose: bool, screen: Console, handle: RunHandle
) -> StoragePath:
    from adversa.cli import view as cli_view
    from adversa.run import status
    from adversa.sweep import grid, report
    from adversa.sweep import run as sweeps

    status.set_status(run, "running", "starting", command=sweeps.COMMAND)
    with (
        cli_view.LiveView(screen, config, run),
        closing(engine_of(engine_name, config, run, verbose)) as engine,
    ):
        if config.sweep.search is None:
            return sweeps.run(config, run, engine, report.write, STARTED, handle)
        from adversa.distributed import explore
        from adversa.distributed.engine import RayEngine

        assert isinstance(engine, RayEngine), engine_name
        explore.run(config, run, engine, STARTED, handle)
        return run.root / grid.SEARCHED


# ---- before a sweep ------------------------------------------------------------------------------


def dry_run(config: Config, run: RunDir, screen: Console, seconds: float) -> None:
    """Print the number of trials and an estimate of device-hours. Begins nothing."""
    from adversa import distributed
    from adversa.cli import plan
    from adversa.engine import resources
    from adversa.sweep import estimate

    amounts, clustered = estimate.amounts(config, run), distributed.address() is not None
    nodes = plan.nodes(config)
    resources.refuse(resources.faults(nodes, config.cluster, grows=clustered))
    trials = resources.trials_at_once(config.cluster, nodes)
    if not clustered:  # a trial has one thread
        nodes = [replace(n, cpus=1) for n in nodes]
    with screen.status("measuring"):
        measured, _ = plan.measure(estimate.measurable(config), nodes, seconds)
    slowest = max(measured.values(), key=lambda m: m.seconds["classifier"])
    table, device = plan.table("How much", "what", "how many", "amount", "device-hours"), 0.0
    for line in amounts.lines:
        one = line.seconds(slowest)
        device += one
        table.add_row(line.what, str(line.count), line.amount, plan.hours(one))
    table.add_row("in all", str(amounts.trials), "", plan.hours(device), style="bold")
    said = [
        f"{amounts.trials} trials in {amounts.cells} cells, {trials} at a time: about "
        f"{plan.clock(device / trials)}.",
    ]
    if amounts.images:
        said.append(f"Generated images are {config.sweep.overdraw:g} times those wanted.")
    parts: list[Table | str] = [table, *said, *amounts.notes, plan.note(measured)]
    for part in parts:
        say(screen, part)
