"""What the classifiers say of the images of `test`: who is taken for whom, and whether they are as
sure as they should be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from adversa.common.statistics import softmax
from adversa.evaluate.calibration import ReliabilityBin, reliability
from adversa.report.gather import Facts, Score, score
from adversa.storage import tables
from adversa.types import BEFORE


@dataclass(frozen=True)
class Said:
    """Logits [S, N, K] of an arm's S classifiers and the labels [N]."""

    logits: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Cell:
    """Of images of the row's class, read as the column's: count is a mean over seeds, share is of
    the row (None: it is empty).

    tint: of its colour, -1 to 1.
    """

    count: float
    share: float | None
    tint: float


@dataclass(frozen=True)
class Confusions:
    """Rows of cells [K][K], true class by predicted class; reach: the share at which a difference
    has its full colour.
    """

    before: list[list[Cell]]
    after: list[list[Cell]] | None
    change: list[list[Cell]] | None
    images: list[int]
    seeds: int
    reach: float


@dataclass(frozen=True)
class Calibration:
    """bins: n is a mean over seeds. surplus: mean confidence minus accuracy, above 0 where the
    classifiers are too sure.
    """

    bins: list[ReliabilityBin]
    ece: Score
    brier: Score
    surplus: float
    seeds: int


def of_test(facts: Facts) -> dict[str, Said]:
    """BEFORE, and the arm in question, to what it says of `test`; empty where the predictions are
    gone.
    """
    rows = tables.read(facts.run.test, ["id", "arm", "seed", "label", "logits"], tables.PREDICTIONS)
    known = set(rows["arm"].unique().to_pylist())
    wanted = {BEFORE: BEFORE if BEFORE in known else "real"} | (
        {facts.after: facts.after} if facts.after else {}
    )
    found = {}
    for name, arm in wanted.items():
        chosen = rows.filter(pc.equal(rows["arm"], arm)).sort_by(
            [("seed", "ascending"), ("id", "ascending")]
        )
        seeds, classes = len(chosen["seed"].unique()), len(facts.classes)
        if len(chosen):
            logits = np.concatenate(
                [c.flatten().to_numpy() for c in chosen["logits"].chunks]
            ).astype(np.float64)
            assert len(logits) == len(chosen) * classes and len(chosen) % seeds == 0, (
                arm,
                len(logits),
                len(chosen),
                seeds,
            )
            found[name] = Said(
                logits.reshape(seeds, -1, classes),
                chosen["label"].to_numpy()[: len(chosen) // seeds],
            )
    return found


def confusions(facts: Facts, said: dict[str, Said]) -> Confusions | None:
    """None where there are no predictions."""
    if BEFORE not in said:
        return None
    classes = len(facts.classes)
    before = _counts(said[BEFORE], classes)
    after = _counts(said[facts.after], classes) if facts.after in said else None
    images = before.sum(1)
    change, reach = None, 0.0
    if after is not None:
        moved = _shares(after) - _shares(before)
        reach = float(np.nanmax(np.abs(moved), initial=0.0))
        tint = moved / reach if reach else np.zeros_like(moved)
        change = _cells(after - before, moved, tint)
    return Confusions(
        before=_cells(before, _shares(before), _shares(before)),
        after=None if after is None else _cells(after, _shares(after), _shares(after)),
        change=change,
        images=[round(n) for n in images.tolist()],
        seeds=len(said[BEFORE].logits),
        reach=reach,
    )


def _counts(said: Said, classes: int) -> np.ndarray:
    """Images by true and predicted class, mean over seeds, float64 [K, K]."""
    flat = said.labels * classes + said.logits.argmax(2)
    return np.bincount(flat.ravel(), minlength=classes**2).reshape(classes, classes) / len(
        said.logits
    )


def _shares(counts: np.ndarray) -> np.ndarray:
    """Each row's shares; NaN in a row without an image."""
    with np.errstate(invalid="ignore"):
        found: np.ndarray = counts / counts.sum(1, keepdims=True)
        return found


def _cells(counts: np.ndarray, shares: np.ndarray, tints: np.ndarray) -> list[list[Cell]]:
    known = np.isfinite(shares)
    return [
        [
            Cell(
                float(counts[i, j]),
                float(shares[i, j]) if known[i, j] else None,
                float(tints[i, j]) if known[i, j] else 0.0,
            )
            for j in range(counts.shape[1])
        ]
        for i in range(len(counts))
    ]


def calibrations(facts: Facts, said: dict[str, Said]) -> dict[str, Calibration]:
    """BEFORE, and the arm in question, to its reliability curve. Bins are those of the seeds
    together; ECE and Brier are the run's own figures.
    """
    found = {}
    for arm, s in said.items():
        seeds, images, classes = s.logits.shape
        together = reliability(s.logits.reshape(-1, classes), np.tile(s.labels, seeds))
        sure, right = softmax(s.logits).max(2).mean(), (s.logits.argmax(2) == s.labels).mean()
        found[arm] = Calibration(
            bins=[
                ReliabilityBin(b.low, b.high, b.n / seeds, b.confidence, b.accuracy)
                for b in together
            ],
            ece=score(facts, arm, "test", "ece"),
            brier=score(facts, arm, "test", "brier"),
            surplus=float(sure - right),
            seeds=seeds,
        )
    return found


def titles(facts: Facts) -> dict[str, str]:
    """BEFORE, and the arm in question, to what a column or a figure calls it."""
    return {BEFORE: "baseline"} | ({facts.after: f"after ({facts.after})"} if facts.after else {})


def calibration_sentences(found: dict[str, Calibration], names: dict[str, str]) -> list[str]:
    """What the curves say, in words. names: of `titles`."""
    reported = []
    for arm, c in found.items():
        sure = (
            f"on average {100 * abs(c.surplus):.1f} points too "
            f"{'sure' if c.surplus > 0 else 'unsure'} of its answers"
        )
        reported.append(
            f"{names[arm].capitalize()}: ECE {_words(c.ece)}, Brier {_words(c.brier)}; {sure}."
        )
    return reported


def _words(s: Score) -> str:
    text = f"{s.value:.3f}"
    return text if s.low is None or s.high is None else f"{text} ({s.low:.3f} to {s.high:.3f})"
