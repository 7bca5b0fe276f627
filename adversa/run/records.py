"""The JSON files of a run, held against what adversa writes before a command works on the run: a
file that was cut off, zeroed or edited is named, with what to do about it.

Files of finished steps are listed in the manifests with their digests; the others have a shape.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence

from adversa.run.folder import RunDir
from adversa.run.step_folder import MANIFEST, OPENED, PROGRESS, RECIPE, damaged, is_finished
from adversa.storage import once, tables
from adversa.storage.path import BucketPath, StoragePath
from adversa.types import UserError

# A type; the shapes of an object's keys ("": of every other one), or of a list's members.
Shape = type | dict[str, "Shape"] | list["Shape"]

BACK = "put the file back as it was"
OPENING: Shape = {"opening": int, "opened": str, "reason": str, "models": {"": str}}
OF_RUN: dict[str, tuple[Shape, str]] = {
    "run.json": ({"recipe": dict, "created": str}, f"{BACK}, or give another --run-dir"),
    "status.json": (
        {"state": str, "stage": str, "pid": int, "host": str, "updated": float},
        "delete it: it says what the run was doing last, and is written anew",
    ),
    "lock.json": (
        {"owner": str, "host": str, "machine": str, "pid": int, "beat": int, "held": float},
        "delete it where no command works on the run",
    ),
    "clock.json": ({"wall_seconds": float}, "delete it: the run's wall time begins at 0 again"),
    "control.json": (
        {"state": str, "settings": dict},
        "delete it, and ask again for a pause or for settings",
    ),
    "settings.json": ({"": dict}, f"{BACK}: it alone says with which settings rounds were made"),
    "restarts.json": (
        {"restarts": int, "seconds": float},
        "delete it: restarts are counted from 0 again",
    ),
    "openings.json": ([OPENING], f"{BACK}: it alone knows when test was opened"),
}
OF_END: dict[str, tuple[Shape, str]] = {
    "summary.json": (
        {"arms": dict, "before": dict, "used": dict, "added": dict, "rejected": dict}
        | {"notes": [str], "verdict_sentence": str, "generated": int, "accepted": int},
        "delete it: the same command makes it again",
    ),
}
OF_STEP: dict[str, Shape] = {
    RECIPE: {"step": str, "version": int, "config": dict, "inputs": {"": str}},
    MANIFEST: {
        "step": str,
        "fingerprint": str,
        "files": {"": {"bytes": int, "digest": str}},
        "seconds": float,
        "compute_seconds": float,
        "device_seconds": float,
    },
    PROGRESS: {"elapsed": float},
    OPENED: OPENING,
}
WORDS = {dict: "no object", list: "no list", str: "no text", int: "no integer", float: "no number"}
AGAIN_SECONDS = 0.2  # another process may be writing it


def check_run(run: RunDir) -> None:
    """UserError that names the first file in the run's own folder that is damaged. A folder that
    holds no run is no matter of this.
    """
    if not run.recipe.exists():
        return
    on_store = isinstance(run.root, BucketPath)  # a request each; a store puts them whole
    _check(run, {n: s for n, s in OF_RUN.items() if not (on_store and n in once.LIVE)})


def check_end(run: RunDir) -> None:
    """As `check_run`, of what a finished run is shown by."""
    _check(run, OF_END)


def _check(run: RunDir, shapes: Mapping[str, tuple[Shape, str]]) -> None:
    for name, (shape, fix) in shapes.items():
        if what := _fault(run.root / name, shape):
            raise UserError(f"{run.root / name} is damaged: {what}; {fix}")


def check_steps(run: RunDir, folders: Sequence[StoragePath]) -> None:
    """As `check_run`, of steps' folders and of those that trials of a round lie in. An object store
    keeps digests of its own.
    """
    if isinstance(run.root, BucketPath):
        return
    begun = (p.parent for p in run.root.glob("round-*/ratio/**/*") if p.name in (RECIPE, MANIFEST))
    tables.each(_check_step, list(dict.fromkeys([*folders, *begun])))


def _check_step(folder: StoragePath) -> None:
    for name, shape in OF_STEP.items():
        if what := _fault(folder / name, shape):
            raise damaged(folder, name, f"is damaged: {what}")
    if not is_finished(folder):
        return
    for name, known in json.loads(once.read_bytes(folder / MANIFEST))["files"].items():
        path = folder / name
        if path.suffix != ".json" or not path.is_file():
            continue
        if hashlib.sha256(once.read_bytes(path)).hexdigest() != known["digest"]:
            raise damaged(folder, name, "holds other bytes than were written")


def _fault(path: StoragePath, shape: Shape) -> str:
    """What is wrong with a file, in words; empty where nothing is, or there is no file."""
    what = _fault_now(path, shape)
    if what and path.name in once.LIVE:
        time.sleep(AGAIN_SECONDS)
        what = _fault_now(path, shape)
    return what


def _fault_now(path: StoragePath, shape: Shape) -> str:
    try:
        data = once.read_bytes(path)
        return _misfit(json.loads(data.decode()), shape, "it") if data else "it is empty"
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except IsADirectoryError:
        return "it is a folder"
    except (ValueError, RecursionError) as e:
        return f"it is no JSON ({' '.join(str(e).split())[:100]})"


def _misfit(value: object, shape: Shape, name: str) -> str:
    """How a value differs from a shape, in words; empty where it does not."""
    if isinstance(shape, type):
        kinds = (int, float) if shape is float else shape
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        return "" if fits else f"{name} is {WORDS[shape]}"
    if not isinstance(value, type(shape)):
        return f"{name} is {WORDS[type(shape)]}"
    if isinstance(value, list) and isinstance(shape, list):
        found = [_misfit(inside, shape[0], "a member") for inside in value]
        return next(filter(None, found), "")
    assert isinstance(value, dict) and isinstance(shape, dict)
    if missing := [key for key in shape if key and key not in value]:
        return f"it lacks {missing[0]}"
    shapes = {key: shape.get(key, shape.get("")) for key in value}
    found = [_misfit(value[k], s, k[:40]) for k, s in shapes.items() if s is not None]
    return next(filter(None, found), "")
