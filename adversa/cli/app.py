"""The commands. torch and ray are imported inside them: `adversa --help` and `adversa status`
answer at once.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from adversa.cli import runs
from adversa.cli.options import (
    ClusterPath,
    ConfigPath,
    EngineName,
    Overrides,
    Rounds,
    RunPath,
    SavedRun,
    SavedRunDir,
    Seed,
    Verbose,
    exits,
    reads_run,
    run_path,
    saved_run,
)
from adversa.cli.run import engines, error, execute, root_of, stoppable

HELP = (
    "Find a classifier's hard cases, generate more of them, retrain, and say honestly whether it "
    "helped."
)
app = typer.Typer(
    help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)
config_app = typer.Typer(help="Show or check a configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")
bench_app = typer.Typer(help="Measure this machine or cluster.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(runs.app)

TrainWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[codec] [CONFIG]",
        help="codec: the autoencoder and its latents alone. A YAML file; none: the demo.",
    ),
]
EvaluateWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[denoiser] [CONFIG] | RUN",
        help="denoiser: judge its samples (KID, precision, recall). A YAML file; none: the "
        "demo. With --on: a run's folder.",
    ),
]


def _what(
    command: str, words: list[str] | None, known: tuple[str, ...]
) -> tuple[str | None, Path | None]:
    """The words of a command that takes `[WHAT] [CONFIG]`: (WHAT or None, CONFIG or None).
    UserError for words too many.
    """
    from adversa.types import UserError

    what, rest = (words[0], words[1:]) if words and words[0] in known else (None, words or [])
    if len(rest) > 1:
        raise UserError(
            f"adversa {command} {shlex.join(words or [])}: write adversa {command} "
            f"[{'|'.join(known)}] [CONFIG]"
        )
    return what, Path(rest[0]) if rest else None


def _stage_command(name: str, text: str) -> None:
    """A command that brings a run up to the end of one stage; loop goes on to the report."""

    def command(
        config: ConfigPath = None,
        run_dir: RunPath = None,
        set_: Overrides = None,
        rounds: Rounds = None,
        seed: Seed = None,
        engine: EngineName = "ray",
        verbose: Verbose = False,
    ) -> None:
        execute(name, config, run_dir, set_ or [], rounds, seed, engine, verbose)

    command.__doc__ = text
    app.command(name)(exits(command))


for _name, _text in {
    "prepare": "Read the images, split them by lesion into roles, write Parquet.",
    "curate": "Give every generated image a verdict (and what comes before).",
}.items():
    _stage_command(_name, _text)


@app.command()
@exits
def loop(
    config: ConfigPath = None,
    reopen_test: Annotated[
        bool,
        typer.Option(
            "--reopen-test",
            help="Allow test to be opened again where it was before; the report then says so.",
        ),
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="--cluster: start, and do not follow.")
    ] = False,
    run_dir: RunPath = None,
    set_: Overrides = None,
    rounds: Rounds = None,
    seed: Seed = None,
    engine: EngineName = "ray",
    verbose: Verbose = False,
    cluster: ClusterPath = None,
    up: Annotated[
        bool, typer.Option("--up", help="--cluster: bring the cluster up first (ray up).")
    ] = False,
    down: Annotated[
        bool, typer.Option("--down", help="--cluster: take it down at the end (ray down).")
    ] = False,
) -> None:
    """Run the whole cycle: prepare, train, mine, generate, curate, retrain, evaluate, report. Run
    it again to resume.
    """
    from adversa.types import UserError

    if cluster is None:
        if alone := [n for n, on in (("up", up), ("down", down), ("detach", detach)) if on]:
            raise UserError(f"--{alone[0]} goes with --cluster FILE: which cluster")
        execute("loop", config, run_dir, set_ or [], rounds, seed, engine, verbose, reopen_test)
        return
    if engine != "ray":
        raise UserError(f"--engine {engine} beside --cluster {cluster}: a cluster works with Ray")
    from adversa.cli import cluster as cli_cluster
    from adversa.cli.console import Screen

    if detach and down:
        raise UserError(
            "--detach beside --down: nobody would be there at the end to take the cluster "
            "down; give one"
        )
    options = {"rounds": rounds, "seed": seed, "reopen_test": reopen_test, "verbose": verbose}
    with stoppable("a job that was submitted goes on. Follow it with"):
        cli_cluster.loop(cluster, config, run_dir, set_ or [], options, up, down, detach, Screen())


@app.command()
@exits
def sweep(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="A YAML file; none: one on built-in pictures."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the number of trials and an estimate of device-hours; begin nothing.",
        ),
    ] = False,
    run_dir: RunPath = None,
    set_: Overrides = None,
    seed: Seed = None,
    engine: EngineName = "ray",
    verbose: Verbose = False,
) -> None:
    """How much synthetic data? A grid of real images x ratio x arm x seed, with dose-response
    curves. Run it again to resume.
    """
    from adversa.cli import sweep as cli_sweep
    from adversa.cli.console import Screen

    if not dry_run:
        cli_sweep.sweep(config, run_dir, set_ or [], seed, engine, verbose, Screen())
        return
    from rich.console import Console

    from adversa.estimate.measure import SECONDS
    from adversa.run.folder import RunDir

    with stoppable("nothing was begun. Again"):
        requested, root = cli_sweep.settings(config, run_dir, set_ or [], seed)
        cli_sweep.dry_run(requested, RunDir(root), Console(), SECONDS)


@app.command()
@exits
def plan(
    config: ConfigPath = None,
    run_dir: RunPath = None,
    set_: Overrides = None,
    rounds: Rounds = None,
    seed: Seed = None,
    cluster: ClusterPath = None,
    record: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there too.")
    ] = None,
) -> None:
    """Before a run: where its workers and samplers lie, memory, time and device-hours of each
    stage, from a short measurement.
    """
    from rich.console import Console

    from adversa.cli import plan as cli_plan

    options = {"rounds": rounds, "seed": seed}
    with stoppable("nothing was begun. Again"):
        if cluster is not None:
            cli_plan.there(cluster, config, run_dir, set_ or [], options, record, Console())
            return
        from adversa.config import load
        from adversa.estimate.measure import SECONDS
        from adversa.run.folder import RunDir

        root = root_of(config, run_dir)
        cli_plan.plan(load(config, set_ or [], **options), RunDir(root), record, Console(), SECONDS)


@app.command()
@exits
def mine(
    config: ConfigPath = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what the hard cases have in common.")
    ] = False,
    run_dir: RunPath = None,
    set_: Overrides = None,
    rounds: Rounds = None,
    seed: Seed = None,
    engine: EngineName = "ray",
    verbose: Verbose = False,
) -> None:
    """Find the hard cases of the next unfinished round (and what comes before)."""
    from adversa.cli.console import Screen

    execute("mine", config, run_dir, set_ or [], rounds, seed, engine, verbose, brief=explain)
    if explain:
        for line in reads_run(_explained)(root_of(config, run_dir)):
            Screen().print(line, highlight=False, markup=False, soft_wrap=True)


def _explained(root: Path) -> list[str]:
    from adversa.config import load
    from adversa.mine import explain
    from adversa.pipeline import mine as pipeline_mine
    from adversa.run.folder import RunDir, classes_of
    from adversa.run.step_folder import is_finished
    from adversa.types import UserError

    run = RunDir(root)
    config = load(run.config)
    done = [n for n in range(1, config.rounds + 1) if is_finished(run.round(n, "hard"))]
    if not done:
        raise UserError(f"{root} has mined nothing yet: mix.arms {config.mix.arms}")
    found = pipeline_mine.modes(run.round(done[-1], "scores"), run.data, config.mine)
    return [f"round {done[-1]}", *explain.lines(found, classes_of(run.data))]


@app.command()
@exits
def train(
    words: TrainWords = None,
    run_dir: RunPath = None,
    set_: Overrides = None,
    rounds: Rounds = None,
    seed: Seed = None,
    engine: EngineName = "ray",
    verbose: Verbose = False,
) -> None:
    """Train the denoiser, the verifiers and the first classifiers (and what comes before), or the
    codec alone.
    """
    what, config = _what("train", words, ("codec",))
    execute(what or "train", config, run_dir, set_ or [], rounds, seed, engine, verbose)


@app.command()
@exits
def generate(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG]", help="A YAML file; none: the demo. With --labels: a run's folder."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", metavar="CLASS=N,...", help="Generate so many of each, no loop."),
    ] = None,
    denoiser: Annotated[
        Path | None,
        typer.Option("--denoiser", metavar="DIR", help="--labels: a denoiser, not a run."),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option("--strategy", help="sample, img2img, inpaint, outpaint, inout, interpolate."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="--labels: where the images go.")
    ] = None,
    form: Annotated[
        str,
        typer.Option("--format", metavar="folder|parquet", help="--labels: of what is in --out."),
    ] = "folder",
    run_dir: RunPath = None,
    set_: Overrides = None,
    rounds: Rounds = None,
    seed: Seed = None,
    engine: EngineName = "ray",
    verbose: Verbose = False,
) -> None:
    """Generate images for the hard cases (and what comes before); or, with --labels, so many images
    of each class.
    """
    from adversa.cli import images
    from adversa.cli.console import Screen
    from adversa.types import UserError

    if labels is None and config is not None and (config / "config.yaml").is_file():
        raise UserError(
            f"{config} is a run: go on with it by --run-dir {config}, or say with --labels "
            "CLASS=N,... what to generate"
        )
    if labels is not None and config is not None and run_dir is not None:
        raise UserError(f"--run-dir {run_dir} beside {config}: give one run")
    if labels is None:
        alone = {"--denoiser": denoiser, "--strategy": strategy, "--out": out}
        if given := [name for name, value in alone.items() if value is not None]:
            raise UserError(f"{given[0]} goes with --labels CLASS=N,...: what to generate")
        execute("generate", config, run_dir, set_ or [], rounds, seed, engine, verbose)
        return
    with stoppable():
        reads_run(images.order)(
            config or run_dir,
            denoiser,
            labels,
            strategy,
            out,
            form,
            seed or 0,
            set_ or [],
            engines(engine, verbose),
            Screen(),
        )


@app.command()
@exits
@reads_run
def regenerate(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=run_path, help="The run's folder.")],
    request_id: Annotated[
        str, typer.Argument(metavar="REQUEST_ID", help="Of the image; the report names it.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Keep the new image: a PNG.")
    ] = None,
) -> None:
    """Generate one image of a run again, and say whether it is identical."""
    from adversa.cli import images
    from adversa.cli.console import Screen

    images.regenerate(run, request_id, out, Screen())


@app.command()
@exits
@reads_run
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=run_path, help="The run's folder.")],
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
    from adversa.cli.console import Screen

    with stoppable("what is written is kept. Go on with"):
        cli_export.export(run, out, form, what, arm, number, rejected, shard_mb, Screen())


@bench_app.command("generate")
@exits
@reads_run
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
    from adversa.cli.console import Screen

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
def evaluate(
    words: EvaluateWords = None,
    on: Annotated[
        Path | None,
        typer.Option("--on", metavar="CSV_OR_FOLDER", help="Score RUN on an external cohort."),
    ] = None,
    labels_map: Annotated[
        Path | None,
        typer.Option(
            "--labels-map",
            metavar="YAML",
            help="--on: `labels: {melanoma: mel, scc: null}`, `classes: ..`.",
        ),
    ] = None,
    crop: Annotated[
        str | None,
        typer.Option("--crop", metavar="center|pad|squash", help="--on: not as in the run."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="--on: results go to RUN/external/NAME; default: the set's."),
    ] = None,
    run_dir: RunPath = None,
    set_: Overrides = None,
    rounds: Rounds = None,
    seed: Seed = None,
    engine: EngineName = "ray",
    verbose: Verbose = False,
) -> None:
    """Retrain every arm and score it on the mine role (and what comes before); or judge the
    denoiser's samples; or, with --on, score a finished run on an external cohort.
    """
    from adversa.cli import results
    from adversa.cli.console import Screen

    given = {"--labels-map": labels_map, "--crop": crop, "--name": name}
    if (
        root := results.run_of(words, on, run_dir, given, {"--rounds": rounds, "--seed": seed})
    ) is not None:
        with stoppable():
            reads_run(results.evaluate_on)(
                root, on, labels_map, crop, name, set_ or [], engines(engine, verbose), Screen()
            )
        return
    what, config = _what("evaluate", words, ("denoiser",))
    execute(
        "quality" if what else "evaluate",
        config,
        run_dir,
        set_ or [],
        rounds,
        seed,
        engine,
        verbose,
    )


@app.command()
@exits
@reads_run
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=run_path, help="The run's folder.")],
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
    from adversa.cli.console import Screen

    with stoppable("nothing is written. Again"):
        screens = Screen(), Screen(stderr=True)
        results.predict(
            run, images, arm, out, crop, on_error, force, engines(engine, verbose), *screens
        )


@app.command()
@exits
@reads_run
def report(run: SavedRun = None, run_dir: SavedRunDir = None) -> None:
    """Write summary.json, report.html and report.md of a finished run again; of a sweep what there
    is of its figures so far.
    """
    from adversa.api import Run

    typer.echo(Run(saved_run(run, run_dir)[1].root).report())


@config_app.command()
@exits
def show(config: ConfigPath = None, set_: Overrides = None) -> None:
    """Print the resolved configuration: YAML that says of each key what it is and who set it."""
    from adversa.config import commented, load, read

    options = set_ or []
    typer.echo(commented(load(config, options), read(config, options)[1]), nl=False)


@config_app.command()
@exits
def check(config: ConfigPath = None, set_: Overrides = None) -> None:
    """Check a configuration; exit code 2 and every fault when it is wrong."""
    from adversa.config import load

    load(config, set_ or [])
    typer.echo(f"{config or 'the demo'}: valid")


def main() -> None:
    """The console script. A mistake on the command line is one line too, where typer would draw a
    box of several.
    """
    try:
        code = app(standalone_mode=False)
    except typer.Abort:  # Ctrl-C before there is a run to stop
        sys.exit(130)
    except Exception as e:
        if not hasattr(e, "format_message"):  # only the command line's own errors have it
            raise
        text = e.format_message()
        if (
            text.startswith("\n") or "Usage:" in text
        ):  # no command at all: typer's message is the help page
            typer.echo(text)
        else:
            error(
                f"{text.rstrip('.')}; `adversa --help` lists the commands, `adversa "
                "COMMAND --help` their options"
            )
        sys.exit(2)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
