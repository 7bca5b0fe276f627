"""`report.html`: one file, nothing fetched, no script. Whatever comes from a user's files is escaped."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from adversa.curate.gate import REASONS
from adversa.report import gallery
from adversa.report.gather import METRICS, Facts, Score, by_round, mean_specificity, read_facts, score
from adversa.runs import read_json, writing
from adversa.tables import replace_bytes
from adversa.types import BEFORE

TURNING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
MINUS, DASH = "\u2212", "\u2013"
ROLES_SHOWN = ("test", "mine")
MEASURES = ("precision", "recall", "density", "coverage")
WORDS = {"better": "better", "worse": "worse", "not shown": "unclear"}  # verdict -> its colour in the style sheet
MARKS = dict(zip(REASONS, ("kept", "broken", "broken", "disagrees", "copy"), strict=True))


@dataclass(frozen=True)
class Row:
    """A line of a before/after table."""

    name: str
    before: Score
    after: Score | None

    @property
    def change(self) -> float | None:
        known = self.after is not None and self.after.value is not None and self.before.value is not None
        return self.after.value - self.before.value if known else None  # type: ignore[union-attr, operator]


@dataclass(frozen=True)
class Bar:
    """A difference and its interval on the comparisons' common axis, which goes from -100 to 100."""

    low: float
    middle: float
    high: float


def write(run_dir: Path) -> Path:
    """Write `report.html` into a finished run's folder, from what lies there alone, and return its path.

    UserError where the run is not finished, or cannot be written.
    """
    facts = read_facts(Path(run_dir))
    html = environment().get_template("template.html.j2").render(view(facts))
    path = facts.run.root / "report.html"
    with writing(facts.run.root):
        replace_bytes(path, html.encode())
    return path


def environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"fixed": fixed, "signed": signed, "count": count, "duration": duration, "moment": moment}
    found.globals["share"] = share
    return found


def view(facts: Facts) -> dict[str, Any]:
    """The names that the template uses."""
    after, rounds = facts.after, facts.rounds
    shown, hard = gallery.cases(facts, rounds[-1]) if rounds else ([], 0)
    return {
        "facts": facts,
        "summary": facts.summary,
        "tone": WORDS.get(facts.summary["verdict"], "unclear"),
        "notes": [sentence(note) for note in facts.summary["notes"]],
        "grouped": facts.config.get("data", {}).get("grouped", True),
        "after": after,
        "roles": ROLES_SHOWN,
        "overall": {role: overall(facts, role) for role in ROLES_SHOWN},
        "per_class": {
            kind: [
                (images, compared(facts, "test", name, f"{kind}/{name}"))
                for name, images in zip(facts.classes, facts.images["test"], strict=True)
            ]
            for kind in ("sensitivity", "specificity")
        },
        "metrics": METRICS,
        "arm_scores": {(arm, role, m): score(facts, arm, role, m) for arm in facts.arms for role in ROLES_SHOWN for m in METRICS},
        "comparisons": comparisons(facts.summary["comparisons"]),
        "subgroups": subgroups(facts.summary["subgroups"]),
        "modes": read_json(facts.run.round(rounds[-1], "hard") / "modes.json") if rounds else None,
        "by_round": by_round(facts, "mine", "balanced_accuracy") if len(rounds) > 1 else {},
        "gallery": {"cases": shown, "all": hard, "round": rounds[-1] if rounds else 0, "most": gallery.OFFSPRING},
        "samples": gallery.samples(facts, rounds[-1], "unguided") if rounds and "unguided" in facts.arms else {},
        "marks": MARKS,
        "quality": facts.quality,
        "measures": MEASURES,
        "grid": gallery.sheet(facts.run.root / facts.quality["grid"]) if facts.quality else None,
        "reasons": [r for r in REASONS if r != "kept"],
        "steps": sorted(facts.summary["seconds"].items(), key=lambda s: (-s[1], s[0])),
    }


def overall(facts: Facts, role: str) -> list[Row]:
    rows = [compared(facts, role, name, metric) for metric, name in METRICS.items()]
    specificity = [mean_specificity(facts, arm, role) if arm else None for arm in (BEFORE, facts.after)]
    return [*rows, Row("specificity, mean of classes", specificity[0] or Score(None), specificity[1])]


def compared(facts: Facts, role: str, name: str, metric: str) -> Row:
    after = score(facts, facts.after, role, metric) if facts.after else None
    return Row(name, score(facts, BEFORE, role, metric), after)


def subgroups(found: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, list[dict[str, Any]]]:
    """attribute -> a row a value, with each arm's score."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for attribute, arms in found.items():
        first = next(iter(arms.values()))
        tables[attribute] = [
            {k: row[k] for k in ("value", "n", "lesions", "small")}
            | {"scores": {arm: Score(rows[i]["value_of"], *(rows[i]["interval"] or ())) for arm, rows in arms.items()}}
            for i, row in enumerate(first)
        ]
    return tables


def comparisons(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows with their bars, and the value at the end of the axis that they share."""
    ends = [abs(v) for c in found for v in (c["low"], c["high"], c["difference"]) if v is not None and math.isfinite(v)]
    reach = max(ends, default=0) * 1.08 or 1.0
    return {
        "reach": reach,
        "rows": [(c, _bar(c, reach)) for c in found],
    }


def _bar(row: dict[str, Any], reach: float) -> Bar | None:
    ends = [row[k] for k in ("low", "difference", "high")]
    return None if any(v is None or not math.isfinite(v) for v in ends) else Bar(*(100 * v / reach for v in ends))


def printable(value: Any) -> Any:
    """Control and surrogate characters (HTML forbids them) and those that turn the writing direction become U+FFFD."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join("\ufffd" if _unfit(c) else c for c in value)


def _unfit(c: str) -> bool:
    return c in TURNING or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")


def fixed(value: float | None, digits: int = 3) -> str:
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}".replace("-", MINUS)


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def signed(value: float | None) -> str:
    """+0.012, or 0.000 without a sign where it rounds to that."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", MINUS)


def count(value: int) -> str:
    return f"{value:,}"


def share(part: float, whole: float) -> float:
    """Percent, 0 of nothing."""
    return 100 * part / whole if whole else 0.0


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 1 h 02 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def moment(text: str | None) -> str:
    """An ISO time as 2026-01-02 03:04 UTC."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if text else "not recorded"
    except ValueError:
        return str(text)
