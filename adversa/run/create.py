"""Creating a run folder, or checking that a configuration fits what is in it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from adversa.run.differences import _versions_apart, differences
from adversa.run.environment import now
from adversa.run.file_lock import is_locked
from adversa.run.folder import RunDir, check_links
from adversa.run.step_folder import MANIFEST, OPENED, RECIPE, _advice, _begun, is_finished
from adversa.storage.files import read_json, replace_bytes, write_json, writing
from adversa.storage.path import StoragePath, StoreError
from adversa.types import UserError


def open_run(
    root: StoragePath,
    recipe: dict[str, Any],
    config_yaml: str,
    reopen: bool = False,
    busy: Callable[[RunDir], bool] | None = None,
) -> RunDir:
    """Create the run folder, or check that it was made by the same recipe.

    busy: whether somebody works on the run (default: on this machine): then nothing is changed in
    it. reopen: `test` may be opened again, so how it is read may differ where it was opened before
    (READING). UserError with the fields that differ, or why the folder can't be written.
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
            write_json(run.recipe, {"recipe": recipe, "created": now()})
            replace_bytes(run.config, config_yaml.encode())
        return run
    if _of_sweep(saved.get("recipe", {})) != _of_sweep(recipe):
        kinds = (
            ("a run of the loop", "a sweep")
            if _of_sweep(recipe)
            else ("a sweep", "a run of the loop")
        )
        raise UserError(
            f"{root} holds {kinds[0]}, this command is for {kinds[1]}; give another --run-dir"
        )
    changed = differences(saved.get("recipe", {}), recipe)
    idle = bool(changed) and not (busy or is_locked)(run)
    if changed and _may_change(run, changed) and idle:
        with _opening(root):
            for stale in root.rglob(RECIPE):
                if not is_finished(stale.parent) and (
                    stale.parent == run.data or not _begun(stale.parent)
                ):
                    stale.unlink()
            write_json(run.recipe, {"recipe": recipe, "created": now()})
            replace_bytes(run.config, config_yaml.encode())
    elif changed and reopen and _only_reads(run, changed) and idle:
        with _opening(root):
            write_json(run.recipe, saved | {"recipe": recipe})
            replace_bytes(run.config, config_yaml.encode())
    elif changed:
        again = (
            ", or --reopen-test: test is read a second time, and the report says so"
            if _only_reads(run, changed)
            else ""
        )
        advice = _advice(_versions_apart(saved.get("recipe", {}), recipe), run.data)
        raise UserError(
            f"{root} was made by another recipe ({'; '.join(changed)}); {advice}{again}"
        )
    with _opening(root):
        if not run.config.exists():  # killed between the two files
            replace_bytes(run.config, config_yaml.encode())
        probe = root / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    return run


# What comes before the first classifier, and the sections and fields it is made of beside those of
# the folders above it. The steps' own recipes do not guard these: a finished stage is not asked
# again, and latents of eight views would be trained on without a word where `denoiser.flips` is
# off.
MADE_OF = {
    "data": ("data",),
    "round-000/real/mix": ("mix",),
    "judge/mix": ("curate.folds",),
    "codec": ("codec", "denoiser.balance", "seed"),
    "latents/train": ("denoiser.flips",),
    "latents/select": (),
}


def _may_change(run: RunDir, changed: list[str]) -> bool:
    """Whether nothing made so far hangs on the fields that differ: then a setting that stopped a
    step may be mended in place.

    A training that has a checkpoint counts as made: it would go on from the weights of the old
    settings. Not so a data folder that is not finished: it looks through its parts itself.
    """
    made = {p.parent for p in run.root.rglob(MANIFEST)}
    made |= {p.parent for p in run.root.rglob(RECIPE) if p.parent != run.data and _begun(p.parent)}
    names = [re.sub(r"^judge/mix-\d+$", "judge/mix", run.name_of(folder)) for folder in made]
    if any(name not in MADE_OF for name in names):
        return False
    fields = [field for name in names for field in MADE_OF[name]]
    keys = [c.partition(":")[0] for c in changed]
    return not any(key == field or key.startswith(f"{field}.") for key in keys for field in fields)


# The fields that only say how `test` is read once it is open: no classifier hangs on them.
READING = tuple(
    f"evaluate.{field}" for field in ("bootstrap", "groups", "specificities", "floor", "subgroups")
)


def _only_reads(run: RunDir, changed: list[str]) -> bool:
    """Whether `test` was opened before, and nothing but READING differs."""
    keys = [c.partition(":")[0] for c in changed]
    opened = run.openings.exists() or (run.test / OPENED).exists()
    return opened and all(
        any(key == field or key.startswith(f"{field}.") for field in READING) for key in keys
    )


@contextlib.contextmanager
def _opening(root: StoragePath) -> Iterator[None]:
    """Whatever a file system says against a new run folder is for the user to mend: here it can't
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


def _of_sweep(recipe: dict[str, Any]) -> bool:
    """Whether it is a sweep's: that has no `mix` (sweep.recipe_of)."""
    return "sweep" in recipe and "mix" not in recipe
