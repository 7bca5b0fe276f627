"""What was generated and what was kept of it, how the hard cases were shared out, and whether the
denoiser repeats its training.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adversa.curate.filter import (
    EVERY_REASON,
    Acceptance,
    Decision,
    acceptance,
    acceptance_by_strategy,
)
from adversa.report.gather import Facts, number
from adversa.storage import tables
from adversa.storage.files import read_json
from adversa.storage.path import matching


@dataclass(frozen=True)
class Line:
    """A line of a table of acceptance; strategy "" is all of them."""

    name: str
    strategy: str
    generated: int
    kept: int
    rejected: dict[str, int]


@dataclass(frozen=True)
class Accepted:
    """Of an arm: its lines, class by class, and the reasons that any of its images met, in the
    order of the checks.
    """

    lines: list[Line]
    reasons: list[str]
    strategies: list[str]


@dataclass(frozen=True)
class Budget:
    """Of a class, in one round: images of mine, errors of the classifier that mined, hard cases
    taken by their kind, and what came of them in the arm in question. errors is None where the
    scores are gone.
    """

    name: str
    images: int
    errors: float | None
    misclassified: int
    near: int
    generated: int
    kept: int

    @property
    def taken(self) -> int:
        return self.misclassified + self.near


@dataclass(frozen=True)
class Memory:
    """As curate.memorisation.Memorisation; curve: (share, synthetic, held-out)."""

    synthetic: int
    held_out: int
    curve: list[tuple[float, float, float]]
    nearer: float
    beyond: float


def decisions(facts: Facts, number: int | None = None) -> list[Decision]:
    """The decisions of every round, or of one."""
    name = "round-*" if number is None else f"round-{number:03d}"
    found = []
    for folder in matching(facts.run.root, f"{name}/verdicts"):
        rows = tables.read(folder, list(Decision._fields), tables.VERDICTS)
        lists = (rows[name].to_pylist() for name in Decision._fields)
        found += [Decision(*row) for row in zip(*lists, strict=True)]
    return found


def accepted(facts: Facts) -> dict[str, Accepted]:
    """arm -> what was generated and kept, by class, and by strategy where an arm has several."""
    found = decisions(facts)
    by_class = acceptance(found, facts.classes)
    by_strategy = acceptance_by_strategy(found, facts.classes)
    shown = {}
    for arm, rows in by_class.items():
        parts = by_strategy.get(arm, {})
        strategies = sorted({s for of_class in parts.values() for s in of_class})
        lines = []
        for name, row in rows.items():
            lines.append(_line(name, "", row))
            if len(strategies) > 1:
                lines += [
                    _line(name, strategy, part) for strategy, part in parts.get(name, {}).items()
                ]
        met = {reason for line in lines for reason in line.rejected}
        shown[arm] = Accepted(lines, [r for r in EVERY_REASON if r in met], strategies)
    return shown


def _line(name: str, strategy: str, row: Acceptance) -> Line:
    return Line(name, strategy, row["generated"], row["accepted"], row["rejected"])


def budget(facts: Facts, number: int) -> list[Budget]:
    """A line a class, of round `number`."""
    hard = tables.read(
        facts.run.round(number, "hard"), ["label", "reason"], tables.HARD_CASES
    ).to_pylist()
    taken = Counter((h["label"], h["reason"]) for h in hard)
    generated = Counter((d.label, d.keep) for d in decisions(facts, number) if d.arm == facts.after)
    errors = _errors(facts, number)
    return [
        Budget(
            name=name,
            images=facts.images["mine"][c],
            errors=None if errors is None else float(errors[c]),
            misclassified=taken[c, "misclassified"],
            near=sum(
                n
                for (label, reason), n in taken.items()
                if label == c and reason != "misclassified"
            ),
            generated=generated[c, True] + generated[c, False],
            kept=generated[c, True],
        )
        for c, name in enumerate(facts.classes)
    ]


def _errors(facts: Facts, number: int) -> np.ndarray | None:
    """Misclassified images of mine by class, float64 [K], under what mined: its mean over
    classifiers where there are several.
    """
    rows = tables.read(
        facts.run.round(number, "scores"), ["arm", "seed", "label", "logits"], tables.PREDICTIONS
    )
    if not len(rows):
        return None
    labels = rows["label"].to_numpy()
    logits = np.concatenate([c.flatten().to_numpy() for c in rows["logits"].chunks]).reshape(
        len(rows), -1
    )
    models = len(set(zip(rows["arm"].to_pylist(), rows["seed"].to_pylist(), strict=True)))
    return np.bincount(labels[logits.argmax(1) != labels], minlength=len(facts.classes)) / models


def memories(facts: Facts, round_number: int) -> dict[str, Memory]:
    """arm -> how near its images lie to real ones; empty where that was not measured."""
    told = read_json(facts.run.round(round_number, "verdicts") / "memorisation.json") or {}
    found = {}
    for arm, m in told.items():
        curve = [
            tuple(p)
            for p in (m or {}).get("curve", [])
            if len(p) == 3 and None not in map(number, p)
        ]
        if curve and number(m["nearer"]) is not None:
            found[arm] = Memory(
                m["synthetic"], m["held_out"], curve, float(m["nearer"]), float(m["beyond"])
            )
    return found


def memory_sentence(arm: str, m: Memory, strategies: Sequence[str]) -> str:
    """What the curve means, in words, then its two numbers. The error is that of a Mann-Whitney
    statistic of independent images.
    """
    error = math.sqrt((m.synthetic + m.held_out + 1) / (12 * m.synthetic * m.held_out))
    if m.nearer > 0.5 + 1.96 * error:
        word = (
            "nearer to real images than held-out ones do, so some may repeat what the denoiser "
            "was trained on"
        )
        if any(s != "sample" for s in strategies):
            word = (
                "nearer to real images than held-out ones do, as images that are generated "
                "from a real one must"
            )
    elif m.nearer < 0.5 - 1.96 * error:
        word = "farther from real images than held-out ones do: there is no sign of copying"
    else:
        word = "no nearer to real images than held-out ones do: there is no sign of copying"
    return (
        f"The images generated for {arm} lie {word}. One of them is more like its nearest "
        "real image than a held-out real image is "
        f"like its own with probability {m.nearer:.2f} (0.50 if they were real), and "
        f"{100 * m.beyond:.1f}% of them are more like "
        "theirs than 99% of the held-out images are (1% if they were real)."
    )
