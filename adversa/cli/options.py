"""What several commands take, and how they end. No torch, no ray."""

from __future__ import annotations

import functools
import inspect
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from adversa.cli.console import error

if TYPE_CHECKING:
    from adversa.config import Config
    from adversa.run.folder import RunDir
    from adversa.storage.path import StoragePath as RunFolder
else:
    RunFolder = Path  # typer takes no union, and calls the parser whatever the type

T = TypeVar("T")


def run_path(text: str) -> RunFolder:
    """A run's folder, or its address on an object store: pathlib would take the slashes of s3://
    for one.
    """
    if "://" not in text:
        return Path(text)
    from adversa.storage.path import storage_path
    from adversa.types import UserError

    try:
        return storage_path(text)
    except UserError as e:
        raise typer.BadParameter(str(e)) from None


ConfigPath = Annotated[
    Path | None, typer.Argument(metavar="[CONFIG]", help="A YAML file; none: the built-in demo.")
]
RunPath = Annotated[
    RunFolder | None,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        parser=run_path,
        help="The run's folder, or s3://BUCKET/FOLDER; default: runs/NAME-OF-CONFIG.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, say data.resolution=64."),
]
Rounds = Annotated[int | None, typer.Option("--rounds", help="Rounds of mine, generate, retrain.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the run.")]
SavedRun = Annotated[
    RunFolder | None,
    typer.Argument(metavar="[RUN]", parser=run_path, help="The run's folder; default: runs/demo."),
]
SavedRunDir = Annotated[
    RunFolder | None,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        parser=run_path,
        help="The same, as the other commands take it.",
    ),
]
EngineName = Annotated[
    str, typer.Option("--engine", metavar="ray|local", help="Where the work runs.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what Ray says.")]
ClusterPath = Annotated[
    Path | None,
    typer.Option("--cluster", metavar="FILE", help="A cluster file: there instead of here."),
]


@dataclass(frozen=True)
class RunOptions:
    """What the commands take that bring a run up to the end of a stage."""

    run_dir: RunPath = None
    set_: Overrides = None
    rounds: Rounds = None
    seed: Seed = None
    engine: EngineName = "ray"
    verbose: Verbose = False

    @property
    def overrides(self) -> list[str]:
        return self.set_ or []


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the parameter `options`, of which the command line gives each field."""
    signature = inspect.signature(command, eval_str=True)
    fields = inspect.signature(RunOptions, eval_str=True).parameters
    own = [p for name, p in signature.parameters.items() if name != "options"]

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        command(options=RunOptions(**{name: given.pop(name) for name in fields}), **given)

    every = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *fields.values())]
    vars(wrapped)["__signature__"] = signature.replace(parameters=every)
    wrapped.__annotations__ = {p.name: p.annotation for p in every}
    return wrapped


def exits(command: Callable[..., None]) -> Callable[..., None]:
    """Exit codes: 2 and one line for what is fixable by the user; anything else that escapes is our
    fault: a traceback and 1.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from adversa.types import UserError

        try:
            command(*args, **kwargs)
        except UserError as e:
            error("; ".join([str(e), *getattr(e, "__notes__", [])]))
            raise typer.Exit(2) from None

    return wrapped


# What comes of values that are of another kind, or missing, or too deep.
FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
)


def reads_run(command: Callable[..., T]) -> Callable[..., T]:
    """For commands that only look into a run's folder, which may come from anywhere and say
    anything: where it does not say what adversa writes there, that is told in one line, with the
    place in the code; the traceback goes into a temporary file.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> T:
        from adversa.types import UserError

        try:
            return command(*args, **kwargs)
        except (UserError, typer.Exit, typer.Abort):
            raise
        except FAULTS as e:
            with tempfile.NamedTemporaryFile(
                "w", prefix="adversa-traceback-", suffix=".txt", delete=False
            ) as kept:
                kept.write("".join(traceback.format_exception(e)))
            at = traceback.extract_tb(e.__traceback__)[-1]
            what = " ".join(f"{type(e).__name__}: {e}".split())[:200]
            raise UserError(
                "the folder does not hold what this version of adversa writes there "
                f"({what}; {Path(at.filename).name}:{at.lineno}); if adversa made it and "
                "nothing else changed it, that is a fault "
                f"of adversa, and {kept.name} has the traceback"
            ) from None

    return wrapped


def saved_run(argument: RunFolder | None, option: RunFolder | None) -> tuple[Config, RunDir]:
    from adversa.config import load
    from adversa.run.folder import RunDir
    from adversa.types import UserError

    if argument and option and argument != option:
        raise UserError(f"two run folders, {argument} and --run-dir {option}; give one")
    run = RunDir(argument or option or Path("runs/demo"))
    if not run.config.is_file():
        raise UserError(
            f"{run.root} is not a run (it has no config.yaml); give the folder of --run-dir"
        )
    return load(run.config), run
