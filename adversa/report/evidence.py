"""The tables of figures: before and after, arms, comparisons, classes, groups of classes,
subgroups, cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from adversa.report.gather import METRICS, Facts, Score, figures, mean_specificity, number, score
from adversa.storage.files import read_json
from adversa.storage.path import matching
from adversa.types import BEFORE, Json

MORE = {
    "worst_class": "worst class",
    "ece": "ECE",
    "brier": "Brier",
}  # where they were measured; of the last two, less is better
SHORT = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "auroc_macro": "AUROC",
} | MORE


@dataclass(frozen=True)
class ScoreRow:
    """A line of a before/after table."""

    name: str
    before: Score
    after: Score | None

    @property
    def change(self) -> float | None:
        if self.after is None or self.after.value is None or self.before.value is None:
            return None
        return self.after.value - self.before.value


@dataclass(frozen=True)
class Bar:
    """A difference and its interval on the comparisons' common axis, which goes from -100 to
    100.
    """

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class ComparisonRow:
    """Arm a minus arm b. Numbers are None where they are not known; a sweep's contrasts have no
    seeds_needed, effect, mcnemar and gain. mcnemar: of each seed, as summary.json has it.
    """

    a: str
    b: str
    metric: str
    role: str
    word: str
    difference: float | None
    low: float | None
    high: float | None
    p_holm: float | None
    detectable: float | None
    seeds: int | None
    lesions: int | None
    seeds_needed: int | None
    effect: float | None
    note: str
    mcnemar: list[Json]
    gain: dict[str, float] | None

    @property
    def name(self) -> str:
        return f"{self.a} minus {self.b}"

    @property
    def needed(self) -> str:
        """Seeds for the effect, in words: one pair of classifiers does not tell what another would
        do.
        """
        return (
            "not told by one seed"
            if self.seeds == 1
            else str(self.seeds_needed or "more than 100, on these lesions")
        )

    @property
    def on(self) -> str:
        return (
            f"{METRICS.get(self.metric, self.metric)}, "
            f"{self.role}{' (optimistic)' if self.role == 'mine' else ''}"
        )


def overall(facts: Facts, role: str) -> list[ScoreRow]:
    """Accuracy, mean sensitivity and specificity, balanced accuracy, AUROC."""
    specificity = [
        mean_specificity(facts, arm, role) if arm else None for arm in (BEFORE, facts.after)
    ]
    return [
        compared(facts, role, "accuracy", "accuracy"),
        compared(facts, role, "sensitivity, mean of classes", "balanced_accuracy"),
        ScoreRow("specificity, mean of classes", specificity[0] or Score(None), specificity[1]),
        compared(facts, role, "balanced accuracy", "balanced_accuracy"),
        compared(facts, role, METRICS["auroc_macro"], "auroc_macro"),
    ]


def compared(facts: Facts, role: str, name: str, metric: str) -> ScoreRow:
    after = score(facts, facts.after, role, metric) if facts.after else None
    return ScoreRow(name, score(facts, BEFORE, role, metric), after)


def per_class(facts: Facts) -> dict[str, list[tuple[int, ScoreRow]]]:
    """Sensitivity and specificity to (images of test, row) of each class."""
    return {
        kind: [
            (images, compared(facts, "test", name, f"{kind}/{name}"))
            for name, images in zip(facts.classes, facts.images["test"], strict=True)
        ]
        for kind in ("sensitivity", "specificity")
    }


def arms(facts: Facts, role: str) -> tuple[list[str], dict[str, list[Score]]]:
    """(names of the columns, arm -> its scores); a metric that no arm has on this role is left
    out.
    """
    shown = [
        m
        for m in SHORT
        if m in METRICS or any(m in figures(facts, arm, role) for arm in facts.arms)
    ]
    return [SHORT[m] for m in shown], {
        arm: [score(facts, arm, role, m) for m in shown] for arm in facts.arms
    }


def groups(facts: Facts) -> dict[str, list[tuple[str, dict[str, Score]]]]:
    """Group of classes to (name of a metric, arm to score on test), in the order of the summary."""
    found: dict[str, list[tuple[str, dict[str, Score]]]] = {}
    for group in facts.section("evaluate").get("groups") or {}:
        known = dict.fromkeys(m for arm in facts.arms for m in figures(facts, arm, "test"))
        names = sorted((m for m in known if _is_of(m, str(group), facts.classes)), key=_place)
        rows = [
            (_title(m, str(group)), {arm: score(facts, arm, "test", m) for arm in facts.arms})
            for m in names
        ]
        if rows:
            found[str(group)] = rows
    return found


KINDS = ("auroc", "pauc", "pauc_norm", "sensitivity", "specificity")


def _is_of(metric: str, group: str, classes: list[str]) -> bool:
    kind, at, _ = metric.removesuffix(f"/{group}").partition("@")
    plain = kind in KINDS and (bool(at) or kind == "auroc")
    return metric.endswith(f"/{group}") and plain


def _place(metric: str) -> tuple[str, int]:
    """AUROC and its parts first, then sensitivity and specificity, target by target."""
    kind, at, rest = metric.partition("/")[0].partition("@")
    return (rest if kind.startswith("s") else "", KINDS.index(kind))


def _title(metric: str, group: str) -> str:
    kind, _, level = metric.removesuffix(f"/{group}").partition("@")
    return {
        "auroc": "AUROC",
        "pauc": f"partial AUC above sensitivity {level}",
        "pauc_norm": f"partial AUC above sensitivity {level}, of the {_rest(level)} possible",
        "sensitivity": f"sensitivity at specificity {level}",
        "specificity": f"specificity reached there ({level} was set on select)",
    }[kind]


def _rest(level: str) -> str:
    try:
        return f"{1 - float(level):.2f}"
    except ValueError:
        return "largest"


def subgroups(found: dict[str, dict[str, list[Json]]]) -> dict[str, list[Json]]:
    """Attribute to a row for each value, with each arm's score."""
    shown: dict[str, list[Json]] = {}
    for attribute, of_arms in found.items():
        first = next(iter(of_arms.values()), [])
        shown[attribute] = [
            {k: row[k] for k in ("value", "n", "lesions", "small")}
            | {
                "scores": {
                    arm: Score(number(rows[i]["value_of"]), *(rows[i]["interval"] or ()))
                    for arm, rows in of_arms.items()
                }
            }
            for i, row in enumerate(first)
        ]
    return {attribute: rows for attribute, rows in shown.items() if rows}


@dataclass(frozen=True)
class Within:
    """Arm a minus arm b within one value of an attribute; word is what is said of it."""

    value: str
    n: int
    lesions: int
    small: bool
    difference: float | None
    low: float | None
    high: float | None
    p_holm: float | None
    word: str


def within(found: Json) -> dict[str, list[Within]]:
    """Attribute to a row for each value; empty where the run did not compare them."""
    return {
        attribute: [
            Within(
                str(row["value"]),
                row["n"],
                row["lesions"],
                row["small"],
                number(row["difference"]),
                number(row["low"]),
                number(row["high"]),
                number(row["p_holm"]),
                row["word"] or ("too few to test" if row["small"] else "no value"),
            )
            for row in rows
        ]
        for attribute, rows in found.get("attributes", {}).items()
    }


def comparisons(found: list[Json]) -> list[ComparisonRow]:
    return [
        ComparisonRow(
            a=str(c["a"]),
            b=str(c["b"]),
            metric=c["metric"],
            role=c["role"],
            word=c["word"],
            difference=number(c["difference"]),
            low=number(c["low"]),
            high=number(c["high"]),
            p_holm=number(c["p_holm"]),
            detectable=number(c["detectable"]),
            seeds=c["seeds"],
            lesions=c["lesions"],
            seeds_needed=c.get("seeds_needed"),
            effect=number(c.get("effect")),
            note=c["note"],
            mcnemar=c.get("mcnemar", []),
            gain=c.get("gain_per_device_hour"),
        )
        for c in found
    ]


def reach(rows: list[ComparisonRow]) -> float:
    """The value at the end of the axis that comparisons share."""
    ends = [abs(v) for c in rows for v in (c.low, c.high, c.difference) if v is not None]
    return max(ends, default=0) * 1.08 or 1.0


def bar(row: ComparisonRow, end: float) -> Bar | None:
    found = [row.low, row.difference, row.high]
    return (
        None
        if any(v is None or not math.isfinite(v) for v in found)
        else Bar(*(100 * v / end for v in found if v is not None))
    )


def costs(facts: Facts) -> list[tuple[str, float | None, float | None]]:
    """(arm, seconds, device-seconds), in the order of the arms."""
    found = facts.summary["cost"]
    return [
        (a, number(found[a]["seconds"]), number(found[a]["device_seconds"])) for a in facts.arms
    ]


def elsewhere(facts: Facts) -> list[tuple[str, str]]:
    """(name, verdict in one sentence) of each external cohort that the run's classifiers were
    scored on.
    """
    found = [
        (p.parent.name, read_json(p) or {})
        for p in matching(facts.run.root, "external/*/summary.json")
    ]
    return [
        (name, str(reported.get("verdict_sentence") or reported.get("verdict", "")))
        for name, reported in found
    ]
