"""What the page needs, read from the run folder: figures, intervals, counts. No picture is decoded here."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adversa import tables
from adversa.curate.gate import acceptance
from adversa.runs import RunDir, read_json
from adversa.types import ARMS, BEFORE, ROLES, UserError, Verdict

REQUIRED = {"arms", "classes", "intervals", "notes", "split_hash", "verdict"}
OPTIONAL: dict[str, Any] = {
    "run": "", "seed": "", "rounds": "", "generated": 0, "accepted": 0, "comparisons": [], "verdict_sentence": "",
    "versions": {}, "seconds": {}, "subgroups": {}, "cost": {}, "overhead_seconds": None, "wall_seconds": None, "test_opened": None,
}  # fmt: skip
METRICS = {"balanced_accuracy": "balanced accuracy", "accuracy": "accuracy", "auroc_macro": "AUROC, mean of classes"}


@dataclass(frozen=True)
class Facts:
    """A finished run. classes: in the order of the labels; cards: the scorecards, as dicts, of every round."""

    run: RunDir
    config_text: str
    config: dict[str, Any]
    summary: dict[str, Any]
    classes: list[str]
    arms: list[str]
    cards: list[dict[str, Any]]
    images: dict[str, list[int]]  # role -> images of each class
    lesions: dict[str, int]  # role -> lesions
    accepted: dict[str, dict[str, dict[str, Any]]]  # as curate.gate.acceptance
    quality: dict[str, Any] | None = None  # quality.json, where the denoiser was evaluated

    @property
    def rounds(self) -> list[int]:
        """The rounds that have hard cases, in order."""
        found = [int(p.parent.name.removeprefix("round-")) for p in self.run.root.glob("round-*/hard")]
        return sorted(n for n in found if tables.parts(self.run.round(n, "hard")))

    @property
    def after(self) -> str | None:
        """The arm that the page sets against `real`: guided, or the last there is."""
        others = [a for a in self.arms if a != "real"]
        return "guided" if "guided" in others else (others[-1] if others else None)


@dataclass(frozen=True)
class Score:
    """A metric's mean over seeds and its 95% interval; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None


def read_facts(run_dir: Path) -> Facts:
    """UserError where there is no run, or it is not finished: with the command that finishes it."""
    run = RunDir(run_dir)
    if not run.config.is_file():
        raise UserError(f"{run_dir} is not a run folder (it has no config.yaml); give the --run-dir of an `adversa loop`")
    config_text = run.config.read_text()
    finish = f"finish it with `{shlex.join(['adversa', 'loop', str(run.config), '--run-dir', str(run_dir)])}`"
    summary = read_json(run.summary)
    if summary is None:
        raise UserError(f"{run_dir} is not finished (it has no summary.json); {finish}")
    if lacking := REQUIRED - summary.keys():
        raise UserError(f"{run.summary} lacks {', '.join(sorted(lacking))}; delete it and {finish}")
    same = {"before": summary["arms"].get("real", {}), "intervals_before": summary["intervals"].get("real", {})}
    summary = OPTIONAL | same | {"added": summary.get("used", {})} | summary
    classes = [str(c) for c in summary["classes"]]
    images, lesions = _roles(run, len(classes))
    known = {arm: i for i, arm in enumerate(ARMS)}
    return Facts(
        run=run,
        config_text=config_text,
        config=yaml.safe_load(config_text) or {},
        summary=summary,
        classes=classes,
        arms=sorted(summary["arms"], key=lambda a: (known.get(a, len(known)), a)),
        cards=_cards(run),
        images=images,
        lesions=lesions,
        accepted=_acceptance(run, classes),
        quality=read_json(run.root / "quality.json"),
    )


def score(facts: Facts, arm: str, role: str, metric: str) -> Score:
    """An arm's figure on a role, as summary.json has it."""
    value = _figures(facts, arm, role).get(metric)
    if _number(value) is None:
        return Score(None)
    intervals = facts.summary["intervals_before"] if arm == BEFORE else facts.summary["intervals"].get(arm, {})
    low, high = intervals.get(role, {}).get(metric, (None, None))
    return Score(_number(value), _number(low), _number(high))


def _figures(facts: Facts, arm: str, role: str) -> dict[str, Any]:
    return (facts.summary["before"] if arm == BEFORE else facts.summary["arms"].get(arm, {})).get(role, {})


def mean_specificity(facts: Facts, arm: str, role: str) -> Score:
    """Mean over classes. It has no interval: the ends of the classes' intervals do not average to it."""
    values = _figures(facts, arm, role)
    return Score(_mean([v for c in facts.classes if (v := _number(values.get(f"specificity/{c}"))) is not None]))


def by_round(facts: Facts, role: str, metric: str) -> dict[int, dict[str, float | None]]:
    """round -> arm -> mean over seeds."""
    numbers = sorted({c["round"] for c in facts.cards if c["role"] == role})
    return {
        n: {
            arm: _mean([
                c["metrics"][metric]
                for c in facts.cards
                if (c["round"], c["role"], c["arm"]) == (n, role, arm) and metric in c["metrics"]
            ])
            for arm in facts.arms
        }
        for n in numbers
    }  # fmt: skip


def _roles(run: RunDir, classes: int) -> tuple[dict[str, list[int]], dict[str, int]]:
    images, lesions = {}, {}
    for role in ROLES:
        table = tables.read(run.data / role, columns=["label", "group"], schema=tables.EXAMPLES)
        labels = table["label"].to_pylist()
        images[role] = [labels.count(c) for c in range(classes)]
        lesions[role] = len(set(table["group"].to_pylist()))
    return images, lesions


def _acceptance(run: RunDir, classes: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    found: list[Verdict] = []
    for folder in sorted(run.root.glob("round-*/verdicts")):
        found += [Verdict(**row) for row in tables.read(folder, schema=tables.VERDICTS).to_pylist()]
    return acceptance(found, classes)


def _cards(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted(run.root.rglob("scorecard-*.json"))]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
