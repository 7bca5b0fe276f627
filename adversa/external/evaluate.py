"""A finished run's classifiers on an external cohort (another camera, another clinic), with the
figures and words of `test`.

RUN/external/NAME holds set.json (what the set was), the steps pictures/ (decoded, without those the
run has seen) and scores/, then summary.json and report.md. Thresholds come from the run's `select`;
the set chooses nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from adversa import config as cfg
from adversa.engine.interface import BatchEngine
from adversa.external import cohort
from adversa.external.cohort import ExternalCohort
from adversa.external.prepare import prepare
from adversa.pipeline import evaluate
from adversa.pipeline.folders import last_round, models_of
from adversa.run import differences, step_folder
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.storage.path import StoragePath, rmtree
from adversa.types import UserError


def models(config: cfg.Config, run: RunDir) -> list[tuple[str, int, StoragePath]]:
    """(arm, seed, folder) of every arm's classifiers after the last round, and of those before the
    first where they differ.

    UserError where one is not finished.
    """
    found = [
        (arm, seed, folder) for arm, seed, _, folder in models_of(config, run, last_round(config))
    ]
    if missing := [folder for _, _, folder in found if not step_folder.is_finished(folder)]:
        raise UserError(
            f"{run.root} is not finished ({run.name_of(missing[0])} is missing); finish it with: "
            f"adversa loop {run.config} --run-dir {run.root}"
        )
    return found


def check(external: ExternalCohort) -> bool:
    """Whether this very set is prepared. UserError where the folder holds another one, or the same
    set asked otherwise.

    What a cut-off or refused attempt left of another cohort is taken away: nothing was scored on
    it.
    """
    folder, records = external.folder, external.outside.records
    looks = cohort.looks_unchanged(records)
    saved = files.read_json(folder / "set.json")
    settings = external.settings()
    if saved is not None and saved["settings"] == settings and saved["looks"] == looks:
        return step_folder.is_finished(external.pictures)
    content = cohort.content(records)
    if saved is not None and step_folder.is_finished(external.pictures):
        changed = differences.differences(saved["settings"], settings)
        if not changed and content != saved["content"]:
            changed = [
                f"its rows or pictures have changed, {saved['images']} pictures then, "
                f"{len(records)} now"
            ]
        if changed:
            raise UserError(
                f"{folder} holds another evaluation ({'; '.join(changed)}); give this one "
                "its own --name, or delete that folder"
            )
    if saved is not None and saved["content"] != content:
        rmtree(external.pictures, missing_ok=True)
    files.write_json(
        folder / "set.json",
        {
            "path": external.data.path,
            "settings": settings,
            "looks": looks,
            "content": content,
            "images": len(records),
        },
    )
    return step_folder.is_finished(external.pictures)


def score(
    external: ExternalCohort, engine: BatchEngine, say: Callable[[str], None] = lambda _: None
) -> None:
    """Fill pictures/ and scores/. Called again after a cut it goes on where it was."""
    chosen = models(external.config, external.run)
    check(external)
    prepare(external, engine, say)
    evaluate.score(engine, chosen, external.pictures, external.pictures, False, external.scores)


def forget(external: ExternalCohort) -> None:
    """Take away the set's folder where nothing was made in it: recipes and progress alone. The
    caller holds its lock.
    """
    kept = {"set.json", "status.json", ".lock", step_folder.RECIPE, step_folder.PROGRESS}
    if any(p.is_file() and p.name not in kept for p in external.folder.rglob("*")):
        return
    rmtree(external.folder, missing_ok=True)
    with contextlib.suppress(
        OSError
    ):  # another cohort lies beside it; and what failed before is what the user must hear of
        external.folder.parent.rmdir()


def is_scored(external: ExternalCohort) -> bool:
    return check(external) and step_folder.is_finished(external.scores)
