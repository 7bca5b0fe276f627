"""What the report needs, read from the run folder: figures, intervals, counts. No picture is
decoded here.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from adversa.common.sanitize import load_yaml
from adversa.run.folder import RunDir
from adversa.storage import once, tables
from adversa.storage.files import read_json
from adversa.storage.path import StoragePath, matching
from adversa.types import ARMS, BEFORE, ROLES, Json, UserError

METRICS = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "auroc_macro": "AUROC, mean of classes",
}


@dataclass(frozen=True)
class Facts:
    """A finished run. classes: in the order of the labels; cards: the scorecards, as dicts, of
    every round.
    """

    run: RunDir
    config_text: str
    config: Json
    summary: Json
    classes: list[str]
    arms: list[str]
    cards: list[Json]
    images: dict[str, list[int]]  # role -> images of each class
    lesions: dict[str, int]  # role -> lesions
    quality: Json | None = None  # quality.json, where the denoiser was evaluated

    @property
    def rounds(self) -> list[int]:
        """The rounds that have hard cases, in order."""
        found = [
            int(p.parent.name.removeprefix("round-")) for p in self.run.root.glob("round-*/hard")
        ]
        return sorted(n for n in found if tables.parts(self.run.round(n, "hard")))

    @property
    def made_with(self) -> dict[str, str]:
        """What the run was made with, by name: versions, the commit, the machine."""
        commit = {"commit": self.summary["git"]} if self.summary["git"] else {}
        found: dict[str, str] = self.summary["versions"] | commit | self.summary["machine"]
        return found

    @property
    def after(self) -> str | None:
        """The arm that the page sets against `real`: guided, or the last there is."""
        others = [a for a in self.arms if a != "real"]
        return "guided" if "guided" in others else (others[-1] if others else None)

    def section(self, name: str) -> Json:
        """A section of the configuration; empty where it is null."""
        return self.config.get(name) or {}


@dataclass(frozen=True)
class Score:
    """A metric's mean over seeds and its 95% interval; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None


def read_facts(run_dir: StoragePath) -> Facts:
    """The facts of a finished run. UserError where there is none, or it is not finished: that names
    the command that finishes it.
    """
    run = RunDir(run_dir)
    if not run.config.is_file():
        raise UserError(
            f"{run_dir} is not a run folder (it has no config.yaml); give the --run-dir of "
            "an `adversa loop`"
        )
    config_text = run.config.read_text()
    finish = (
        "finish it with "
        f"`{shlex.join(['adversa', 'loop', str(run.config), '--run-dir', str(run_dir)])}`"
    )
    summary = read_json(run.summary)
    if summary is None:
        raise UserError(f"{run_dir} is not finished (it has no summary.json); {finish}")
    classes = [str(c) for c in summary["classes"]]
    images, lesions = _roles(run, len(classes))
    known = {arm: i for i, arm in enumerate(ARMS)}
    return Facts(
        run=run,
        config_text=config_text,
        config=load_yaml(config_text) or {},
        summary=summary,
        classes=classes,
        arms=sorted(summary["arms"], key=lambda a: (known.get(a, len(known)), a)),
        cards=scorecards(run),
        images=images,
        lesions=lesions,
        quality=read_json(run.root / "quality.json"),
    )


def scorecards(run: RunDir) -> list[Json]:
    """Every classifier's on a role, as it was scored last: an arm that does not change is scored
    again in each round.
    """
    steps = [*matching(run.root, "round-*/evaluate"), run.test]
    paths = [p for s in steps for p in matching(s, "*/*/scorecard.json")]
    found = [json.loads(once.read_bytes(p)) for p in paths]
    return list({(c["arm"], c["seed"], c["round"], c["role"]): c for c in found}.values())


def figures(facts: Facts, arm: str, role: str) -> Json:
    """An arm's means over seeds on a role: metric -> value."""
    of_arm = facts.summary["before"] if arm == BEFORE else facts.summary["arms"].get(arm, {})
    found: Json = of_arm.get(role, {})
    return found


def score(facts: Facts, arm: str, role: str, metric: str) -> Score:
    """An arm's figure on a role, as summary.json has it."""
    value = number(figures(facts, arm, role).get(metric))
    if value is None:
        return Score(None)
    intervals = (
        facts.summary["intervals_before"]
        if arm == BEFORE
        else facts.summary["intervals"].get(arm, {})
    )
    low, high = intervals.get(role, {}).get(metric) or (None, None)
    return Score(value, number(low), number(high))


def mean_specificity(facts: Facts, arm: str, role: str) -> Score:
    """Mean over classes. It has no interval: the ends of the classes' intervals do not average to
    it.
    """
    values = figures(facts, arm, role)
    return Score(
        mean(
            [v for c in facts.classes if (v := number(values.get(f"specificity/{c}"))) is not None]
        )
    )


def by_round(facts: Facts, role: str, metric: str) -> dict[int, dict[str, float | None]]:
    """Round to arm to the mean over seeds."""
    numbers = sorted({c["round"] for c in facts.cards if c["role"] == role})
    return {
        n: {
            arm: mean(
                [
                    c["metrics"][metric]
                    for c in facts.cards
                    if (c["round"], c["role"], c["arm"]) == (n, role, arm)
                    and metric in c["metrics"]
                ]
            )
            for arm in facts.arms
        }
        for n in numbers
    }


def _roles(run: RunDir, classes: int) -> tuple[dict[str, list[int]], dict[str, int]]:
    images, lesions = {}, {}
    for role in ROLES:
        table = tables.read(run.data / role, columns=["label", "group"], schema=tables.EXAMPLES)
        labels = table["label"].to_pylist()
        images[role] = [labels.count(c) for c in range(classes)]
        lesions[role] = len(set(table["group"].to_pylist()))
    return images, lesions


def number(value: object) -> float | None:
    """A finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
