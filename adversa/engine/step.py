"""A step is a function from folders to a folder. Recipe first, parts, manifest last: so running it
again is how it resumes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from adversa.engine.interface import BatchEngine
from adversa.engine.tasks import Done, Make, Part, Report, Share
from adversa.run import step_folder
from adversa.run.control import RunHandle
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files
from adversa.storage.path import StoragePath
from adversa.types import Json

Facts = Json


def run_step(
    folder: StoragePath,
    recipe: Recipe,
    body: Callable[[Progress], Facts],
    handle: RunHandle,
    option: str = "--run-dir",
) -> None:
    """Run `body` unless the step is finished; it must write every part and return at least `rows`.

    option: what the user gave the folder by. UserError where it was made by another recipe, or
    cannot be written.
    """
    with files.writing(folder, option, kept=True):
        folder.mkdir(parents=True, exist_ok=True)
        if step_folder.is_finished(folder) and step_folder.begin(folder, recipe, option):
            return
        handle.poll()
        step_folder.begin(folder, recipe, option)
        progress = Watched(folder, handle)
        facts = body(progress)
        seconds = progress.elapsed
        compute = seconds - facts.pop("waited", 0.0)
        if (lanes := facts.pop("lanes", 0)) and "device_seconds" in facts:
            facts["device_seconds"] += (
                progress.before * lanes
            )  # of attempts that were cut off nothing finer is known
        handle.check()
        step_folder.finish(
            folder,
            recipe,
            **({"seconds": seconds, "compute_seconds": compute, "device_seconds": compute} | facts),
        )


class Watched(Progress):
    """Progress of a step that may be told to pause or to stop after each part."""

    def __init__(self, folder: StoragePath, handle: RunHandle) -> None:
        super().__init__(folder)
        self.handle = handle

    def __call__(self, state: Json) -> None:
        super().__call__(state)
        self.handle.poll()


def cost(done: Sequence[Done | Share], workers: int, wall: float) -> Facts:
    """What a call of the engine cost: `device_seconds` in all, and the seconds of its wall time
    `waited` for anything but compute.

    Compute is taken as the parts shared evenly among the workers. lanes: how many those are, for
    `run_step`, which adds the time of attempts that were cut off as if all of them had been at
    work.
    """
    total = sum(d.seconds for d in done)
    waited = max(0.0, wall - total / max(1, min(workers, len(done))))
    return {"waited": waited, "device_seconds": total, "lanes": workers}


def mapped(
    engine: BatchEngine,
    make: Make,
    parts: Sequence[Part],
    out: StoragePath,
    progress: Report,
    model: bool = False,
) -> Facts:
    """What `engine.map_batches` cost, and its `rows`."""
    started = time.perf_counter()
    done = engine.map_batches(make, parts, out, progress, model=model)
    spent = cost(done, engine.tasks(model=model), time.perf_counter() - started)
    return spent | {"rows": sum(p.rows for p in parts)}


def inputs(**folders: StoragePath) -> dict[str, str]:
    """The fingerprints of what a step reads."""
    return {name: step_folder.fingerprint(folder) for name, folder in folders.items()}
