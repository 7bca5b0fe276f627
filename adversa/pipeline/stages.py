"""The stages of a run: one table, and what each row does. Nobody else lists stages.

A new stage is a row here and functions in a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from adversa.config import Config
from adversa.engine.interface import FitJob
from adversa.pipeline import (
    curate,
    evaluate,
    finalize,
    generate,
    latents,
    mine,
    parity_check,
    planning,
    prepare,
    ratio,
    results,
    sample_quality,
    summary,
    test_access,
    train,
    verifier,
)
from adversa.pipeline.folders import (
    attacked_in,
    has_codec,
    last_round,
    models_of,
    needs_classifier,
    quality_folders,
    ratio_folders,
    retrained,
    swept,
    trained,
    trained_in,
)
from adversa.pipeline.stage import EVERYTHING, Output, PlannedStage, Stage, StageContext
from adversa.run.folder import RunDir, classes_of
from adversa.storage.path import StoragePath
from adversa.types import ROLES

# What a training of the arms is made of, and its training set.
CLASSIFIER = ("classifier", "seed")
MIX = ("mix", "generate.per_case")

# ---- before the first round ----------------------------------------------------------------------


def _prepare(at: StageContext) -> None:
    prepare.prepare(at.engine, at.config.data, at.dir.data)


def _prepared(config: Config, run: RunDir, number: int) -> tuple[Output, ...]:
    return (Output(run.data, ("data",)),)


def _codec(at: StageContext) -> None:
    """Where latents are diffused: the autoencoder, fitted on the arm `real` or given; the latents
    of `train` and `select`.

    What may refuse a setting comes first: it can be fixed in place as long as no step that reads
    it has begun.
    """
    c, d = at.config, at.dir
    mix, classes = d.arm(0, "real") / "mix", classes_of(d.data)
    if not c.codec.is_fitted:
        latents.fetch(d.data, c.codec, c.data.resolution, d.codec, at.engine.handle)
    train.check_models(c, classes, True, d.codec)
    _first_mix(at)
    if c.codec.is_fitted:
        job = latents.codec_job(
            d.data, mix, c.codec, c.denoiser.balance, c.seed, c.data.resolution, d.codec
        )
        at.engine.fit([job])
    if c.denoiser.external is None:
        views = c.codec.views if c.denoiser.flips else 1
        first = d.latents("train")
        latents.encode(at.engine, d.data / "train", d.data, d.codec, views, first)
        latents.encode(at.engine, d.data / "select", d.data, d.codec, 1, d.latents("select"), first)


def _coded(config: Config, run: RunDir, number: int) -> tuple[Output, ...]:
    found = (_mixed(run), Output(run.codec, ("codec", "denoiser.balance", "seed")))
    if config.denoiser.external:
        return found
    views = Output(run.latents("train"), ("denoiser.flips",))
    return (*found, views, Output(run.latents("select"), ()))


def _train(at: StageContext) -> None:
    """The classifiers of the arm `real`, the verifiers, then the denoiser, in one launch."""
    c, d = at.config, at.dir
    results.check_groups(c.evaluate, classes_of(d.data))
    train.check_models(c, classes_of(d.data), c.mix.generates, d.codec)
    _first_mix(at)
    jobs = [_classifier(at, "real", seed) for seed in range(c.evaluate.seeds)]
    if c.mix.generates:
        jobs += [*verifier.jobs(d.data, c, d.judge, at.engine.handle), *_denoiser_jobs(at)]
    at.engine.fit(jobs)


def _first_trained(config: Config, run: RunDir, number: int) -> tuple[Output, ...]:
    found = (_mixed(run), *(Output(f, CLASSIFIER) for f in trained(config, run, 0)))
    if not config.mix.generates:
        return found
    folds = range(config.curate.folds)
    mixes = (Output(verifier.mix_of(run.judge, k), ("curate.folds",)) for k in folds)
    own = ("curate.folds", "curate.judge", *CLASSIFIER)
    verifiers = (Output(f, own) for f in verifier.folders(run.judge, config.curate.folds))
    return (*found, *mixes, *verifiers, _denoiser(config, run))


def _train_denoiser(at: StageContext) -> None:
    """What `quality` needs of `train`: the denoiser, and the classifier where its embedding is the
    feature space.
    """
    c, d = at.config, at.dir
    train.check_models(c, classes_of(d.data), True, d.codec)
    _first_mix(at)
    own = [_classifier(at, "real", 0)] if needs_classifier(c) else []
    at.engine.fit([*own, *_denoiser_jobs(at)])


def _denoised(config: Config, run: RunDir, number: int) -> tuple[Output, ...]:
    own = (Output(run.arm(0, "real", 0) / "classifier", CLASSIFIER),)
    return (_mixed(run), *(own if needs_classifier(config) else ()), _denoiser(config, run))


def _quality(at: StageContext) -> None:
    sample_quality.evaluate(at.engine, at.config, at.dir)
    sample_quality.publish(at.config, at.dir)


def _judged(config: Config, run: RunDir, number: int) -> tuple[Output, ...]:
    at = quality_folders(config, run)
    return tuple(Output(f) for f in (at.requests, at.samples, at.features, at.result))


def _mixed(run: RunDir) -> Output:
    return Output(run.arm(0, "real") / "mix", MIX)


def _first_mix(at: StageContext) -> None:
    c, d, out = at.config, at.dir, at.dir.arm(0, "real") / "mix"
    train.mix(d.data, [], [], "real", c.mix, c.generate.per_case, out, handle=at.engine.handle)


def _denoiser(config: Config, run: RunDir) -> Output:
    checked = ("generate.guidance",) if config.denoiser.external else ()
    return Output(run.denoiser, ("denoiser", "codec", "seed", *checked))


def _denoiser_jobs(at: StageContext) -> list[FitJob]:
    """Its training; none where it came from elsewhere."""
    c, d = at.config, at.dir
    if c.denoiser.external:
        classes = classes_of(d.data)
        latents.external_denoiser(c, d.data, classes, d.codec, d.denoiser, at.engine.handle)
        return []
    codec = (d.codec, d.latents("train").parent) if has_codec(c) else None
    side, mix = latents.space(c, d.codec)[1], d.arm(0, "real") / "mix"
    return [train.denoiser_job(d.data, mix, c.denoiser, c.seed, side, d.denoiser, codec)]


def _classifier(at: StageContext, arm: str, seed: int) -> FitJob:
    folder = at.dir.arm(at.round, arm)
    out = at.dir.arm(at.round, arm, seed) / "classifier"
    return train.round_classifier(at.config, at.dir, at.round, arm, seed, folder / "mix", out)


# ---- in a round ----------------------------------------------------------------------------------


def _mine(at: StageContext) -> None:
    d, n, scorer = at.dir, at.round, at.config.mine.scorer
    target = attacked_in(at.config, d, n)
    seeds = range(at.config.evaluate.seeds if scorer == "bald" else 1)
    models = [(target.parts[-3], s, target.parents[1] / f"seed-{s}" / "classifier") for s in seeds]
    evaluate.score(at.engine, models, d.data / "mine", d.data, True, d.round(n, "scores"))
    earlier = [d.round(k, "scores") for k in range(1, n)] if scorer == "forgetting" else []
    scores, hard = d.round(n, "scores"), d.round(n, "hard")
    mine.mine(scores, d.data, at.config.mine, hard, earlier, at.engine.handle)


def _mined(config: Config, run: RunDir, number: int) -> tuple[Output, ...]:
    scores = Output(run.round(number, "scores"), ("mine.scorer", "evaluate.seeds"))
    return scores, Output(run.round(number, "hard"), ("mine",))


def _generate(at: StageContext) -> None:
    c, d, n = at.config, at.dir, at.round
    hard, requests, levels = d.round(n, "hard"), d.round(n, "requests"), None
    without, target = sorted(at.added.caps), attacked_in(c, d, n)
    if c.generate.adaptive:
        levels = d.round(n, "levels")
        verifiers = verifier.folders(d.judge, c.curate.folds)
        generate.levels(
            at.engine, hard, d.data, d.denoiser, verifiers, c.generate, at.run_id, levels, without
        )
    by = target, trained_in(c, n)
    asked = at.run_id, n, c.mix.arms, c.generate
    planning.plan(hard, levels, *asked, requests, by, without, at.engine.handle)
    generate.generate(
        at.engine, requests, d.data, d.denoiser, target, c.generate, d.round(n, "synthetic")
    )


def _generated(config: Config, run: RunDir, number: int) -> tuple[Output, ...]:
    """Ids of requests hang on the id of the run, and that on everything."""
    names = ("levels",) * config.generate.adaptive + ("requests", "synthetic")
    return tuple(Output(run.round(number, name)) for name in names)


def _curate(at: StageContext) -> None:
    """What is measured on real images is measured once, with what was trained before the first
    round.
    """
    c, d, n = at.config, at.dir, at.round
    classifier = d.arm(0, "real", 0) / "classifier"
    verifiers = verifier.folders(d.judge, c.curate.folds)
    for role in ROLES:
        curate.features(at.engine, d.data, role, classifier, verifiers, d.features / role)
    curate.measure_thresholds(d.data, d.features, c.curate, d.limits, at.engine.handle)
    requests, synthetic, inspected, twins = (
        d.round(n, x) for x in ("requests", "synthetic", "inspected", "twins")
    )
    measured = d.features, d.limits, classifier, d.judge
    curate.inspect(at.engine, requests, synthetic, d.data, *measured, c.curate, inspected)
    if c.curate.twins:
        finalize.near_duplicates(at.engine, synthetic, inspected, d.limits, twins)
    verdicts = d.round(n, "verdicts")
    finalize.finalize(inspected, twins, d.limits, c.curate, verdicts, at.engine.handle)


def _curated(config: Config, run: RunDir, number: int) -> tuple[Output, ...]:
    names = ("inspected", *(("twins",) if config.curate.twins else ()), "verdicts")
    measured = (*(run.features / role for role in ROLES), run.limits)
    return tuple(Output(f) for f in (*measured, *(run.round(number, name) for name in names)))


def _evaluate(at: StageContext) -> None:
    """Mix, retrain every synthetic arm in one launch, and score `mine` (optimistic: its images
    guided the generation).

    Before that the ratio is chosen, where that is asked for.
    """
    c, d, n, added = at.config, at.dir, at.round, at.added
    if n and added.ratio is None:
        ratio.search(at.engine, c, d, n)
        added = ratio.choose(c, d, n, at.engine.handle)
    for arm in retrained(c) if n else []:
        out = d.arm(n, arm) / "mix"
        train.round_mix(c, d, n, arm, added, out, at.engine.handle)
    at.engine.fit([_classifier(at, f.parts[-3], int(f.parts[-2][5:])) for f in trained(c, d, n)])
    parity_check.check(c, d, n)
    evaluate.evaluate(at.engine, d, models_of(c, d, n), "mine", c.evaluate, d.round(n, "evaluate"))


def _evaluated(config: Config, run: RunDir, number: int) -> tuple[Output, ...]:
    scored = Output(run.round(number, "evaluate"), ("evaluate.bootstrap", "evaluate.seeds"))
    if not number:
        return (scored,)
    own = (*MIX, *CLASSIFIER, "evaluate.bootstrap", "evaluate.seeds")
    chosen = ratio_folders(run, number) if number in swept(config, run, [number]) else ()
    mixes = (Output(run.arm(number, arm) / "mix", MIX) for arm in retrained(config))
    models = (Output(f, CLASSIFIER) for f in trained(config, run, number))
    return (*(Output(f, own) for f in chosen), *mixes, *models, scored)


# ---- after the last ------------------------------------------------------------------------------


def _test(at: StageContext) -> None:
    """Open `test`, once: every arm's classifiers of the last round."""
    c, d = at.config, at.dir
    models = models_of(c, d, last_round(c))
    results.check_groups(c.evaluate, classes_of(d.data))
    parity_check.check(c, d, last_round(c))
    now = test_access.asked(c, d)
    test_access.review(d, now, at.reopen)
    if c.evaluate.groups:  # thresholds are set here, before test is opened
        scored = [(arm, seed, folder) for arm, seed, _, folder in models]
        evaluate.score(at.engine, scored, d.data / "select", d.data, False, d.select)
    opening = partial(test_access.enter, d, now)
    evaluate.evaluate(at.engine, d, models, "test", c.evaluate, d.test, opening)


def _tested(config: Config, run: RunDir, number: int) -> tuple[Output, ...]:
    """What is read once must be of one run, to its last setting."""
    folders = (run.select, run.test) if config.evaluate.groups else (run.test,)
    return tuple(Output(f, EVERYTHING) for f in folders)


def _report(at: StageContext) -> None:
    summary.write(at.config, at.dir, step_folders(stages(at.config, at.dir)))
    at.page(at.dir.root)


def _reported(config: Config, run: RunDir, number: int) -> tuple[Output, ...]:
    return tuple(Output(run.root / name, kind="file") for name in ("summary.json", "report.html"))


# ---- the table -----------------------------------------------------------------------------------


def _once(config: Config) -> range:
    return range(1)


def _with_codec(config: Config) -> range:
    return range(int(has_codec(config)))


def _rounds(config: Config) -> range:
    return range(1, last_round(config) + 1)


def _generating(config: Config) -> range:
    return _rounds(config) if config.mix.generates else range(0)


def _evaluating(config: Config) -> range:
    return _rounds(config) if config.mix.mines else range(1)


STAGES = (
    Stage("prepare", _prepare, _prepared, _once, phase=0, quality="too"),
    Stage("codec", _codec, _coded, _with_codec, phase=0, quality="too"),
    Stage("train", _train, _first_trained, _once, phase=0),
    Stage("mine", _mine, _mined, _rounds),
    Stage("generate", _generate, _generated, _generating),
    Stage("curate", _curate, _curated, _generating),
    Stage("evaluate", _evaluate, _evaluated, _evaluating),
    Stage("test", _test, _tested, _once, phase=2),
    Stage("report", _report, _reported, _once, phase=2),
    Stage("denoiser", _train_denoiser, _denoised, _once, phase=0, quality="only"),
    Stage("quality", _quality, _judged, _once, phase=0, quality="only"),
)


def named(name: str) -> Stage:
    return next(s for s in STAGES if s.name == name)


def of_loop() -> tuple[Stage, ...]:
    """Those of the whole run, in the order of a round."""
    return tuple(s for s in STAGES if s.quality != "only")


def stages(config: Config, run: RunDir) -> list[PlannedStage]:
    """The stages of a run, in order."""
    return _planned(of_loop(), config, run)


def step_folders(planned: Sequence[PlannedStage]) -> list[StoragePath]:
    """Those of all steps, each once."""
    return list(dict.fromkeys(f for s in planned for f in s.folders))


def plan(config: Config, run: RunDir, command: str | None) -> list[PlannedStage]:
    """The stages that a command may work on, in order: `quality` has its own end, all others have
    those of the whole run.
    """
    if command != "quality":
        return stages(config, run)
    return _planned([s for s in STAGES if s.quality], config, run)


def _planned(rows: Sequence[Stage], config: Config, run: RunDir) -> list[PlannedStage]:
    turns = sorted((s.phase, n, i) for i, s in enumerate(rows) for n in s.rounds(config))
    return [PlannedStage(rows[i].name, n, rows[i].outputs(config, run, n)) for _, n, i in turns]


def reads(planned: Sequence[PlannedStage], run: RunDir) -> dict[str, tuple[str, ...]]:
    """The keys of the configuration that each step reads, by the name of its folder in the run."""
    outputs = [o for s in planned for o in s.outputs if o.kind == "step"]
    return {run.name_of(o.path): o.reads for o in outputs}
