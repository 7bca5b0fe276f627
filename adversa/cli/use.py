"""The commands that use what a run made: regenerate, export, predict, report, bench. torch and ray
are imported inside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adversa.cli.console import Screen
from adversa.cli.options import (
    EngineName,
    Overrides,
    SavedRun,
    SavedRunDir,
    Verbose,
    exits,
    reads_run,
    run_path,
    saved_run,
)
from adversa.cli.run import engines, stoppable
from adversa.storage import once

app = typer.Typer()
bench_app = typer.Typer(help="Measure this machine or cluster.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", parser=run_path, help="The run's folder.")
]


@app.command()
@exits
@reads_run
@once.command()
def regenerate(
    run: RunArgument,
    request_id: Annotated[
        str, typer.Argument(metavar="REQUEST_ID", help="Of the image; the report names it.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Keep the new image: a PNG.")
    ] = None,
) -> None:
    """Generate one image of a run again, and say whether it is identical."""
    from adversa.cli import images

    images.regenerate(run, request_id, out, Screen())


@app.command()
@exits
@reads_run
@once.command()
def export(
    run: RunArgument,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where it goes: a new or empty folder.")
    ],
    form: Annotated[
        str, typer.Option("--format", metavar="folder|parquet|webdataset", help="Of the images.")
    ] = "folder",
    what: Annotated[
        str,
        typer.Option("--what", metavar="images|models|all", help="Kept images, or classifiers."),
    ] = "all",
    arm: Annotated[str | None, typer.Option("--arm", help="One arm; none: every arm.")] = None,
    number: Annotated[
        int | None, typer.Option("--round", help="Images of one round; none: of every round.")
    ] = None,
    rejected: Annotated[
        bool, typer.Option("--rejected", help="Refused images, too; a column says why.")
    ] = False,
    shard_mb: Annotated[
        float, typer.Option("--shard-mb", help="webdataset: size of a tar file, at most.")
    ] = 256,
) -> None:
    """Hand on what a run made: the images that passed the filter, each arm's classifiers, with
    cards for the Hugging Face hub.
    """
    from adversa.cli import export as cli_export

    with stoppable("what is written is kept. Go on with"):
        cli_export.export(run, out, form, what, arm, number, rejected, shard_mb, Screen())


@bench_app.command("generate")
@exits
@reads_run
@once.command()
def bench_generate(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]", parser=run_path, help="A run's folder; none: the shipped denoiser."
        ),
    ] = None,
    denoiser: Annotated[
        Path | None,
        typer.Option("--denoiser", metavar="DIR", help="A denoiser's folder, not a run."),
    ] = None,
    images: Annotated[
        int, typer.Option("--images", min=1, help="A measurement, for each sampler.")
    ] = 512,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Of each measurement; the median counts.")
    ] = 3,
    samplers: Annotated[
        str | None,
        typer.Option("--samplers", metavar="N,...", help="Sizes of pools; none: 1, all CPUs."),
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there too.")
    ] = None,
    set_: Overrides = None,
    engine: EngineName = "ray",
    verbose: Verbose = False,
) -> None:
    """How fast images are generated here: rates, costs of guidance, share of the device's peak,
    scaling, memory.
    """
    from adversa.cli import images as cli_images

    with stoppable("no figure is kept. Again"):
        cli_images.bench(
            run,
            denoiser,
            images,
            rounds,
            samplers,
            record,
            set_ or [],
            engines(engine, verbose),
            Screen(),
        )


@app.command()
@exits
@reads_run
@once.command()
def predict(
    run: RunArgument,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES...", help="Files, folders, globs.")
    ],
    arm: Annotated[
        str | None, typer.Option("--arm", help="Whose classifiers; none: the arm the run is about.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The CSV.")] = Path(
        "predictions.csv"
    ),
    crop: Annotated[
        str | None, typer.Option("--crop", metavar="center|pad|squash", help="Not as in the run.")
    ] = None,
    on_error: Annotated[
        str, typer.Option("--on-error", metavar="fail|skip", help="A file that is no picture.")
    ] = "fail",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the CSV.")] = False,
    engine: EngineName = "local",
    verbose: Verbose = False,
) -> None:
    """Write each class's probability for images to a CSV: the mean over an arm's classifiers."""
    from adversa.cli import results

    with stoppable("nothing is written. Again"):
        screens = Screen(), Screen(stderr=True)
        results.predict(
            run, images, arm, out, crop, on_error, force, engines(engine, verbose), *screens
        )


@app.command()
@exits
@reads_run
@once.command()
def report(run: SavedRun = None, run_dir: SavedRunDir = None) -> None:
    """Write summary.json, report.html and report.md of a finished run again; of a sweep what there
    is of its figures so far.
    """
    from adversa.api import Run

    typer.echo(Run(saved_run(run, run_dir)[1].root).report())
