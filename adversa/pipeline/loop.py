"""The cycle: which steps, in which order, on which folders. Running it again on the same folder is
how a run resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from adversa.config import AUTO, Config, check, dump
from adversa.engine.interface import Engine, FitJob
from adversa.pipeline import (
    curate,
    evaluate,
    generate,
    latents,
    mine,
    parity_check,
    prepare,
    ratio,
    results,
    sample_quality,
    stages,
    summary,
    test_access,
    train,
    verifier,
)
from adversa.pipeline.stages import (
    Stage,
    has_codec,
    last_round,
    models_of,
    needs_classifier,
    plan,
    retrained,
    trained,
)
from adversa.run import control, differences, run_lock, status, tracking
from adversa.run import create as run_create
from adversa.run.folder import RunDir, classes_of, remove_partial_files, run_id
from adversa.run.status import Clock
from adversa.types import ROLES


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
    return check(tree, control.CONTROL) if settings else config


def open_run(config: Config, root: Path, reopen: bool = False) -> RunDir:
    """Create or check the run folder. Its path is absolute from here on: workers have working
    folders of their own.

    reopen: as of `review`.
    """
    return run_create.open_run(
        root.absolute(), recipe_of(config), dump(config), reopen, run_lock.is_worked_on
    )


def review(config: Config, run: RunDir, reopen: bool) -> None:
    """Whether going on would open `test` again: UserError, or with `reopen` what was read before is
    set aside.

    The caller holds the run's lock.
    """
    test_access.review(run, test_access.asked(config, run), reopen)


def todo(config: Config, run: RunDir, until: str | None = None) -> list[Stage]:
    """The unfinished stages up to the first of the command `until` (None: all); empty where that
    command has nothing left to do.
    """
    left = [s for s in plan(config, run, until) if not s.is_finished]
    if until is None:
        return left
    last = next((i for i, s in enumerate(left) if s.command == until), -1)
    return left[: last + 1]


def run(
    config: Config,
    run: RunDir,
    engine: Engine,
    report: Callable[[Path], Path],
    until: str | None = None,
    since: float | None = None,
    reopen: bool = False,
) -> Stage | None:
    """Do the stages of `todo`, in order.

    Returns the last stage it worked on (None: there was none). The caller holds the run's lock.
    since: as of `runs.Clock`. reopen: `test` may be opened again where it was opened before.
    """
    cycle = Cycle(config, run, engine, reopen)
    worked = None
    remove_partial_files(run)
    if until is None:
        review(config, run, reopen)
    waiting = {s.command for s in todo(config, run, "quality" if until == "quality" else None)}
    if waiting & {"codec", "train", "denoiser", "evaluate"}:
        train.check_weights(config)
    if "codec" in waiting:
        latents.check_codec(config.codec, config.data.resolution)
    if "quality" in waiting:
        sample_quality.check(config)
    with tracking.Follow(config.tracking, run.root), Clock(run, since) as clock:
        for stage in todo(config, run, until):
            worked = stage
            _carry_out(cycle, stage, report, clock, until)
    return worked


def _carry_out(
    cycle: Cycle, stage: Stage, report: Callable[[Path], Path], clock: Clock, until: str | None
) -> None:
    """Do a stage, over and over until no pause comes between: what is finished of it is skipped."""
    while True:
        now = next(
            s for s in plan(cycle.asked, cycle.dir, until) if s.title == stage.title
        )  # a setting may have changed since
        told = {"folders": [cycle.dir.name_of(f) for f in now.folders], "command": until}
        try:
            control.reins().look(force=True)
            status.set_status(cycle.dir, "running", stage.title, **told)
            if stage.command == "report":
                clock.tick()
                summary.write(cycle.config, cycle.dir)
                report(cycle.dir.root)
            else:
                cycle.enter(stage.round)
                getattr(cycle, stage.command)(stage.round)
            return
        except control.Pause:
            status.set_status(cycle.dir, "paused", stage.title, **told)
            control.reins().rest()


class Cycle:
    """One method a command; the round's number is its only argument."""

    def __init__(self, config: Config, run: RunDir, engine: Engine, reopen: bool = False) -> None:
        self.asked, self.config, self.dir, self.engine, self.reopen = (
            config,
            config,
            run,
            engine,
            reopen,
        )
        self.name = self.id = run_id(recipe_of(config))
        self.seeds = range(config.evaluate.seeds)

    def enter(self, number: int) -> None:
        """From here on the settings, and the id, of a round: those of the run but for what was
        changed by hand (control.json).
        """
        if number:
            control.enter_round(self.dir, number, differences.flatten(recipe_of(self.asked)))
        self.config = changed(self.asked, control.recorded(self.dir).get(number, {}))
        self.id = control.run_id(self.name, self.dir, number)

    def prepare(self, number: int) -> None:
        prepare.prepare(self.engine, self.config.data, self.dir.data)

    def codec(self, number: int) -> None:
        """Where latents are diffused: the autoencoder, fitted on the arm `real` or given; the
        latents of `train` and `select`.

        What may refuse a setting comes first: it can be mended in place as long as nothing that
        hangs on it is made.
        """
        c, d = self.config, self.dir
        mix, classes = d.arm(0, "real") / "mix", classes_of(d.data)
        if not c.codec.is_fitted:
            latents.fetch(d.data, c.codec, c.data.resolution, d.codec)
        train.check_models(c, classes, True, d.codec)
        self._first_mix()
        if c.codec.is_fitted:
            self.engine.fit(
                [
                    latents.codec_job(
                        d.data, mix, c.codec, c.denoiser.balance, c.seed, c.data.resolution, d.codec
                    )
                ]
            )
        if c.denoiser.external is None:
            views = c.codec.views if c.denoiser.flips else 1
            latents.encode(
                self.engine, d.data / "train", d.data, d.codec, views, d.latents("train")
            )
            latents.encode(
                self.engine,
                d.data / "select",
                d.data,
                d.codec,
                1,
                d.latents("select"),
                d.latents("train"),
            )

    def train(self, number: int) -> None:
        """Before the first round: the classifiers of the arm `real`, the judges, then the denoiser,
        in one launch.
        """
        c, d = self.config, self.dir
        results.check_groups(c.evaluate, classes_of(d.data))
        train.check_models(c, classes_of(d.data), c.mix.paints, d.codec)
        self._first_mix()
        jobs = [self._classifier(0, "real", seed) for seed in self.seeds]
        if c.mix.paints:
            jobs += [*verifier.jobs(d.data, c, d.judge), *self._denoiser()]
        self.engine.fit(jobs)

    def denoiser(self, number: int) -> None:
        """What `quality` needs of `train`: the denoiser, and the classifier where its embedding is
        the feature space.
        """
        c, d = self.config, self.dir
        train.check_models(c, classes_of(d.data), True, d.codec)
        self._first_mix()
        own = [self._classifier(0, "real", 0)] if needs_classifier(c) else []
        self.engine.fit([*own, *self._denoiser()])

    def quality(self, number: int) -> None:
        sample_quality.evaluate(self.engine, self.config, self.dir)
        sample_quality.publish(self.config, self.dir)

    def mine(self, number: int) -> None:
        d, scorer, model = self.dir, self.config.mine.scorer, self._attacked(number)
        seeds = self.seeds if scorer == "bald" else range(1)
        models = [
            (model.parts[-3], s, model.parents[1] / f"seed-{s}" / "classifier") for s in seeds
        ]
        evaluate.score(
            self.engine, models, d.data / "mine", d.data, True, d.round(number, "scores")
        )
        earlier = [d.round(n, "scores") for n in range(1, number)] if scorer == "forgetting" else []
        mine.mine(
            d.round(number, "scores"), d.data, self.config.mine, d.round(number, "hard"), earlier
        )

    def generate(self, number: int) -> None:
        c, d = self.config, self.dir
        hard, requests, levels = d.round(number, "hard"), d.round(number, "requests"), None
        without = ratio.capped(c, d, number)
        if c.generate.adaptive:
            levels = d.round(number, "levels")
            judges = verifier.folders(d.judge, c.curate.folds)
            generate.levels(
                self.engine, hard, d.data, d.denoiser, judges, c.generate, self.id, levels, without
            )
        by = self._attacked(number), stages.trained_in(c, number)
        generate.plan(hard, levels, self.id, number, c.mix.arms, c.generate, requests, by, without)
        generate.generate(
            self.engine,
            requests,
            d.data,
            d.denoiser,
            self._attacked(number),
            c.generate,
            d.round(number, "synthetic"),
        )

    def curate(self, number: int) -> None:
        """What is measured on real images is measured once, with what was trained before the first
        round.
        """
        c, d = self.config, self.dir
        classifier, judges = (
            d.arm(0, "real", 0) / "classifier",
            verifier.folders(d.judge, c.curate.folds),
        )
        for role in ROLES:
            curate.features(self.engine, d.data, role, classifier, judges, d.features / role)
        curate.limits(d.data, d.features, c.curate, d.limits)
        requests, synthetic, inspected, twins = (
            d.round(number, x) for x in ("requests", "synthetic", "inspected", "twins")
        )
        curate.inspect(
            self.engine,
            requests,
            synthetic,
            d.data,
            d.features,
            d.limits,
            classifier,
            d.judge,
            c.curate,
            inspected,
        )
        if c.curate.twins:
            curate.twins(self.engine, synthetic, inspected, d.limits, twins)
        curate.settle(inspected, twins, d.limits, c.curate, d.round(number, "verdicts"))

    def evaluate(self, number: int) -> None:
        """Mix, retrain every synthetic arm in one launch, and score `mine` (optimistic: its images
        guided the generation).

        Before that the ratio is chosen, where that is asked for.
        """
        c, d = self.config, self.dir
        if number and c.mix.synthetic_ratio == AUTO:
            ratio.search(self.engine, c, d, number)
            ratio.choose(c, d, number)
        for arm in retrained(c) if number else []:
            section, most = ratio.settled(c, d, number)
            train.round_mix(c, d, number, arm, section, most, d.arm(number, arm) / "mix")
        self.engine.fit(
            [
                self._classifier(number, f.parts[-3], int(f.parts[-2][5:]))
                for f in trained(c, d, number)
            ]
        )
        parity_check.check(c, d, number)
        evaluate.evaluate(
            self.engine, d, models_of(c, d, number), "mine", c.evaluate, d.round(number, "evaluate")
        )

    def test(self, number: int) -> None:
        """Open `test`, once: every arm's classifiers of the last round."""
        c, d = self.config, self.dir
        models = models_of(c, d, last_round(c))
        results.check_groups(c.evaluate, classes_of(d.data))
        parity_check.check(c, d, last_round(c))
        now = test_access.asked(c, d)
        test_access.review(d, now, self.reopen)
        if c.evaluate.groups:  # thresholds are set here, before test is opened
            evaluate.score(
                self.engine,
                [(a, s, f) for a, s, _, f in models],
                d.data / "select",
                d.data,
                False,
                d.select,
            )
        evaluate.evaluate(
            self.engine, d, models, "test", c.evaluate, d.test, partial(test_access.enter, d, now)
        )

    def _attacked(self, number: int) -> Path:
        return stages.attacked_in(self.config, self.dir, number)

    def _denoiser(self) -> list[FitJob]:
        """Its training; none where it came from elsewhere."""
        c, d = self.config, self.dir
        if c.denoiser.external:
            latents.external_denoiser(c, d.data, classes_of(d.data), d.codec, d.denoiser)
            return []
        codec, side = (
            (d.codec, d.latents("train").parent) if has_codec(c) else None,
            latents.space(c, d.codec)[1],
        )
        return [
            train.denoiser_job(
                d.data, d.arm(0, "real") / "mix", c.denoiser, c.seed, side, d.denoiser, codec
            )
        ]

    def _classifier(self, number: int, arm: str, seed: int) -> FitJob:
        c, d = self.config, self.dir
        out = d.arm(number, arm, seed) / "classifier"
        return train.round_classifier(c, d, number, arm, seed, d.arm(number, arm) / "mix", out)

    def _first_mix(self) -> None:
        c, d = self.config, self.dir
        train.mix(d.data, [], [], "real", c.mix, c.generate.per_case, d.arm(0, "real") / "mix")
