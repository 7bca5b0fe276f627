"""A step's folder: its recipe, its progress, and the manifest that says it is finished."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import dataclass
from typing import Any

from adversa.run.differences import _versions_apart, differences, flatten
from adversa.run.environment import git_commit, machine, now, versions
from adversa.storage import tables
from adversa.storage.files import MANIFEST as MANIFEST
from adversa.storage.files import read_json, sha256, write_json, writing
from adversa.storage.path import BucketPath, StoragePath, sizes
from adversa.storage.weights import CHECKPOINT, COMMITTED
from adversa.types import Json, UserError, digest

RECIPE, PROGRESS, OPENED = "recipe.json", "progress.json", "opened.json"


SHAPELESS = ("order",)  # steps whose recipes have as many fields as were asked for


def _advice(apart: list[str], made: StoragePath, option: str = "--run-dir") -> str:
    """What to do about a recipe that differs. apart: of _versions_apart; made: a folder whose
    manifest may name who made it.
    """
    if not apart:
        return f"use those values again, or another {option}"
    known = read_json(made / MANIFEST) or {}
    version, commit = known.get("versions", {}).get("adversa"), known.get("git")
    named = ", ".join([f"adversa {version}"] * bool(version) + [f"commit {commit}"] * bool(commit))
    that = f"that version ({named})" if named else "that version"
    return (
        f"another version of adversa made it: {', '.join(apart)}; finish it with {that}, or "
        f"give another {option}"
    )


# ---- steps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What a step was asked: its own section of the configuration and the fingerprints of what it
    reads.
    """

    step: str
    version: int
    config: Json
    inputs: dict[str, str]

    def to_json(self) -> Json:
        return {
            "step": self.step,
            "version": self.version,
            "config": self.config,
            "inputs": self.inputs,
        }

    @property
    def fingerprint(self) -> str:
        return digest(json.dumps(self.to_json(), sort_keys=True))


def begin(folder: StoragePath, recipe: Recipe, option: str = "--run-dir") -> bool:
    """True where the step is finished already. Writes the recipe; UserError with the fields where
    another one is there.

    option: what the user gave the folder by.
    """
    asked, saved = recipe.to_json(), read_json(folder / RECIPE)
    if saved is None:
        assert not (folder / MANIFEST).exists(), f"{folder} has a manifest and no recipe"
        write_json(folder / RECIPE, asked)
    elif (changed := differences(saved, asked)) and not _begun(folder):
        write_json(folder / RECIPE, asked)
    elif changed:
        advice = _advice(_steps_apart(saved, asked), folder, option)
        raise UserError(f"{folder} was made by another recipe ({'; '.join(changed)}); {advice}")
    return is_finished(folder)


def _steps_apart(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """As _versions_apart, of a step's recipe: it has another number in another version, and what it
    reads has other names in other settings. Some steps (codec, denoiser) have recipes of two
    shapes, which differ in a field that both have as well.
    """
    a, b = (flatten(json.loads(json.dumps(r.get("config", {})))) for r in (saved, asked))
    same = all(a[k] == b[k] for k in a.keys() & b.keys()) and asked["step"] not in SHAPELESS
    apart = _versions_apart(saved.get("config", {}), asked["config"]) if same else []
    if saved.get("version") != asked["version"]:
        apart.append(
            f"its step {asked['step']} has number {saved.get('version')}, here it has "
            f"{asked['version']}"
        )
    return apart


def _begun(folder: StoragePath) -> bool:
    """Whether a step has anything to lose: a part, a model, training state, or its manifest."""
    return any(
        p.name == MANIFEST or p.suffix in (".parquet", ".safetensors", ".pt")
        for p in folder.rglob("*")
    )


def is_finished(folder: StoragePath) -> bool:
    return (folder / MANIFEST).exists()


def finish(folder: StoragePath, recipe: Recipe, **facts: Any) -> Json:
    """Mark a step complete: the manifest is the last thing written, and lists every other file.

    facts: at least seconds, compute_seconds, device_seconds and rows.
    """
    manifest: Json = {"step": recipe.step, "fingerprint": recipe.fingerprint, "finished": now()}
    manifest |= {"versions": versions(), "git": git_commit(), "machine": machine()} | facts
    manifest["files"] = _listed(folder)
    (folder / PROGRESS).unlink(missing_ok=True)
    write_json(folder / MANIFEST, manifest)
    return manifest


def manifest(folder: StoragePath) -> Json:
    """Of a finished step. UserError where the file is none that `finish` wrote."""
    found = read_json(folder / MANIFEST)
    if found is None:
        assert is_finished(folder), f"{folder} is not finished"
        raise damaged(folder, MANIFEST, "is no manifest")
    return found


def fingerprint(folder: StoragePath) -> str:
    """What a later step knows a finished one by. UserError where a file of it is damaged."""
    found: str = checked(folder)["fingerprint"]
    _check_contents(folder, found)
    return found


# ---- the files of a finished step ----------------------------------------------------------------

# Beside what the step made: written before or after, and read by those alone who know to doubt it.
UNLISTED = (RECIPE, MANIFEST, PROGRESS, OPENED, CHECKPOINT, COMMITTED)


def _listed(folder: StoragePath) -> dict[str, Json]:
    """Each file's bytes, digest and, of Parquet, rows."""
    found = {}
    for name, size in sorted(sizes(folder).items()):
        if name not in UNLISTED and not any(part.startswith(".") for part in name.split("/")):
            path = folder / name
            found[name] = {"bytes": size, "digest": sha256(path)}
            if path.suffix == ".parquet":
                found[name]["rows"] = tables.count(path)
    return found


def checked(folder: StoragePath) -> Json:
    """The manifest of a finished step whose files are there, each with as many bytes as it says.
    UserError that names the first which is not.
    """
    found, there = manifest(folder), sizes(folder)
    if "files" not in found:
        raise damaged(folder, MANIFEST, "does not list the step's files")
    for name, known in found["files"].items():
        if name not in there:
            raise damaged(folder, name, "is no file" if (folder / name).exists() else "is gone")
        if there[name] != known["bytes"]:
            what = f"has {there[name]} bytes, and {known['bytes']} were written"
            raise damaged(folder, name, what)
    return found


@functools.cache
def _check_contents(folder: StoragePath, fingerprint: str) -> None:
    """Once a command: it reads every file. An object store keeps digests of its own."""
    if isinstance(folder, BucketPath):
        return
    for name, known in manifest(folder)["files"].items():
        if sha256(folder / name) != known["digest"]:
            raise damaged(folder, name, "holds other bytes than were written")


def damaged(folder: StoragePath, name: str, what: str) -> UserError:
    return UserError(
        f"{folder / name} {what}; put the file back as it was, or delete {folder}: the same "
        "command makes it again"
    )


REMOTE_SECONDS = 2.0  # a put takes tens of milliseconds, and costs


class Progress:
    """Writes progress.json into a step's folder, at most twice a second: the one source of the live
    view and of `status`.

    On an object store every REMOTE_SECONDS.

    `elapsed` carries on from an attempt that was cut off, so that the manifest's seconds are the
    step's whole cost.
    """

    def __init__(self, folder: StoragePath, interval: float = 0.5) -> None:
        self.folder, self.interval = (
            folder,
            max(interval, REMOTE_SECONDS) if isinstance(folder, BucketPath) else interval,
        )
        self.started = time.monotonic()
        self.before = float((read_json(folder / PROGRESS) or {}).get("elapsed", 0.0))
        self.first: tuple[float, float] | None = (
            None  # when, and how much was done, at the first report of this attempt
        )
        self.written = 0.0

    @property
    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.started

    def __call__(self, state: Json) -> None:
        t = time.monotonic()
        if self.first is None:
            self.first = (t, float(state.get("done", 0)))
        if t - self.written < self.interval:
            return
        self.written = t
        rate = (
            (float(state.get("done", 0)) - self.first[1]) / (t - self.first[0])
            if t > self.first[0]
            else 0.0
        )
        with writing(self.folder):
            write_json(
                self.folder / PROGRESS,
                state | {"elapsed": self.elapsed, "rate": rate, "updated": time.time()},
            )
