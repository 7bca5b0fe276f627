"""What a sweep amounts to before it begins, and what it will take: `adversa sweep --dry-run`. No
Ray, no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adversa.config import Config, Mix, judge_of
from adversa.data import sources
from adversa.estimate import plan
from adversa.estimate.measure import Measured
from adversa.estimate.plan import CPU_DOUBT, DOUBT, Range
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.sweep import grid
from adversa.sweep.grid import Cell
from adversa.types import ROLES

# Beside its steps and scoring: making ready, building the model, writing (benchmarks/sweep.py, two
# cores).
TRIAL_SECONDS = 0.2


@dataclass(frozen=True)
class Line:
    """One kind of work. work: (kind of loop.measure, how much of it) pairs; seconds: of each of
    `count` besides.
    """

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
    """Counted by the sweep's own rules, less what the folder has finished; before `prepare`, images
    of each class by the shares of data.split.
    """
    c, s = config, config.sweep
    every, notes = _images(config, run)
    cells = grid.cells(s)
    real = {cell: _real(every["train"], cell) for cell in grid.sources(s)}
    trials, done = _trials(config, run)
    if done:
        notes.append(f"{done} trials are finished already, and not counted.")
    if s.search is not None and any(
        k.startswith("generate.") or k == "strategies" for k in s.search.space
    ):
        notes.append(
            "Painted for one setting of generate: a search that varies it paints anew for each."
        )
    pools = [
        (cell, v)
        for cell in cells
        for v in grid.variants(config, cell)
        if v.paints and not step_folder.is_finished(grid.pool_dir(run, cell, v) / "verdicts")
    ]
    asked = {cell: sum(grid.wanted(real[cell], max(s.ratios), s.overdraw)) for cell in cells}
    images = sum(asked[cell] for cell, _ in pools)
    found = [
        *_attacks(
            c,
            [
                cell
                for cell in cells
                if not step_folder.is_finished(grid.cell_dir(run, cell).round(1, "hard"))
            ],
            real,
            every,
        ),
        *_denoisers(c, run, cells, every, real),
        Line(
            "painted images",
            len(pools),
            f"{images} images",
            (("paint", float(sum(asked[cell] * plan.evaluations(c, v.arm) for cell, v in pools))),),
        ),
        Line(
            "verdicts",
            len(pools),
            f"{images} images",
            (("compare", float(images * (1 + c.curate.twins))),),
        ),
        Line(
            "trials",
            trials,
            f"{c.classifier.steps} steps",
            (
                *_trained("classifier", trials, c.classifier.steps),
                ("score", float(trials * (c.classifier.evaluations + 1) * sum(every["select"]))),
            ),
            TRIAL_SECONDS,
        ),
    ]
    return Amounts(
        trials, len(cells), images, s.overdraw, tuple(x for x in found if x.count), tuple(notes)
    )


def _trials(config: Config, run: RunDir) -> tuple[int, int]:
    """(to do, done)"""
    if config.sweep.search is not None:
        return config.sweep.search.samples, 0
    points = grid.points(config)
    done = sum(step_folder.is_finished(grid.result_dir(run, p)) for p in points)
    return len(points) - done, done


def _attacks(
    c: Config, cells: Sequence[Cell], real: Mapping[Cell, list[int]], every: Mapping[str, list[int]]
) -> list[Line]:
    """The classifiers that find hard cases, the judges, and what the gate measures where anything
    is painted.
    """
    n, looks = len(cells), c.classifier.evaluations + 1
    seen = n * looks * sum(every["select"])
    of_gate: tuple[tuple[str, float], ...] = ()
    judges = 0
    if grid.paints(c.sweep):
        indexed = sum(
            sum(real[cell])
            + sum(_real(every["mine"], cell))
            + sum(every["select"])
            + sum(every["test"])
            for cell in cells
        )
        seen, of_gate = seen + indexed, (("index", 2.0 * indexed),)
        judges = c.curate.folds * sum(
            min((x for x in real[cell] if x), default=0) >= grid.JUDGED for cell in cells
        )
    judge = judge_of(c)
    return [
        Line(
            "hard cases",
            n,
            f"{c.classifier.steps} steps",
            (*_trained("classifier", n, c.classifier.steps), ("score", float(seen)), *of_gate),
        ),
        Line("judges", judges, f"{judge.steps} steps", _trained("judge", judges, judge.steps)),
    ]


def _denoisers(
    c: Config,
    run: RunDir,
    cells: Sequence[Cell],
    every: Mapping[str, list[int]],
    real: Mapping[Cell, list[int]],
) -> list[Line]:
    """With the autoencoders and latents of latent diffusion."""
    s = c.sweep
    if not grid.paints(s) or c.denoiser.external:
        return []
    whose = {
        Cell(None) if v.sees == grid.ALL else cell
        for cell in cells
        for v in grid.variants(c, cell)
        if v.paints
    }
    left = [
        cell for cell in whose if not step_folder.is_finished(grid.cell_dir(run, cell).denoiser)
    ]
    n, found = len(left), []
    if c.codec.kind != "pixels":
        views = c.codec.views if c.denoiser.flips else 1
        rows = sum(sum(real[cell]) * views + sum(every["select"]) for cell in left)
        fitted = _trained("codec", n, c.codec.steps) if c.codec.is_fitted else ()
        found.append(Line("autoencoders", n, f"{rows} latents", (*fitted, ("encode", float(rows)))))
    return [
        *found,
        Line(
            "denoisers", n, f"{c.denoiser.steps} steps", _trained("denoiser", n, c.denoiser.steps)
        ),
    ]


def _trained(kind: str, count: int, steps: int) -> tuple[tuple[str, float], ...]:
    return ((kind, float(count * steps)),)


def _images(config: Config, run: RunDir) -> tuple[dict[str, list[int]], list[str]]:
    """(role -> images of each class, what to know of these numbers)."""
    split = files.read_json(run.data / "split.json") if step_folder.is_finished(run.data) else None
    if split is not None:
        return {r: list(split["images"][r].values()) for r in ROLES}, []
    listing = sources.list_records(config.data)
    counts = Counter(r.label for r in listing.records)
    shares = {r: getattr(config.data.split, r) for r in ROLES}
    found = {r: [round(counts[c] * share) for c in listing.classes] for r, share in shares.items()}
    return found, [
        "Images of each role are taken by the shares of data.split: the source is not read yet."
    ]


def _real(train: Sequence[int], cell: Cell) -> list[int]:
    return [n if cell.count is None else min(n, cell.count) for n in train]


def measurable(config: Config) -> Config:
    """A configuration whose kinds of work are those of the sweep."""
    return config.model_copy(
        update={
            "mix": Mix(
                arms=["real", "unguided", "guided"] if grid.paints(config.sweep) else ["real"]
            )
        }
    )


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
