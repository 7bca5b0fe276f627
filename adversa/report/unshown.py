"""What a run did not show: comparisons without a word, groups too small, checks that were off, arms
that were not trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from adversa.curate.checks import CHECKS
from adversa.report.evidence import ComparisonRow
from adversa.report.gather import Facts
from adversa.report.words import count, counted, fixed, listed, signed
from adversa.storage import tables
from adversa.types import ARMS, Json

WHY = {  # arm -> what it would tell
    "resample": "whether drawing the classes evenly would do as much",
    "replay": "whether repeating the mined real images would do as much",
    "unguided": "whether synthetic images that know no hard case would do as much",
    "guided": "whether images generated from hard cases help",
}


@dataclass(frozen=True)
class Unshown:
    """Sentences, by what they are about. small: attribute -> the values too small to be tested."""

    comparisons: list[str]
    arms: list[str]
    small: dict[str, str]
    unknown: list[str]  # attributes that were asked for and no image of test has
    empty: list[str]  # classes without an image of test
    checks: list[str]


def unshown(facts: Facts, compared: list[ComparisonRow], rounds: list[int]) -> Unshown:
    groups: Json = facts.summary["subgroups"]
    requested = facts.section("evaluate").get("subgroups") or []
    generated = [n for n in rounds if tables.parts(facts.run.round(n, "verdicts"))]
    return Unshown(
        comparisons=[sentence(c) for c in compared if c.word == "not shown"],
        arms=[f"{arm}: {WHY[arm]}" for arm in ARMS if arm in WHY and arm not in facts.arms],
        small={
            a: text for a, arms in groups.items() if (text := _small(next(iter(arms.values()), [])))
        },
        unknown=[str(a) for a in requested if a not in groups] if groups or requested else [],
        empty=[name for name, n in zip(facts.classes, facts.images["test"], strict=True) if not n],
        checks=checks_off(facts, generated[-1]) if generated else [],
    )


def sentence(c: ComparisonRow) -> str:
    """The interval, what would have been found, and what it would take to find more."""
    parts = [f"{c.name}: {signed(c.difference)} ({signed(c.low)} to {signed(c.high)}), {c.on}."]
    if c.detectable is not None:
        where = f"With {counted(c.seeds or 1, 'seed')} and {counted(c.lesions or 0, 'lesion')}"
        parts.append(
            f"{where} an effect of {fixed(c.detectable)} is found 4 times in 5; a smaller "
            "one may be there."
        )
        if c.seeds_needed:
            parts.append(
                f"An effect of {fixed(c.effect, 2)} would take {counted(c.seeds_needed, 'seed')}."
            )
        elif c.seeds == 1:
            parts.append("One seed does not tell how many it would take.")
        else:
            parts.append(
                f"For an effect of {fixed(c.effect, 2)} a hundred seeds are not enough: it "
                "takes more lesions."
            )
    return " ".join(parts)


def _small(rows: list[Json]) -> str:
    return listed([f"{row['value']} ({count(row['lesions'])})" for row in rows if row["small"]])


def checks_off(facts: Facts, round_number: int) -> list[str]:
    """The checks that no verdict of the round has a limit for. The verifier's is never off."""
    folder, checks = facts.run.round(round_number, "verdicts"), [c for c in CHECKS if c.off]
    rows = tables.read(folder, [c.limit for c in checks], tables.VERDICTS)
    limits = {c: set(rows[c.limit].unique().to_pylist()) for c in checks}
    return [c.off for c in checks if limits[c] <= {None, c.vacuous}]
