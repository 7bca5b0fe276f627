"""The commands that look at a run, or say what is wanted of it: status, watch, pause, resume, stop,
runs. No torch, no ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adversa.cli.console import Screen, say
from adversa.cli.options import (
    ClusterPath,
    Overrides,
    SavedRun,
    SavedRunDir,
    exits,
    reads_run,
    run_path,
    saved_run,
)
from adversa.cli.run import stoppable
from adversa.storage import once

app = typer.Typer()


@app.command()
@exits
@reads_run
@once.command()
def status(run: SavedRun = None, run_dir: SavedRunDir = None, cluster: ClusterPath = None) -> None:
    """What a run is doing, or where it stopped; from its folder alone. With --cluster: what the
    cluster says of its job.
    """
    from adversa.cli import cluster as cli_cluster
    from adversa.cli import view

    if cluster is None:
        Screen().print(view.view(*saved_run(run, run_dir)))
        return
    with stoppable("nothing is changed. Again"):
        cli_cluster.status(run or run_dir, cluster, Screen())


@app.command()
@exits
@reads_run
def watch(run: SavedRun = None, run_dir: SavedRunDir = None, cluster: ClusterPath = None) -> None:
    """Follow a run that works elsewhere (another process, or --cluster), until it ends. Ctrl-C
    leaves it alone.
    """
    from adversa.cli import cluster as cli_cluster

    with stoppable("the run goes on. Again"):
        if cluster is None:
            cli_cluster.watch_here(*saved_run(run, run_dir), Screen())
        else:
            cli_cluster.watch(run or run_dir, cluster, Screen())


@app.command("runs")
@exits
@reads_run
@once.command()
def runs_(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]", parser=run_path, help="What holds run folders; default: runs."
        ),
    ] = None,
    cluster: ClusterPath = None,
) -> None:
    """List runs: state, stage, when something was last heard of them."""
    from adversa.cli import cluster as cli_cluster
    from adversa.types import UserError

    if cluster is None:
        cli_cluster.listed_here(folder or Path("runs"), Screen())
        return
    if folder is not None:
        raise UserError(
            f"{folder} beside --cluster {cluster}: give one; a cluster lists all its runs"
        )
    with stoppable("nothing is changed. Again"):
        cli_cluster.listed(cluster, Screen())


@app.command()
@exits
@reads_run
def pause(run: SavedRun = None, run_dir: SavedRunDir = None, cluster: ClusterPath = None) -> None:
    """Let a run rest: what is in flight is finished, then nothing is begun until `adversa
    resume`.
    """
    from adversa.cli import cluster as cli_cluster
    from adversa.run import requests

    if cluster is None:
        say(Screen(), requests.pause(saved_run(run, run_dir)[1]))
        return
    with stoppable("the run was perhaps told to pause. Again"):
        cli_cluster.there("pause", run or run_dir, cluster, [], Screen())


@app.command()
@exits
@reads_run
def resume(
    run: SavedRun = None,
    run_dir: SavedRunDir = None,
    set_: Overrides = None,
    cluster: ClusterPath = None,
) -> None:
    """Go on with a paused run; --set changes mix.synthetic_ratio or mine.budget for rounds that
    have not begun.
    """
    from adversa.cli import cluster as cli_cluster
    from adversa.run import requests

    if cluster is None:
        say(Screen(), requests.resume(saved_run(run, run_dir)[1], set_ or []))
        return
    with stoppable("the run was perhaps told to go on. Again"):
        cli_cluster.there("resume", run or run_dir, cluster, set_ or [], Screen())


@app.command()
@exits
@reads_run
def stop(run: SavedRun = None, run_dir: SavedRunDir = None, cluster: ClusterPath = None) -> None:
    """End a run as Ctrl-C does, from anywhere: everything finished is kept."""
    from adversa.cli import cluster as cli_cluster
    from adversa.run import requests

    if cluster is None:
        say(Screen(), requests.stop(saved_run(run, run_dir)[1]))
        return
    with stoppable("the job was perhaps told to stop. Again"):
        cli_cluster.stop(run or run_dir, cluster, Screen())
