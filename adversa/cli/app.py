"""The commands. torch and ray are imported inside them: `adversa --help` and `adversa status`
answer at once.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from adversa.cli import runs, use
from adversa.cli.console import Screen, error, say
from adversa.cli.options import (
    ClusterPath,
    ConfigPath,
    EngineName,
    Overrides,
    Rounds,
    RunOptions,
    RunPath,
    Seed,
    Verbose,
    exits,
    reads_run,
    takes_options,
)
from adversa.cli.run import engines, execute, root_of, stoppable

HELP = (
    "Find a classifier's hard cases, generate more of them, retrain, and say honestly whether it "
    "helped."
)
app = typer.Typer(
    help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)
config_app = typer.Typer(help="Show or check a configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(use.app)
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

    def command(options: RunOptions, config: ConfigPath = None) -> None:
        execute(name, config, options)

    command.__doc__ = text
    app.command(name)(exits(takes_options(command)))


for _name, _text in {
    "prepare": "Read the images, split them by lesion into roles, write Parquet.",
    "curate": "Give every generated image a verdict (and what comes before).",
}.items():
    _stage_command(_name, _text)


@app.command()
@exits
@takes_options
def loop(
    options: RunOptions,
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
        execute("loop", config, options, reopen_test)
        return
    if options.engine != "ray":
        raise UserError(
            f"--engine {options.engine} beside --cluster {cluster}: a cluster works with Ray"
        )
    from adversa.cli import cluster as cli_cluster

    if detach and down:
        raise UserError(
            "--detach beside --down: nobody would be there at the end to take the cluster "
            "down; give one"
        )
    with stoppable("a job that was submitted goes on. Follow it with"):
        cli_cluster.loop(cluster, config, options, reopen_test, up, down, detach, Screen())


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
@takes_options
def mine(
    options: RunOptions,
    config: ConfigPath = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what the hard cases have in common.")
    ] = False,
) -> None:
    """Find the hard cases of the next unfinished round (and what comes before)."""

    execute("mine", config, options, brief=explain)
    if explain:
        for line in reads_run(_explained)(root_of(config, options.run_dir)):
            say(Screen(), line)


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
@takes_options
def train(
    options: RunOptions,
    words: TrainWords = None,
) -> None:
    """Train the denoiser, the verifiers and the first classifiers (and what comes before), or the
    codec alone.
    """
    what, config = _what("train", words, ("codec",))
    execute(what or "train", config, options)


@app.command()
@exits
@takes_options
def generate(
    options: RunOptions,
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
) -> None:
    """Generate images for the hard cases (and what comes before); or, with --labels, so many images
    of each class.
    """
    from adversa.cli import images
    from adversa.types import UserError

    if labels is not None and config is not None and options.run_dir is not None:
        raise UserError(f"--run-dir {options.run_dir} beside {config}: give one run")
    if labels is None:
        if config is not None and (config / "config.yaml").is_file():
            raise UserError(
                f"{config} is a run: go on with it by --run-dir {config}, or say with --labels "
                "CLASS=N,... what to generate"
            )
        alone = {"--denoiser": denoiser, "--strategy": strategy, "--out": out}
        if given := [name for name, value in alone.items() if value is not None]:
            raise UserError(f"{given[0]} goes with --labels CLASS=N,...: what to generate")
        execute("generate", config, options)
        return
    with stoppable():
        reads_run(images.order)(
            config or options.run_dir,
            denoiser,
            labels,
            strategy,
            out,
            form,
            options.seed or 0,
            options.overrides,
            engines(options.engine, options.verbose),
            Screen(),
        )


@app.command()
@exits
@takes_options
def evaluate(
    options: RunOptions,
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
) -> None:
    """Retrain every arm and score it on the mine role (and what comes before); or judge the
    denoiser's samples; or, with --on, score a finished run on an external cohort.
    """
    from adversa.cli import results

    given = {"--labels-map": labels_map, "--crop": crop, "--name": name}
    without = {"--rounds": options.rounds, "--seed": options.seed}
    if (root := results.run_of(words, on, options.run_dir, given, without)) is not None:
        make = engines(options.engine, options.verbose)
        with stoppable():
            reads_run(results.evaluate_on)(
                root, on, labels_map, crop, name, options.overrides, make, Screen()
            )
        return
    what, config = _what("evaluate", words, ("denoiser",))
    execute(
        "quality" if what else "evaluate",
        config,
        options,
    )


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
    from adversa.pipeline.train import check_architectures

    check_architectures(load(config, set_ or []))
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
