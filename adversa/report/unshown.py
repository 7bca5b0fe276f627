"""What a run did not show: comparisons without a word, groups too small, checks that were off, arms
that were not trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from adversa.report.evidence import Comparison
from adversa.report.gather import Facts, columns
from adversa.report.words import count, counted, fixed, listed, signed
from adversa.storage import tables
from adversa.types import ARMS

WHY = {  # arm -> what it would tell
    "resample": "whether drawing the classes evenly would do as much",
    "replay": "whether repeating the mined real images would do as much",
    "unguided": "whether synthetic images that know no hard case would do as much",
    "guided": "whether images generated from hard cases help",
}
OFF = {  # column of a limit -> the check that is off where no verdict has one
    "contrast_limit": "flat images",
    "clipped_limit": "images out of range",
    "realism_limit": "distance to the real images, first feature space",
    "realism_2_limit": "distance to the real images, second feature space",
    "similarity_limit": "near copies in pixels",
    "similarity_2_limit": "near copies in features",
    "twin_limit": "near-duplicates among the synthetic images",
    "quota": "quota of a source image",
}
ALWAYS = {"similarity_limit"}  # checked by every version; an older one wrote no limit


@dataclass(frozen=True)
class Unshown:
    """Sentences, by what they are about. small: attribute -> the values too small to be tested."""

    comparisons: list[str]
    arms: list[str]
    small: dict[str, str]
    unknown: list[str]  # attributes that were asked for and no image of test has
    empty: list[str]  # classes without an image of test
    checks: list[str]


def unshown(facts: Facts, compared: list[Comparison], rounds: list[int]) -> Unshown:
    groups: dict[str, Any] = facts.summary["subgroups"]
    asked = facts.section("evaluate").get("subgroups") or []
    painted = [n for n in rounds if tables.parts(facts.run.round(n, "verdicts"))]
    return Unshown(
        comparisons=[sentence(c) for c in compared if c.word == "not shown"],
        arms=[f"{arm}: {WHY[arm]}" for arm in ARMS if arm in WHY and arm not in facts.arms],
        small={
            a: text for a, arms in groups.items() if (text := _small(next(iter(arms.values()), [])))
        },
        unknown=[str(a) for a in asked if a not in groups] if groups or asked else [],
        empty=[name for name, n in zip(facts.classes, facts.images["test"], strict=True) if not n],
        checks=checks_off(facts, painted[-1]) if painted else [],
    )


def sentence(c: Comparison) -> str:
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


def _small(rows: list[dict[str, Any]]) -> str:
    return listed([f"{row['value']} ({count(row['lesions'])})" for row in rows if row["small"]])


def checks_off(facts: Facts, round_number: int) -> list[str]:
    """The checks that no verdict of the round has a limit for. The judge's is never off."""
    folder = facts.run.round(round_number, "verdicts")
    rows = columns(folder, [*OFF, "agreement_most"], tables.VERDICTS)
    old = all(rows[name].null_count == len(rows) for name in rows.column_names)
    found = [
        name
        for column, name in OFF.items()
        if rows[column].null_count == len(rows) and not (old and column in ALWAYS)
    ]
    most = pc.min(rows["agreement_most"]).as_py()
    return (
        found
        if most is not None and most < 1
        else [*found, "images that are trivial to the verifier"]
    )
