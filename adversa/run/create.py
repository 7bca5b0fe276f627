"""Creating a run folder, or checking that a configuration fits what is in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from adversa.run.differences import _versions_apart, differences
from adversa.run.environment import now
from adversa.run.file_lock import is_locked
from adversa.run.folder import RunDir, check_links
from adversa.run.step_folder import MANIFEST, RECIPE, _advice, _begun, is_finished
from adversa.storage import once
from adversa.storage.files import read_json, replace_bytes, write_json, writing
from adversa.storage.path import StoragePath, StoreError
from adversa.types import Json, UserError


def open_run(
    root: StoragePath,
    recipe: Json,
    config_yaml: str,
    reads: Mapping[str, Sequence[str]] = {},
    busy: Callable[[RunDir], bool] = is_locked,
    reopen: bool = False,
    rereads: Sequence[str] = (),
) -> RunDir:
    """Create the run folder, or check that it was made by the same recipe.

    reads: the keys of the configuration that each step reads, by its folder's name; a folder that
    is not named reads all. busy: whether somebody works on the run: then nothing is changed in it.
    rereads: keys that say how `test`, which was opened, is read; with `reopen` they may differ.
    UserError with the fields that differ, or why the folder can't be written.
    """
    run = RunDir(root)
    with _opening(root):
        saved = read_json(run.recipe)
        if saved is not None:
            check_links(root)
    if saved is None:
        if root.is_dir() and any(p for p in root.iterdir() if not p.name.startswith(".")):
            raise UserError(
                f"{root} is not empty and not a run; give an empty or new folder with --run-dir"
            )
        with _opening(root):
            root.mkdir(parents=True, exist_ok=True)
            _write(run, {"recipe": recipe, "created": now()}, config_yaml)
        return run
    known = saved.get("recipe", {})
    if _of_sweep(known) != _of_sweep(recipe):
        kinds = ["a run of the loop", "a sweep"]
        here, there = kinds if _of_sweep(recipe) else reversed(kinds)
        raise UserError(f"{root} holds {here}, this command is for {there}; give another --run-dir")
    changed = differences(known, recipe)
    keys = [c.partition(":")[0] for c in changed]
    idle = bool(changed) and not busy(run)
    only_rereads = bool(rereads) and all(_within([key], rereads) for key in keys)
    if changed and _may_change(run, keys, reads) and idle:
        with _opening(root):
            _remove_unbegun(run)
            _write(run, {"recipe": recipe, "created": now()}, config_yaml)
    elif changed and reopen and only_rereads and idle:
        with _opening(root):
            _write(run, saved | {"recipe": recipe}, config_yaml)
    elif changed:
        again = ", or --reopen-test: test is read a second time, and the report says so"
        advice = _advice(_versions_apart(known, recipe), run.data) + again * only_rereads
        raise UserError(f"{root} was made by another recipe ({'; '.join(changed)}); {advice}")
    with _opening(root):
        if not run.config.exists():  # killed between the two files
            replace_bytes(run.config, config_yaml.encode())
        probe = root / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    return run


def _write(run: RunDir, recipe: Json, config_yaml: str) -> None:
    write_json(run.recipe, recipe)
    replace_bytes(run.config, config_yaml.encode())


def _remove_unbegun(run: RunDir) -> None:
    """Recipes of steps that have nothing yet, which were asked with the old settings."""
    for stale in run.root.rglob(RECIPE):
        folder = stale.parent
        if not is_finished(folder) and (folder == run.data or not _begun(folder)):
            stale.unlink()
            once.forget(stale)


def _may_change(run: RunDir, keys: list[str], reads: Mapping[str, Sequence[str]]) -> bool:
    """Whether no step that has begun reads a key that differs: then a setting that stopped a step
    may be fixed in place.

    A training that has a checkpoint has begun: it would go on from the weights of the old settings.
    Not so a data folder that is not finished: it looks through its parts itself.
    """
    begun = {p.parent for p in run.root.rglob(MANIFEST)}
    begun |= {p.parent for p in run.root.rglob(RECIPE) if p.parent != run.data and _begun(p.parent)}
    return not any(_within(keys, reads.get(run.name_of(folder), ("",))) for folder in begun)


def _within(keys: Sequence[str], fields: Sequence[str]) -> bool:
    """Whether any key is one of the fields, or below one; "" stands for all."""
    return any(
        not field or key == field or key.startswith(f"{field}.") for key in keys for field in fields
    )


@contextlib.contextmanager
def _opening(root: StoragePath) -> Iterator[None]:
    """Whatever a file system says against a new run folder is for the user to fix: here it can't
    be a fault of ours.
    """
    try:
        with writing(root):
            yield
    except StoreError:
        raise
    except OSError as e:
        raise UserError(
            f"cannot write to {e.filename or root}: {e.strerror or e}; give another --run-dir"
        ) from None


def is_sweep(run: RunDir) -> bool:
    """Whether the folder holds a sweep, and no run of the loop."""
    return _of_sweep((read_json(run.recipe) or {}).get("recipe", {}))


def _of_sweep(recipe: Json) -> bool:
    """Whether it is a sweep's: that has no `mix` (sweep.recipe_of)."""
    return "sweep" in recipe and "mix" not in recipe
