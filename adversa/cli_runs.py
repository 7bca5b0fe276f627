"""The commands that look at a run, or say what is wanted of it: status, watch, pause, resume, stop, runs. No torch, no ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adversa.cli_options import ClusterPath, Overrides, SavedRun, SavedRunDir, exits, saved_run, say
from adversa.cli_run import stoppable

app = typer.Typer()


@app.command()
@exits
def status(run: SavedRun = None, run_dir: SavedRunDir = None, cluster: ClusterPath = None) -> None:
    """What a run is doing, or where it stopped; from its folder alone. With --cluster: what the cluster says of its job."""
    from rich.console import Console

    from adversa import cli_cluster, console

    if cluster is None:
        Console().print(console.view(*saved_run(run, run_dir)))
        return
    with stoppable("nothing is changed. Again"):
        cli_cluster.status(run or run_dir, cluster, Console())


@app.command()
@exits
def watch(run: SavedRun = None, run_dir: SavedRunDir = None, cluster: ClusterPath = None) -> None:
    """Follow a run that works elsewhere (another process, or --cluster), until it ends. Ctrl-C leaves it alone."""
    from rich.console import Console

    from adversa import cli_cluster

    with stoppable("the run goes on. Again"):
        if cluster is None:
            cli_cluster.watch_here(*saved_run(run, run_dir), Console())
        else:
            cli_cluster.watch(run or run_dir, cluster, Console())


@app.command("runs")
@exits
def runs_(
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="What holds run folders; default: runs.")] = None,
    cluster: ClusterPath = None,
) -> None:
    """List runs: state, stage, when something was last heard of them."""
    from rich.console import Console

    from adversa import cli_cluster
    from adversa.types import UserError

    if cluster is None:
        cli_cluster.listed_here(folder or Path("runs"), Console())
        return
    if folder is not None:
        raise UserError(f"{folder} beside --cluster {cluster}: give one; a cluster lists all its runs")
    with stoppable("nothing is changed. Again"):
        cli_cluster.listed(cluster, Console())


@app.command()
@exits
def pause(run: SavedRun = None, run_dir: SavedRunDir = None, cluster: ClusterPath = None) -> None:
    """Let a run rest: what is in flight is finished, then nothing is begun until `adversa resume`."""
    from rich.console import Console

    from adversa import cli_cluster, cli_control

    if cluster is None:
        say(cli_control.pause(saved_run(run, run_dir)[1]))
        return
    with stoppable("the run was perhaps told to pause. Again"):
        cli_cluster.there("pause", run or run_dir, cluster, [], Console())


@app.command()
@exits
def resume(run: SavedRun = None, run_dir: SavedRunDir = None, set_: Overrides = None, cluster: ClusterPath = None) -> None:
    """Go on with a paused run; --set changes mix.synthetic_ratio or mine.budget for rounds that have not begun."""
    from rich.console import Console

    from adversa import cli_cluster, cli_control

    if cluster is None:
        say(cli_control.resume(saved_run(run, run_dir)[1], set_ or []))
        return
    with stoppable("the run was perhaps told to go on. Again"):
        cli_cluster.there("resume", run or run_dir, cluster, set_ or [], Console())


@app.command()
@exits
def stop(run: SavedRun = None, run_dir: SavedRunDir = None, cluster: ClusterPath = None) -> None:
    """End a run as Ctrl-C does, from anywhere: everything finished is kept."""
    from rich.console import Console

    from adversa import cli_cluster, cli_control

    if cluster is None:
        say(cli_control.stop(saved_run(run, run_dir)[1]))
        return
    with stoppable("the job was perhaps told to stop. Again"):
        cli_cluster.stop(run or run_dir, cluster, Console())
