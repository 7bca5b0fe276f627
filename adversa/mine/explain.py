"""Failure modes as text: rows for a table, lines for a terminal, plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from adversa.mine.association import Finding
from adversa.mine.modes import FailureModes, phrase
from adversa.types import Json

HEADER = (
    "mode",
    "errors",
    "near misses",
    "share of errors",
    "taken for",
    "stands for it",
    "right and alike",
)


def rows(found: FailureModes, classes: Sequence[str]) -> list[tuple[str, ...]]:
    """One row a mode, in HEADER's columns: name, errors, near misses, share, confusions, medoid,
    nearest image that is right.
    """
    table: list[tuple[str, ...]] = []
    for mode in found.modes:
        confused = ", ".join(f"{classes[c]} {n}" for c, n in mode.confused)
        near = (
            f"{mode.neighbours[0].example} ({classes[mode.neighbours[0].label]})"
            if mode.neighbours
            else "none"
        )
        counts = (str(mode.errors), str(mode.size - mode.errors), f"{mode.share:.0%}")
        table.append((mode.name, *counts, confused, mode.medoid, near))
    return table


def lines(found: FailureModes, classes: Sequence[str]) -> list[str]:
    """The modes with all their findings, then what the findings were corrected for."""
    if not found.modes:
        return [f"No image of {found.images} is misclassified, or nearly."]
    said = [
        f"{found.errors} of {found.images} images misclassified; {len(found.modes)} failure modes:"
    ]
    for mode, (name, errors, near, share, confused, medoid, alike) in zip(
        found.modes, rows(found, classes), strict=True
    ):
        said.append(f"{mode.id}: {name}")
        said.append(
            f"  {errors} errors ({share} of all), {near} near misses; taken for "
            f"{confused}; {medoid} stands for it"
        )
        said.append(f"  right and alike: {alike}")
        said += [
            f"  {phrase(f)}, odds ratio {interval(f)}, {f.everywhere} of {f.total} in the class"
            for f in mode.attributes
        ]
    if found.tests:
        said.append(
            "Counted are lesions, against all of their class in the role. p: Fisher's "
            "exact test, corrected by Holm for "
            f"{found.tests} tests (any false finding: at most {found.alpha:.0%})."
        )
    else:
        said.append("No attribute could be tested: there are none, or too few images.")
    return said


def interval(f: Finding) -> str:
    """ "5.1 (95%: 2.0 to 13)"; an end that is infinite is said in words."""
    odds, high = (f"{v:.2g}" if math.isfinite(v) else "unbounded" for v in (f.odds_ratio, f.high))
    return f"{odds} (95%: {f.low:.2g} to {high})"


def plain(found: FailureModes) -> Json:
    """For JSON, which knows no infinity: an odds ratio (or its end) without bound becomes None."""
    return {name: _finite(value) for name, value in asdict(found).items()}


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
