"""What a run amounts to, where it lies on the machines there are, and what it will take: `adversa
plan`. No Ray, no torch.

How much there is to do is counted by the run's own rules (stages.py, painting.py); what mining
finds is known only as a bound.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adversa.config import Config, judge_of
from adversa.engine import resources
from adversa.engine.resources import Node
from adversa.estimate.measure import Measured, Timing
from adversa.pipeline.stages import Stage, last_round, models_of, stages, swept, trained
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.storage.path import Place
from adversa.types import PAINTED, ROLES

PNG_BYTES = (
    2.0  # of a pixel in a run's images: 1.75 painted phantoms, 1.85 real ones with their masks
)
# Of the estimate, beside what the steps of a measurement differ: work that is not timed, other work
# on the machine, a longer time.
DOUBT = 1.35
# Without a GPU, upwards: Ray's processes, the decoding of images and evaluations share the cores
# with the steps. The demo's stages took 1.3 to 2.2 times their measured steps, 1.9 in the middle
# (two cores; benchmarks/LOG.md, 2026-11-22).
CPU_DOUBT = 2.2
CONTEXT = 600 << 20  # bytes that a process takes of a GPU before its first tensor
KEYS = {
    "paint": "generate",
    "judge": "curate.judge",
}  # sections of the configuration, where they are named otherwise
# of a network's float32 weights in a training: itself, its gradient, two of AdamW, the average
COPIES = 5


@dataclass(frozen=True)
class Work:
    """So much of one kind (measure.SHARES; units: steps, images, evaluations), done by `lanes`:
    workers, samplers, tasks, trials or one.

    bound: at most so much. shown: how a person counts it, where that is not by the amount.
    """

    kind: str
    amount: float
    lanes: str
    bound: bool = False
    shown: str = ""


@dataclass(frozen=True)
class Placement:
    """Numbers for each node: training workers, samplers; and tasks at a time with and without a
    model, in all.

    waiting: training workers and samplers that were asked for and find no room yet. trials:
    trainings of a search at a time, each as fast as one of `workers`.
    """

    nodes: tuple[Node, ...]
    workers: tuple[int, ...]
    samplers: tuple[int, ...]
    tasks: int
    model_tasks: int
    waiting: tuple[int, int]
    trials: int = 1


@dataclass(frozen=True)
class Range:
    low: float
    mid: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.mid + other.mid, self.high + other.high)


@dataclass(frozen=True)
class Cost:
    """Of a stage: wall seconds and device-seconds; done: it is finished, and costs nothing more."""

    stage: Stage
    work: tuple[Work, ...]
    seconds: Range
    device_seconds: Range
    done: bool


# ---- where ---------------------------------------------------------------------------------------


def placement(nodes: Sequence[Node], config: Config) -> Placement:
    """As the engine asks and Ray places. Of fewer samplers than there is room for, the first
    machines are shown to hold them.
    """
    c, gpus = config.cluster, resources.on_gpus(nodes)
    cpus_in_all, gpus_in_all = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    asks = resources.worker_asks(cpus_in_all, gpus_in_all, c.training_workers)
    workers = resources.workers_on(nodes, asks, c.training_workers)
    room = [resources.samplers_on(n.cpus, n.gpus, c, gpus) for n in nodes]
    left, samplers = c.samplers or sum(room), []
    for n in room:
        samplers.append(min(n, left))
        left -= samplers[-1]
    tasks, model = (max(1, resources.tasks(cpus_in_all, gpus_in_all, m)) for m in (False, True))
    waiting = c.training_workers - sum(workers), left
    trials = _trials(config, nodes)
    return Placement(tuple(nodes), tuple(workers), tuple(samplers), tasks, model, waiting, trials)


def _trials(config: Config, nodes: Sequence[Node]) -> int:
    """Two trials on one GPU take about as long as one after the other; so do trials of one thread
    each, beside each other, and one training after the other on all CPUs, which is what is measured
    unless cluster.training_threads says otherwise.
    """
    c, gpus = config.cluster, sum(n.gpus for n in nodes)
    if not gpus and c.training_workers == 1 and c.training_threads is None:
        return 1
    return max(
        1, min(resources.trials_at_once(c, nodes), int(gpus) or int(sum(n.cpus for n in nodes)))
    )


# ---- how much ------------------------------------------------------------------------------------


def images_of(config: Config, run: RunDir | None = None) -> int | None:
    """Of the source, as far as that is known without looking: of phantoms, or of a run that is
    prepared.
    """
    split = (
        files.read_json(run.data / "split.json")
        if run is not None and step_folder.is_finished(run.data)
        else None
    )
    if split is not None:
        return sum(sum(by_class.values()) for by_class in split["images"].values())
    return config.data.phantom.images if config.data.source == "phantom" else None


def roles(config: Config, images: int, run: RunDir | None = None) -> dict[str, int]:
    """Images of each role: as they are once a run is prepared, before that by the shares of
    data.split.
    """
    split = (
        files.read_json(run.data / "split.json")
        if run is not None and step_folder.is_finished(run.data)
        else None
    )
    if split is not None:
        return {r: sum(split["images"][r].values()) for r in ROLES}
    return {r: round(images * getattr(config.data.split, r)) for r in ROLES}


def painted(config: Config, mined: int) -> int:
    """Images that a round paints, at most: no more hard cases are taken than the budget, or than
    there are images to mine.
    """
    arms = sum(arm in PAINTED for arm in config.mix.arms)
    return arms * min(config.mine.budget, mined) * config.generate.per_case


def evaluations(config: Config, arm: str) -> float:
    """Rows of the denoiser that an image of an arm takes, the rows that stay empty at a part's end
    among them.
    """
    from adversa.diffuse import strategy
    from adversa.pipeline.generate import request

    g = config.generate
    asked = request("plan", 1, arm, {"example": "case", "label": 0}, 0, g, partner="case")
    course = strategy.course(asked, strategy.start_of(asked, g), g)
    rows = course.evaluations * (2 if asked.strategy == "inout" else 1)
    return rows + g.batch_size * len(course.plan) / 2 / g.part_size


def work_of(stage: Stage, config: Config, run: RunDir, role: Mapping[str, int]) -> list[Work]:
    """Of one stage. role: images of each."""
    c, n = config, stage.round
    models = {"evaluate": n, "test": last_round(c)}
    scored = {
        "mine": role["mine"] * (c.evaluate.seeds if c.mine.scorer == "bald" else 1),
        "evaluate": role["mine"] * len(models_of(c, run, models.get(stage.command, 0))),
        "test": (role["test"] + bool(c.evaluate.groups) * role["select"])
        * len(models_of(c, run, models.get(stage.command, 0))),
    }.get(stage.command)
    found = {
        "prepare": lambda: [
            Work("read", sum(role.values()), "tasks", shown=f"{sum(role.values())} images")
        ],
        "codec": lambda: _codec(c, role),
        "train": lambda: _train(c, run, role),
        "generate": lambda: _generate(c, role),
        "curate": lambda: _curate(c, role, n),
        "evaluate": lambda: [
            *_ratios(c, run, n, role),
            *(_classifiers(c, len(trained(c, run, n)), role) if n else []),
        ],
    }.get(stage.command, list)()
    return [*found, Work("score", scored, "tasks")] if scored else found


def _classifiers(config: Config, count: int, role: Mapping[str, int]) -> list[Work]:
    c = config.classifier
    if not count:
        return []
    shown = f"{count} classifier{'s' if count > 1 else ''} x {c.steps} steps"
    looks = count * c.evaluations * role["select"]  # `select` is scored by the workers themselves
    return [
        Work("classifier", count * c.steps, "workers", shown=shown),
        Work("score", looks, "workers"),
    ]


def _ratios(config: Config, run: RunDir, number: int, role: Mapping[str, int]) -> list[Work]:
    """The trials of a round whose ratio is chosen: that of ratio 0 is always done, of the others
    those that the accepted images tell apart. Each looks at select as a training does, and once
    more when it is scored.
    """
    if number not in swept(config, run):
        return []
    c, seeds, found = config.classifier, config.evaluate.seeds, []
    for ratios, bound in ((1, False), (len(config.mix.ratios) - 1, True)):
        count = ratios * seeds
        shown = (
            ""
            if bound
            else f"{len(config.mix.ratios)} ratios x {seeds} seed{'s' * (seeds > 1)} x "
            f"{c.steps} steps"
        )
        found.append(Work("classifier", count * c.steps, "trials", bound, shown))
        found.append(Work("score", count * (c.evaluations + 1) * role["select"], "trials", bound))
    return found


def _train(config: Config, run: RunDir, role: Mapping[str, int]) -> list[Work]:
    found = _classifiers(config, len(trained(config, run, 0)), role)
    if not config.mix.paints:
        return found
    judge, folds, d = judge_of(config), config.curate.folds, config.denoiser
    found.append(
        Work("judge", folds * judge.steps, "workers", shown=f"{folds} judges x {judge.steps} steps")
    )
    found.append(Work("judge score", folds * judge.evaluations * role["select"], "workers"))
    return (
        found
        if d.external
        else [*found, Work("denoiser", d.steps, "workers", shown=f"denoiser x {d.steps} steps")]
    )


def _codec(config: Config, role: Mapping[str, int]) -> list[Work]:
    c = config.codec
    found = (
        [Work("codec", c.steps, "workers", shown=f"codec x {c.steps} steps")] if c.is_fitted else []
    )
    if config.denoiser.external:
        return found
    views = c.views if config.denoiser.flips else 1
    images = role["train"] * views + role["select"]
    return [*found, Work("encode", images, "tasks", shown=f"{images} latents")]


def _generate(config: Config, role: Mapping[str, int]) -> list[Work]:
    g, count, found = config.generate, painted(config, role["mine"]), []
    arms = [a for a in config.mix.arms if a in PAINTED]
    if g.adaptive:  # tried on every hard case, and judged
        tried = count // (len(arms) * g.per_case) * len(g.levels)
        found.append(Work("paint", tried * evaluations(config, "guided"), "samplers", True))
        found.append(Work("judge score", tried * config.curate.folds, "samplers", True))
    rows = sum(count / len(arms) * evaluations(config, arm) for arm in arms)
    return [*found, Work("paint", rows, "samplers", True, shown=f"{count} images")]


def _curate(config: Config, role: Mapping[str, int], number: int) -> list[Work]:
    count, everyone, folds = painted(config, role["mine"]), sum(role.values()), config.curate.folds
    found = []
    if (
        number == 1
        # what is measured on real images is measured once: without test for the limits, with it for
        # their curve
    ):
        found.append(Work("score", everyone, "tasks"))
        found.append(Work("judge score", (everyone - role["test"]) * folds, "tasks"))
        found.append(Work("index", 2 * everyone - role["test"], "one"))
    found += [
        Work("score", count, "tasks", True),
        Work("judge score", count * folds, "tasks", True),
    ]
    again = 1 + config.curate.twins
    return [*found, Work("compare", count * again, "tasks", True, shown=f"{count} images")]


# ---- how long ------------------------------------------------------------------------------------

STARTS = {
    "prepare": 1,
    "codec": 1,
    "train": 1,
    "mine": 1,
    "generate": 1,
    "curate": 2,
    "evaluate": 2,
}  # new processes; test finds warm ones


def costs(
    config: Config,
    run: RunDir,
    role: Mapping[str, int],
    at: Placement,
    measured: Mapping[object, Measured],
) -> list[Cost]:
    """Of every stage. measured: by kind of node."""
    found = []
    start, above = max(m.start for m in measured.values()), doubt(measured)
    for stage in stages(config, run):
        works, done = tuple(work_of(stage, config, run, role)), stage.is_finished
        wall = device = Range(0, 0, 0)
        for work in () if done else works:
            seconds, lanes = _of(work, at, measured)
            device += seconds
            wall += Range(*(s / lanes for s in (seconds.low, seconds.mid, seconds.high)))
        if not done and works:  # new processes import before they work
            searches = any(w.lanes == "trials" for w in works)
            wall += Range(*((STARTS.get(stage.command, 0) + searches) * start,) * 3)
        wall, device = (Range(r.low / DOUBT, r.mid, r.high * above) for r in (wall, device))
        found.append(Cost(stage, works, wall, device, done))
    return found


def _of(work: Work, at: Placement, measured: Mapping[object, Measured]) -> tuple[Range, float]:
    """(device-seconds of some work, by how many lanes it is shared). The workers of a training wait
    for the slowest.
    """
    lanes = {"workers": at.workers, "trials": at.workers, "samplers": at.samplers}
    used = lanes.get(work.lanes) or tuple(int(n.cpus) for n in at.nodes)
    weights = [
        (count, measured[n.kind].timings[work.kind])
        for n, count in zip(at.nodes, used, strict=True)
        if count and n.kind in measured
    ]
    weights = weights or [(1, m.timings[work.kind]) for m in measured.values()]
    if work.lanes in ("workers", "trials", "one"):
        count = 1 if work.lanes == "one" else max(1, sum(at.workers))
        slowest = max((t for _, t in weights), key=lambda t: t.seconds)
        return _times(work, slowest, count), count * (at.trials if work.lanes == "trials" else 1)
    count = {
        "samplers": sum(at.samplers),
        "tasks": at.tasks if work.kind == "read" else at.model_tasks,
    }[work.lanes]
    together = sum(n for n, _ in weights)
    mean = Timing(
        *(
            together / sum(n / getattr(t, k) for n, t in weights)
            for k in ("seconds", "fast", "slow")
        ),
        0,
    )
    return _times(work, mean), max(1, count)


def _times(work: Work, timing: Timing, count: int = 1) -> Range:
    """A training's step takes `count` devices its time. Of what is only bounded there may be
    none.
    """
    amount = work.amount * count
    return Range(
        0 if work.bound else amount * timing.fast, amount * timing.seconds, amount * timing.slow
    )


def doubt(measured: Mapping[object, Measured]) -> float:
    """By what the slowest measured steps are multiplied for the upper end of an estimate."""
    return CPU_DOUBT if any(m.device == "cpu" for m in measured.values()) else DOUBT


def total(found: Sequence[Cost]) -> tuple[Range, Range]:
    """(wall seconds, device-seconds)."""
    wall = device = Range(0, 0, 0)
    for cost in found:
        wall, device = wall + cost.seconds, device + cost.device_seconds
    return wall, device


# ---- what cannot fit -----------------------------------------------------------------------------


def disk_bytes(config: Config, images: int | None) -> int:
    """What a run's images take, about; of real ones, where their number is known, twice while they
    are prepared.
    """
    mined = config.mine.budget if images is None else round(images * config.data.split.mine)
    drawn = painted(config, mined) * config.rounds if config.mix.paints else 0
    return int((2 * (images or 0) + drawn) * config.data.resolution**2 * PNG_BYTES)


def disk_fault(config: Config, root: Place, images: int | None) -> str | None:
    """Too little room for the run's images. What the folder holds already is part of it. Of an
    object store nothing is known.
    """
    if not isinstance(root, Path):
        return None
    place = next(p for p in (root.absolute(), *root.absolute().parents) if p.is_dir())
    needed, free = disk_bytes(config, images), shutil.disk_usage(place).free
    if needed > free and root.is_dir():
        needed -= sum(
            os.path.getsize(Path(at) / f) for at, _, files in os.walk(root) for f in files
        )
    if needed <= free:
        return None
    return (
        f"--run-dir {root}: the disk has {size(free)} free, the run's images take about "
        f"{size(needed)}; free some, or take another"
    )


def memory_faults(
    needs: Mapping[str, int], config: Config, nodes: Sequence[Node], least: bool = False
) -> list[str]:
    """needs: bytes that a training of each network, and a sampler ("paint"), takes of a GPU. least:
    by its weights alone.
    """
    known = [n.gpu_memory for n in nodes if n.gpus >= 1 and n.gpu_memory]
    beside, found = max(1, int(1 / config.cluster.gpus_per_sampler + 1e-6)), []
    for name, takes in needs.items() if known else ():
        many = beside if name == "paint" else 1
        if many * takes <= min(known):
            continue
        whom = (
            f"{many} sampler{'s' if many > 1 else ''} a GPU"
            if name == "paint"
            else f"a training of the {name}"
        )
        ways = [] if least else [f"lower {KEYS.get(name, name)}.batch_size"]
        ways += ["raise cluster.gpus_per_sampler"] if many > 1 else []
        way = " or ".join(ways) or f"take a smaller network ({KEYS.get(name, name)})"
        says = "at least" if least else "about"
        found.append(
            f"{whom}: {says} {size(many * takes)} of memory, a GPU has {size(min(known))}; "
            f"{way}, or a larger GPU"
        )
    return found


def least_memory(config: Config, classes: int = 7) -> dict[str, int]:
    """Bytes of a GPU that each training takes at least, by its weights alone: the networks are
    built without memory.
    """
    import torch

    from adversa.classify import model
    from adversa.diffuse import edm

    def weights(network: torch.nn.Module) -> int:
        return 4 * sum(p.numel() for p in network.parameters())

    with torch.device("meta"):
        resolution, found = config.data.resolution, {}
        networks = {"classifier": config.classifier} | (
            {"judge": judge_of(config)} if config.mix.paints else {}
        )
        for name, section in networks.items():
            found[name] = COPIES * weights(
                model.build(section.model_copy(update={"weights": None}), classes, resolution)
            )
        latent = config.codec.kind != "pixels"
        if (
            config.mix.paints
            and not config.denoiser.external
            and not (latent and not config.codec.is_fitted)
        ):
            channels, side = (
                (config.codec.latent_channels, resolution >> config.codec.halvings)
                if latent
                else (3, resolution)
            )
            denoiser = weights(edm.build(config.denoiser, classes, side, channels))
            found |= {"denoiser": COPIES * denoiser, "paint": denoiser}
    return {name: takes + CONTEXT for name, takes in found.items()}


def check(config: Config, run: RunDir, nodes: Sequence[Node]) -> None:
    """What a run is refused for before it begins, beside what its engine refuses (sizes.faults).
    UserError. Nothing is measured.

    nodes: this machine where it has GPUs whose memory is known, and the run works on it; else none.
    """
    fault = disk_fault(config, run.root, images_of(config, run))
    memory = (
        memory_faults(least_memory(config), config, nodes, least=True)
        if any(n.gpu_memory for n in nodes)
        else []
    )
    resources.refuse([*([fault] if fault else []), *memory])


def size(number: float) -> str:
    """Bytes for a person."""
    power = min(4, int(math.log2(max(1, number)) // 10))
    return (
        f"{number / 1024**power:.{0 if power < 3 else 1}f} "
        f"{('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
    )
