"""The finished trials of a sweep: their scores on the same resamples of select, and the table of
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adversa.config import Config
from adversa.evaluate import replicates
from adversa.evaluate.bootstrap import draws
from adversa.run.folder import RunDir, classes_of
from adversa.sweep import grid
from adversa.sweep import run as sweep_run
from adversa.sweep.grid import DataRegime, Point, Variant
from adversa.types import UserError, seed_of

ROLE = "select"  # `test` stays closed
METRICS = (
    "balanced_accuracy",
    "accuracy",
    "auroc_macro",
    "worst_class",
)  # with a column of their own
REAL = Variant("real")
AT_ONCE = 64  # trials whose logits are in memory


class Condition(NamedTuple):
    """Trials that differ by their seed alone."""

    cell: DataRegime
    variant: Variant
    ratio: float


@dataclass(frozen=True)
class Trials:
    """rows: of `sweep.table`, of finished trials. drawn: [1 + R], the metric on select as it is,
    then in each resample of its `lesions`, the same ones for all; resamples without a value for
    some trial are left out for all.
    """

    config: Config
    rows: dict[Point, dict[str, Any]]
    drawn: dict[Point, np.ndarray]
    lesions: int
    images: int

    @cached_property
    def requested(self) -> list[Point]:
        return grid.points(self.config)

    def of(self, d: Condition) -> dict[int, Point]:
        """Finished trials by seed."""
        every = (Point(d.cell, d.variant, d.ratio, seed) for seed in range(self.config.sweep.seeds))
        return {p.seed: p for p in every if p in self.drawn}

    def row(self, d: Condition) -> dict[str, Any]:
        """What all seeds share: counts."""
        return self.rows[next(iter(self.of(d).values()))]

    def reached(self, d: Condition) -> float:
        """Images added for each real one of train."""
        row = self.row(d)
        return float(row["added"] / row["real"])

    def matrix(self, d: Condition, seeds: Iterable[int] | None = None) -> np.ndarray:
        """[S, 1 + R] of the seeds asked for, or of all finished ones."""
        found = self.of(d)
        return np.stack([self.drawn[found[s]] for s in (found if seeds is None else seeds)])

    def scores(self, conditions: Sequence[Condition]) -> np.ndarray:
        """[D, S], NaN where a trial is missing."""
        found = np.full((len(conditions), self.config.sweep.seeds), np.nan)
        for i, d in enumerate(conditions):
            for seed, p in self.of(d).items():
                found[i, seed] = self.drawn[p][0]
        return found

    def replicates(self, conditions: Sequence[Condition], name: str) -> tuple[np.ndarray, bool]:
        """([B, D] of the mean over seeds, whether the luck of seeds is in them); of lesions it
        always is, those shared by all.
        """
        lesions = np.stack([self.matrix(d)[:, 1:].mean(0) for d in conditions], 1)
        rng = np.random.default_rng(seed_of("sweep", self.config.seed, name))
        try:
            return replicates.seed_draws(self.scores(conditions), len(lesions), rng, lesions), True
        except UserError:  # no condition has a second seed
            return lesions, False

    def conditions(
        self, cell: DataRegime, variant: Variant
    ) -> tuple[list[Condition], list[tuple[float, float]]]:
        """(the finished ones, ascending, ratio 0 first, those that reached the same count once;
        (ratio, the smaller one that it is the same as)).
        """
        every = [
            Condition(cell, variant if r else REAL, r) for r in sorted(self.config.sweep.ratios)
        ]
        found: dict[int, Condition] = {}
        same = []
        for d in (d for d in every if self.of(d)):
            if (first := found.setdefault(self.row(d)["added"], d)) is not d:
                same.append((d.ratio, first.ratio))
        return sorted(found.values(), key=self.reached), same


def table(config: Config, run: RunDir) -> pa.Table:
    """The sweep's table, with reached = added / real and a column for each of METRICS, null where a
    trial has no value.
    """
    rows = sweep_run.table(config, run)
    reached = pc.divide(rows["added"].cast(pa.float64()), rows["real"].cast(pa.float64()))
    rows = rows.append_column("reached", reached)
    values = [dict(m) for m in rows["metrics"].to_pylist()]
    for name in METRICS:
        rows = rows.append_column(name, pa.array([v.get(name) for v in values], pa.float64()))
    return rows


def read(config: Config, run: RunDir) -> Trials:
    """Scores of all finished trials."""
    known = {_key(r): r for r in sweep_run.table(config, run).to_pylist()}
    rows = {
        p: row
        for p in grid.points(config)
        if (row := known.get(_key(sweep_run.describe(p)))) is not None
    }
    done, metric = list(rows), config.sweep.metric
    drawn: dict[Point, np.ndarray] = {}
    ids: list[str] = []
    lesions = 0
    for start in range(0, len(done), AT_ONCE):
        some = done[start : start + AT_ONCE]
        said = sweep_run.logits_of(config, run, some)
        assert ids in ([], said.ids), f"{some[0].name} was scored on other images"
        ids = said.ids
        values, lesions = draws(
            said.logits,
            said.labels,
            said.groups,
            config.sweep.bootstrap,
            seed_of("bootstrap", "sweep", ROLE),
            classes_of(run.data),
            only=metric,
        )
        if metric not in values or not np.isfinite(values[metric][:, 0]).all():
            raise UserError(
                f"sweep.metric {metric} has no value on select's {len(said.labels)} "
                "images; ask for another metric"
            )
        drawn |= dict(zip(some, values[metric], strict=True))
    if drawn:
        fine = np.isfinite(np.stack(list(drawn.values()))).all(0)
        drawn = {p: x[fine] for p, x in drawn.items()}
    return Trials(config, rows, drawn, lesions, len(ids))


def _key(reported: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(reported[k] for k in ("cell", "arm", "strategy", "sees", "ratio", "seed"))
