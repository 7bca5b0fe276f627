"""What a run amounts to, where its work lies on the machines there are, what time it will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adversa.config import Config, verifier_of
from adversa.engine import resources
from adversa.engine.resources import Node
from adversa.estimate.measure import Measured
from adversa.pipeline.folders import last_round, models_of, swept, trained
from adversa.pipeline.stage import PlannedStage
from adversa.pipeline.stages import stages
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.types import GENERATED, ROLES

# A run's steps share the machine with decoding, scoring and Ray, which those that are timed do not:
# the demo's stages took 1.3 to 2.2 times their median steps on two cores (benchmarks/LOG.md,
# 2026-11-22).
BESIDE = 2.2


@dataclass(frozen=True)
class Work:
    """amount: units of a measure.Kind. by: workers, samplers, tasks, trials or one.

    bound: at most so much. shown: how a person counts it, where that is not by the amount.
    """

    kind: str
    amount: float
    by: str
    bound: bool = False
    shown: str = ""


@dataclass(frozen=True)
class Placement:
    """shares: by Work.by, how many of these each node has at a time; waiting: workers, samplers."""

    nodes: tuple[Node, ...]
    shares: dict[str, list[int]]
    waiting: tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """Of a stage. seconds: of wall time; done: it is finished, and costs nothing more."""

    stage: str
    done: bool
    seconds: float
    device_seconds: float
    work: list[Work]


def placement(nodes: Sequence[Node], config: Config) -> Placement:
    """Where the processes run, as the engine requests and Ray places them; fewer samplers than
    there is room for lie on the first nodes.
    """
    c, on_gpus = config.cluster, resources.on_gpus(nodes)
    cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    workers = resources.workers_on(
        nodes, resources.worker_asks(cpus, gpus, c.training_workers), c.training_workers
    )
    room, samplers = [resources.samplers_on(n.cpus, n.gpus, c, on_gpus) for n in nodes], list[int]()
    requested = c.samplers or sum(room)
    for n in room:
        samplers.append(min(n, requested - sum(samplers)))
    # Trials on one GPU, or that each fill all cores, take as long as one after the other.
    alone = not gpus and (c.training_workers > 1 or c.training_threads is None)
    trials = 1 if alone else max(1, min(resources.trials_at_once(c, nodes), int(gpus or cpus)))
    shares = {
        "workers": workers,
        "trials": [n * trials for n in workers],
        "samplers": samplers,
        "tasks": [resources.tasks(n.cpus, n.gpus, on_gpus) * (n.gpus >= on_gpus) for n in nodes],
        "reading": [int(n.cpus) for n in nodes],
        "one": [1] + [0] * (len(nodes) - 1),
    }
    waiting = c.training_workers - sum(workers), requested - sum(samplers)
    return Placement(tuple(nodes), shares, waiting)


# ---- how much -----------------------------------------------------------------------------------


def roles(config: Config, run: RunDir, look: bool = True) -> dict[str, int]:
    """Images of each role: of a prepared run as they are, else by data.split of the source's.

    look: at a source whose number is not known; else only as many as are mined are counted.
    """
    if step_folder.is_finished(run.data):
        split = (files.read_json(run.data / "split.json") or {})["images"]
        return {role: sum(split[role].values()) for role in ROLES}
    images = config.data.phantom.images
    if config.data.source != "phantom":
        if not look:
            return dict.fromkeys(ROLES, 0) | {"mine": config.mine.budget}
        from adversa.data import sources

        images = len(sources.list_records(config.data).records)
    return {role: round(images * getattr(config.data.split, role)) for role in ROLES}


def generated(config: Config, mined: int) -> int:
    """Images that a round generates at most. mined: images among which hard cases are found."""
    arms = sum(arm in GENERATED for arm in config.mix.arms)
    return arms * min(config.mine.budget, mined) * config.generate.per_case


def evaluations(config: Config, arm: str) -> float:
    """Rows of the denoiser for an image of an arm, those left empty at a part's end included."""
    from adversa.diffuse import strategy
    from adversa.pipeline.planning import request

    g, case = config.generate, {"example": "case", "label": 0}
    requested = request("plan", 1, arm, case, 0, g, partner="case")
    schedule = strategy.schedule(requested, strategy.start_of(requested, g), g)
    halves = 2 if requested.strategy == "inout" else 1
    return schedule.evaluations * halves + g.batch_size * len(schedule.table) / 2 / g.part_size


def trainings(
    kind: str, count: int, section: Any, looks: int, by: str = "workers", bound: bool = False
) -> list[Work]:
    """The work of `count` trainings, which score so many images at each evaluation, and of trials
    once more.
    """
    shown = "" if bound or not count else f"{count} x {kind}, {section.steps} steps"
    scored = count * looks * (section.evaluations + (by == "trials"))
    scorer = "verify" if kind == "verifier" else "score"
    return [Work(kind, count * section.steps, by, bound, shown), Work(scorer, scored, by, bound)]


def work_of(stage: PlannedStage, c: Config, run: RunDir, role: Mapping[str, int]) -> list[Work]:
    """Of one stage. role: images of each."""
    n, everyone, select, found = stage.round, sum(role.values()), role["select"], list[Work]()
    arms = [arm for arm in c.mix.arms if arm in GENERATED]
    images, folds, seeds = generated(c, role["mine"]), c.curate.folds, c.evaluate.seeds
    match stage.name:
        case "prepare":
            found = [Work("read", everyone, "reading", shown=f"{everyone} images")]
        case "codec":
            if c.codec.is_fitted:
                found = [Work("codec", c.codec.steps, "workers", shown=f"{c.codec.steps} steps")]
            latents = role["train"] * (c.codec.views if c.denoiser.flips else 1) + select
            if not c.denoiser.external:
                found.append(Work("encode", latents, "tasks", shown=f"{latents} latents"))
        case "train":
            found = trainings("classifier", len(trained(c, run, 0)), c.classifier, select)
            if c.mix.generates:
                found += trainings("verifier", folds, verifier_of(c), select)
            if c.mix.generates and not c.denoiser.external:
                shown = f"denoiser, {c.denoiser.steps} steps"
                found.append(Work("denoiser", c.denoiser.steps, "workers", shown=shown))
        case "mine":
            scored = role["mine"] * (seeds if c.mine.scorer == "bald" else 1)
            found = [Work("score", scored, "tasks", shown=f"{role['mine']} images")]
        case "generate":
            rows = images / len(arms) * sum(evaluations(c, arm) for arm in arms)
            found = [Work("generate", rows, "samplers", True, f"{images} images")]
            if c.generate.adaptive:
                tried = images // (len(arms) * c.generate.per_case) * len(c.generate.levels)
                rows = tried * evaluations(c, "guided")
                found.append(Work("generate", rows, "samplers", True))
                found.append(Work("verify", tried * folds, "samplers", True))
        case "curate":
            found = [Work("score", images, "tasks", True, f"{images} images")]
            found.append(Work("verify", images * folds, "tasks", True))
            found.append(Work("compare", images * (1 + c.curate.twins), "tasks", True))
            if n == 1:  # real images, once: without test for the thresholds, with it for a curve
                found.append(Work("score", everyone, "tasks"))
                found.append(Work("verify", (everyone - role["test"]) * folds, "tasks"))
                found.append(Work("compare", 2 * everyone - role["test"], "one"))
        case "evaluate":
            if n in swept(
                c, run
            ):  # ratio 0 always, of the others those that kept images tell apart
                more = seeds * (len(c.mix.ratios) - 1)
                found = trainings("classifier", seeds, c.classifier, select, "trials")
                found += trainings("classifier", more, c.classifier, select, "trials", True)
            if n:
                found += trainings("classifier", len(trained(c, run, n)), c.classifier, select)
            found.append(Work("score", role["mine"] * len(models_of(c, run, n)), "tasks"))
        case "test":
            scored = role["test"] + bool(c.evaluate.groups) * select
            found = [Work("score", scored * len(models_of(c, run, last_round(c))), "tasks")]
    return [work for work in found if work.amount]


# ---- how long -----------------------------------------------------------------------------------


def costs(
    c: Config, run: RunDir, role: Mapping[str, int], at: Placement, measured: Mapping[Any, Measured]
) -> list[Cost]:
    """The cost of every stage.

    measured: by kind of node. Pools go at the mean pace of their nodes, the workers of a training
    at that of the slowest; processes import before they work.
    """
    found, every = list[Cost](), list(measured.values())
    known, start = [measured.get(n.kind) for n in at.nodes], max(m.start for m in every)
    for stage in stages(c, run):
        works, done = work_of(stage, c, run, role), stage.is_finished
        wall = device = 0.0
        for work in [] if done else works:
            trains = work.by in ("workers", "trials")
            shares = [(n, m) for n, m in zip(at.shares[work.by], known, strict=True) if n and m]
            paces = [(n, m.seconds[work.kind]) for n, m in shares or [(1, m) for m in every]]
            if trains:
                pace = max(p for _, p in paces) * max(1, sum(at.shares["workers"]))
            else:
                pace = sum(n for n, _ in paces) / sum(n / p for n, p in paces)
            device += pace * work.amount
            wall += pace * work.amount / max(1, sum(at.shares[work.by]))
        wall += start if works and not done else 0.0
        found.append(Cost(stage.title, done, wall, device, works))
    return found
