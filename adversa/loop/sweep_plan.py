"""What a sweep amounts to before it begins, and what it will take: `adversa sweep --dry-run`. No Ray, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from adversa import runs
from adversa.config import Config, Mix, judge_of
from adversa.data import sources
from adversa.loop import grid, planning
from adversa.loop.grid import Cell
from adversa.loop.measure import Measured
from adversa.loop.planning import CPU_DOUBT, DOUBT, Range
from adversa.runs import RunDir
from adversa.types import ROLES

# Beside its steps: making ready, building the model, writing, scoring once more (benchmarks/sweep.py, two cores).
TRIAL_SECONDS = 1.0


@dataclass(frozen=True)
class Line:
    """One kind of work. work: (kind of loop.measure, how much of it) pairs; seconds: of each of `count` besides."""

    what: str
    count: int
    amount: str
    work: tuple[tuple[str, float], ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class Amounts:
    """trials: points of the grid; images: painted, in all; cells: with trials."""

    trials: int
    cells: int
    images: int
    overdraw: float
    lines: tuple[Line, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """Of a Line. seconds: of one device."""

    what: str
    count: int
    amount: str
    seconds: Range


def amounts(config: Config, run: RunDir) -> Amounts:
    """Counted by the sweep's own rules; before `prepare`, images of each class by the shares of data.split."""
    c, s = config, config.sweep
    every, notes = _images(config, run)
    cells, points = grid.cells(s), grid.points(config)
    real = {cell: _real(every["train"], cell) for cell in grid.sources(s)}
    pools = [(cell, v) for cell in cells for v in grid.variants(config, cell) if v.paints]
    asked = {cell: sum(grid.wanted(real[cell], max(s.ratios), s.overdraw)) for cell in cells}
    painted = sum(asked[cell] for cell, _ in pools)
    rows = sum(asked[cell] * planning.evaluations(c, v.arm) for cell, v in pools)
    judged = sum(min((n for n in real[cell] if n), default=0) >= grid.JUDGED for cell in cells)
    select, looks = sum(every["select"]), c.classifier.evaluations + 1
    indexed = sum(sum(real[cell]) + sum(_real(every["mine"], cell)) + sum(every["select"]) + sum(every["test"]) for cell in cells)
    judge, folds = judge_of(c), c.curate.folds
    denoisers = len({Cell(None) if v.sees == grid.ALL else cell for cell, v in pools}) if not c.denoiser.external else 0
    found = [
        Line("trials", len(points), f"{c.classifier.steps} steps", _trained("classifier", len(points), c.classifier.steps)
             + (("score", float(len(points) * looks * select)),), TRIAL_SECONDS),
        Line("hard cases", len(cells), f"{c.classifier.steps} steps", _trained("classifier", len(cells), c.classifier.steps)
             + (("score", float(len(cells) * looks * select + indexed)), ("index", float(2 * indexed)))),
    ]  # fmt: skip
    if pools:
        found += [
            Line("judges", judged * folds, f"{judge.steps} steps", _trained("judge", judged * folds, judge.steps)),
            Line("denoisers", denoisers, f"{c.denoiser.steps} steps", _trained("denoiser", denoisers, c.denoiser.steps)),
            Line("painted images", len(pools), f"{painted} images", (("paint", float(rows)),)),
            Line("verdicts", len(pools), f"{painted} images", (("compare", float(painted * (1 + c.curate.twins))),)),
        ]  # fmt: skip
    return Amounts(len(points), len(cells), painted, s.overdraw, tuple(x for x in found if x.count), tuple(notes))


def _trained(kind: str, count: int, steps: int) -> tuple[tuple[str, float], ...]:
    return ((kind, float(count * steps)),)


def _images(config: Config, run: RunDir) -> tuple[dict[str, list[int]], list[str]]:
    """(role -> images of each class, what to know of these numbers)."""
    split = runs.read_json(run.data / "split.json") if runs.is_finished(run.data) else None
    if split is not None:
        return {r: list(split["images"][r].values()) for r in ROLES}, []
    listing = sources.list_records(config.data)
    counts = Counter(r.label for r in listing.records)
    shares = {r: getattr(config.data.split, r) for r in ROLES}
    found = {r: [round(counts[c] * share) for c in listing.classes] for r, share in shares.items()}
    return found, ["Images of each role are taken by the shares of data.split: the source is not read yet."]


def _real(train: Sequence[int], cell: Cell) -> list[int]:
    return [n if cell.count is None else min(n, cell.count) for n in train]


def measurable(config: Config) -> Config:
    """A configuration whose kinds of work are those of the sweep."""
    paints = any(v.paints for cell in grid.cells(config.sweep) for v in grid.variants(config, cell))
    return config.model_copy(update={"mix": Mix(arms=["real", "unguided", "guided"] if paints else ["real"])})


def costs(found: Amounts, measured: Measured) -> list[Cost]:
    """Device-seconds of each line."""
    up = CPU_DOUBT if measured.device == "cpu" else DOUBT
    told = []
    for line in found.lines:
        low = mid = high = line.count * line.seconds
        for kind, amount in line.work:
            t = measured.timings[kind]
            low, mid, high = low + amount * t.fast, mid + amount * t.seconds, high + amount * t.slow
        told.append(Cost(line.what, line.count, line.amount, Range(low / DOUBT, mid, high * up)))
    return told


def total(found: Sequence[Cost], lanes: int) -> tuple[Range, Range]:
    """(wall seconds on so many lanes, none of them ever idle; device-seconds)."""
    device = Range(0, 0, 0)
    for cost in found:
        device += cost.seconds
    return Range(device.low / lanes, device.mid / lanes, device.high / lanes), device
