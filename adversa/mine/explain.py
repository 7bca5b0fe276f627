"""Failure modes as text: lines for a terminal, plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from adversa.mine.association import Finding
from adversa.mine.modes import FailureModes, phrase
from adversa.types import Json


def lines(found: FailureModes, classes: Sequence[str]) -> list[str]:
    """The modes with all their findings, then what the findings were corrected for."""
    if not found.modes:
        return [f"No image of {found.images} is misclassified, or nearly."]
    said = [
        f"{found.errors} of {found.images} images misclassified; {len(found.modes)} failure modes:"
    ]
    for mode in found.modes:
        confused = ", ".join(f"{classes[c]} {n}" for c, n in mode.confused)
        alike = [f"{n.example} ({classes[n.label]})" for n in mode.neighbours]
        said += [
            f"{mode.id}: {mode.name}",
            f"  {mode.errors} errors ({mode.share:.0%} of all), {mode.size - mode.errors} near "
            f"misses; taken for {confused}; {mode.medoid} stands for it",
            f"  right and alike: {alike[0] if alike else 'none'}",
        ]
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
