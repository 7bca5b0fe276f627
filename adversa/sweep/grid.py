"""The grid of a sweep as names: cells (how many real images), points (arm, ratio, seed), and where
each lies. No torch, no ray.

A cell is a small run of its own below `cells/`: its images, the classifier that finds its hard
cases, its denoiser. Images are generated once for a cell and an arm, below `pools/`, as many as the
largest ratio wants; every ratio and seed takes its share of them by id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adversa.config import Config, Curate, Sweep
from adversa.config import check as check_config
from adversa.pipeline.stage import Output, PlannedStage
from adversa.run.folder import RunDir
from adversa.storage.path import StoragePath
from adversa.types import GENERATED, UserError

# Lesions that the rarest class of a cell must have for verifiers, trained on half of them, and
# manifolds to have a say in the filter.
VERIFIABLE = 10
ALL = "all"
SEARCHED = "search.json"  # of a search in place of the grid
RESULTS = ("sweep.parquet", "sweep.json", "sweep.html")


@dataclass(frozen=True)
class DataRegime:
    """count: real images of `train` a class, None for all there are."""

    count: int | None

    @property
    def name(self) -> str:
        return ALL if self.count is None else f"{self.count:04d}"


@dataclass(frozen=True)
class Variant:
    """An arm of the sweep. strategy: of the guided arm; sees: what the denoiser was trained on; ""
    where nothing is generated.
    """

    arm: str
    strategy: str = ""
    sees: str = ""

    @property
    def generates(self) -> bool:
        return self.arm in GENERATED

    @property
    def name(self) -> str:
        return "-".join(
            filter(None, (self.arm, self.strategy, self.sees if self.sees == ALL else ""))
        )


@dataclass(frozen=True)
class Point:
    """A trial of the grid."""

    cell: DataRegime
    variant: Variant
    ratio: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.cell.name}/{self.variant.name}/r{name_of(self.ratio)}/s{self.seed}"


def name_of(ratio: float) -> str:
    """0, 0.5, 1: shortest, and another for every ratio."""
    return repr(float(ratio)).removesuffix(".0")


# ---- what is asked -------------------------------------------------------------------------------


def cells(sweep: Sweep) -> list[DataRegime]:
    """Those with trials, the largest first: theirs are the longest trainings."""
    counts = sorted((n for n in sweep.real if n != ALL), reverse=True)
    return [
        *([DataRegime(None)] if ALL in sweep.real else []),
        *(DataRegime(int(n)) for n in counts),
    ]


def sources(sweep: Sweep) -> list[DataRegime]:
    """The cells that something is trained in: those of `cells`, and all of train where a denoiser
    is to see that.
    """
    found = cells(sweep)
    return (
        found if DataRegime(None) in found or not _wants_all(sweep) else [DataRegime(None), *found]
    )


def _wants_all(sweep: Sweep) -> bool:
    return ALL in sweep.denoiser_sees and generates(sweep)


def generates(sweep: Sweep) -> bool:
    """Whether any arm has generated images."""
    return any(arm in GENERATED for arm in sweep.arms)


def variants(config: Config, cell: DataRegime) -> list[Variant]:
    """The arms with something added. A denoiser that sees all of train is the cell's own where the
    cell is all of train.
    """
    s, found = config.sweep, []
    sees = ["subset"] if cell.count is None else list(s.denoiser_sees)
    for arm in s.arms:
        if arm not in GENERATED:
            found.append(Variant(arm))
            continue
        strategies = (s.strategies or [config.generate.strategy]) if arm == "guided" else [""]
        found += [Variant(arm, strategy, of) for of in sees for strategy in strategies]
    return found


def points(config: Config) -> list[Point]:
    """Every trial of the grid, cell by cell: the arm `real` for ratio 0, then each ratio, arm and
    seed.
    """
    s, found = config.sweep, []
    for cell in cells(s):
        for ratio in sorted(s.ratios):
            arms = variants(config, cell) if ratio else [Variant("real")]
            found += [Point(cell, v, ratio, seed) for v in arms for seed in range(s.seeds)]
    return found


def check(config: Config) -> None:
    """UserError where the grid makes no sense, before anything runs."""
    s = config.sweep
    if max(s.ratios) == 0:  # also of a search: images are generated for the largest
        raise UserError(
            f"sweep.ratios {s.ratios} leaves the arms {', '.join(s.arms)} without images; "
            "add a ratio above 0"
        )
    if s.search is not None and s.search.samples > s.max_trials:
        raise UserError(
            f"sweep.search.samples {s.search.samples} is above sweep.max_trials "
            f"{s.max_trials}; take fewer, or allow more"
        )
    if s.search is None and (count := len(points(config))) > s.max_trials:
        raise UserError(
            f"sweep.max_trials {s.max_trials}: this grid has {count} trials ({len(s.real)} "
            f"counts of real images, {len(s.ratios)} "
            f"ratios, {len(s.arms)} arms, {s.seeds} seeds); leave some out, or allow more"
        )
    if generates(s) and config.generate.adaptive:
        raise UserError(
            "generate.adaptive true: a sweep's small cells have no verifiers to choose noise "
            "levels; set it to false"
        )
    if config.classifier.patience is not None:
        raise UserError(
            f"classifier.patience {config.classifier.patience} would stop trials, which "
            "are compared, at different steps; take null"
        )
    if generates(s) and config.denoiser.external and len(s.denoiser_sees) > 1:
        raise UserError(
            f"sweep.denoiser_sees {s.denoiser_sees}: denoiser.external is one and the same "
            "for every cell; take one of the two"
        )
    if generates(s):  # what a run that generates must keep to
        check_config(
            config.model_dump(mode="json") | {"mix": {"arms": ["real", "unguided", "guided"]}},
            "the sweep",
        )
    if config.cluster.training_workers_min not in (None, config.cluster.training_workers):
        raise UserError(
            "cluster.training_workers_min: trials of fewer workers have other last bits; "
            "take null in a sweep"
        )


def check_counts(config: Config, by_class: Mapping[str, int], exact: bool) -> None:
    """UserError where a class has fewer images of train than a cell asks for.

    by_class: as they are (exact), or of the whole source, before it is split: then less is known,
    and less refused.
    """
    s = config.sweep
    if s.scarce == ALL:
        return
    share = 1.0 if exact else config.data.split.train
    for count in sorted((n for n in s.real if isinstance(n, int)), reverse=True):
        short = {
            c: math.floor(n * share)
            for c, n in by_class.items()
            if n * share < count * (1 if exact else 0.8)
        }
        if short:
            reported = ", ".join(f"{c} {'' if exact else 'about '}{n}" for c, n in short.items())
            raise UserError(
                f"sweep.real {count}: train has fewer images of some classes ({reported}); "
                f"leave {count} out, or set sweep.scarce=all "
                "to take all that these classes have"
            )


# ---- where it lies -------------------------------------------------------------------------------


def cell_dir(run: RunDir, cell: DataRegime) -> RunDir:
    return RunDir(run.root / "cells" / cell.name)


def pool_dir(run: RunDir, cell: DataRegime, variant: Variant) -> StoragePath:
    return run.root / "pools" / cell.name / variant.name


def trial_dir(run: RunDir, point: Point) -> StoragePath:
    return (
        run.root
        / "trials"
        / point.cell.name
        / point.variant.name
        / f"r{name_of(point.ratio)}"
        / f"s{point.seed}"
    )


def result_dir(run: RunDir, point: Point) -> StoragePath:
    """The step folder that is finished last."""
    return trial_dir(run, point) / "result"


# ---- how many ------------------------------------------------------------------------------------


def wanted(real: Sequence[int], ratio: float, overdraw: float = 1.0) -> list[int]:
    """Images of each class to add to so many real ones, half away from zero; with overdraw, to
    generate: rounded up.
    """
    assert ratio >= 0, ratio
    if overdraw == 1:
        return [math.floor(ratio * n + 0.5) for n in real]
    return [math.ceil(ratio * n * overdraw - 1e-9) for n in real]


def filter_of(curate: Curate, lesions: Sequence[int]) -> Curate:
    """The filter of a cell. lesions: of each class in its train. Below VERIFIABLE of them in a
    class there are no verifiers and no manifold: a picture is still refused where it is flat,
    clipped, not finite, a near copy or a twin.
    """
    if min((n for n in lesions if n), default=0) >= VERIFIABLE:
        return curate
    return curate.model_copy(
        update={"folds": 0, "trivial_quantile": None, "realism_quantile": None}
    )


def plan(config: Config, run: RunDir) -> list[PlannedStage]:
    """The stages of a sweep, in order: its trials on the grid, or those of a search in its
    place.
    """
    prepared, trials = PlannedStage("prepare", 0, (Output(run.data),)), run.root / "trials"
    if config.sweep.search is not None:
        searched = Output(run.root / SEARCHED, kind="file")
        return [prepared, PlannedStage("sweep", 0, (searched,), trials)]
    results = tuple(Output(result_dir(run, p)) for p in points(config))
    reported = tuple(Output(run.root / name, kind="file") for name in RESULTS)
    return [
        prepared,
        PlannedStage("sweep", 0, results, trials),
        PlannedStage("report", 0, reported),
    ]
