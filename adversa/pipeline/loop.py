"""The cycle: which steps, in which order, on which folders. Running it again on the same folder is
how a run resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adversa.config import Config, check, dump
from adversa.engine.interface import Engine
from adversa.pipeline import latents, precision, ratio, sample_quality, test_access, train
from adversa.pipeline.stage import Page, PlannedStage, StageContext
from adversa.pipeline.stages import named, plan, reads, stages, step_folders
from adversa.run import control, differences, records, run_lock, status, step_folder, tracking
from adversa.run import create as run_create
from adversa.run.folder import RunDir, remove_partial_files, run_id
from adversa.run.status import Clock
from adversa.storage import tables
from adversa.storage.path import StoragePath


def recipe_of(config: Config) -> dict[str, object]:
    """What makes a run this run: all but how work is spread, who is told, how its denoiser is
    judged afterwards, and sweeps.
    """
    return config.model_dump(mode="json", exclude={"cluster", "tracking", "quality", "sweep"}) | {
        "mix": config.mix.recipe()
    }


def changed(config: Config, settings: dict[str, Any]) -> Config:
    """With some settings (dotted names) changed. UserError where a value is no good."""
    tree = config.model_dump(mode="json")
    for name, value in settings.items():
        section, _, key = name.partition(".")
        tree[section][key] = value
    return check(tree, control.SETTINGS) if settings else config


def open_run(config: Config, root: StoragePath, reopen: bool = False) -> RunDir:
    """Create or check the run folder: its recipe, and that the files of finished steps are there.
    Its path is absolute from here on: workers have working
    folders of their own.

    reopen: as of `review`.
    """
    return open_planned(config, root, reopen)[0]


def open_planned(
    config: Config, root: StoragePath, reopen: bool = False
) -> tuple[RunDir, list[PlannedStage]]:
    """As `open_run`: (the run, its stages)."""
    run = RunDir(root.absolute())
    records.check_run(run)
    planned = stages(config, run)
    records.check_steps(run, step_folders(planned))
    finished = [f for f in step_folders(planned) if step_folder.is_finished(f)]
    again = test_access.READING if test_access.was_opened(run) else ()
    opened = run_create.open_run(
        run.root,
        recipe_of(config),
        dump(config),
        reads(planned, run),
        busy=run_lock.is_worked_on,
        reopen=reopen,
        rereads=again,
    )
    tables.each(step_folder.checked, finished)
    return opened, planned


def review(config: Config, run: RunDir, reopen: bool) -> None:
    """Whether going on would open `test` again: UserError, or with `reopen` what was read before is
    set aside.

    The caller holds the run's lock.
    """
    test_access.review(run, test_access.asked(config, run), reopen)


def todo(planned: Sequence[PlannedStage], until: str | None = None) -> list[PlannedStage]:
    """The unfinished stages up to the first of the command `until` (None: all); empty where that
    command has nothing left to do.
    """
    left = [s for s in planned if not s.is_finished]
    if until is None:
        return left
    last = next((i for i, s in enumerate(left) if s.name == until), -1)
    return left[: last + 1]


def run(
    config: Config,
    run: RunDir,
    engine: Engine,
    report: Page,
    until: str | None = None,
    since: float | None = None,
    reopen: bool = False,
    handle: control.RunHandle = control.NULL_HANDLE,
    planned: Sequence[PlannedStage] | None = None,
) -> PlannedStage | None:
    """Do the stages of `todo`, in order.

    Returns the last stage it worked on (None: there was none). The caller holds the run's lock.
    since: as of `status.Clock`. reopen: `test` may be opened again where it was opened before.
    handle: of the run, where this process holds it. planned: its stages, where the caller has
    planned and reviewed them.
    """
    worked = None
    remove_partial_files(run)
    if planned is None:
        planned = plan(config, run, until)
        if until is None:
            review(config, run, reopen)
    waiting = {s.name for s in planned if not s.is_finished}
    if waiting & {"codec", "train", "denoiser", "evaluate"}:
        train.check_weights(config)
    if "codec" in waiting:
        latents.check_codec(config.codec, config.data.resolution)
    if "quality" in waiting:
        sample_quality.check(config)
    with tracking.Follow(config.tracking, run.root), Clock(run, since) as clock:
        engine.handle = handle
        precision.settle(config, run, engine)
        for stage in todo(planned, until):
            worked = stage
            clock.tick()
            _carry_out(stage, until, config, run, engine, report, reopen)
    return worked


def _carry_out(
    stage: PlannedStage,
    until: str | None,
    config: Config,
    run: RunDir,
    engine: Engine,
    page: Page,
    reopen: bool,
) -> None:
    """Do a stage, over and over until no pause comes between: what is finished of it is skipped."""

    row = named(stage.name)

    def told() -> dict[str, Any]:  # a setting may have changed since
        outputs = row.outputs(config, run, stage.round)
        return {"folders": [run.name_of(o.path) for o in outputs], "command": until}

    def work() -> None:
        status.set_status(run, "running", stage.title, **told())
        row.run(_context(stage.round, config, run, engine, page, reopen))

    def paused() -> None:
        status.set_status(run, "paused", stage.title, **told())

    control.with_pauses(engine.handle, work, paused)


def _context(
    number: int,
    config: Config,
    run: RunDir,
    engine: Engine,
    page: Page,
    reopen: bool,
) -> StageContext:
    """Of a round, which begins with it: the settings, and the id, are those of the run but for what
    was changed by hand (control.json).
    """
    recipe = recipe_of(config)
    if number:
        control.enter_round(run, number, differences.flatten(recipe))
    own = precision.settled(changed(config, control.recorded(run).get(number, {})), run)
    identity = control.run_id(run_id(recipe), run, number)
    added = ratio.resolve(own.mix, run, number)
    return StageContext(own, run, engine, number, identity, added, page, reopen)
