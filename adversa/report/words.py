"""Numbers and names as a reader meets them, the same on the page and in `report.md`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime

from markupsafe import Markup

from adversa.common import sanitize
from adversa.common.markdown import DASH

MINUS = "\u2212"


def printable(value: object) -> object:
    """As texts.printable; what is no text, or is HTML of ours, stays as it is."""
    return (
        sanitize.printable(value)
        if isinstance(value, str) and not isinstance(value, Markup)
        else value
    )


def fixed(value: float | None, digits: int = 3) -> str:
    """0.123, a dash where it is not known, no sign where it rounds to 0."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:.{digits}f}"
    return (text.removeprefix("-") if float(text) == 0 else text).replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """+0.012, or 0.000 without a sign where it rounds to that."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def p_value(value: float | None) -> str:
    """0.012; below 0.001 it is said to be that: a bootstrap can't tell it from 0."""
    return "< 0.001" if value is not None and 0 <= value < 0.001 else fixed(value)


def count(value: float | None) -> str:
    """1,234; with one digit where it is a mean over seeds that is no whole number."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def counted(value: int, noun: str, many: str = "") -> str:
    return f"{count(value)} {noun if value == 1 else many or noun + 's'}"


def share(part: float, whole: float) -> float:
    """Percent, 0 of nothing."""
    return 100 * part / whole if whole else 0.0


def listed(names: Sequence[str]) -> str:
    """The items as a list in a sentence: a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 1 h 02 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def moment(text: str | None) -> str:
    """An ISO time as 2026-01-02 03:04 UTC."""
    try:
        return (
            datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
            if text
            else "not recorded"
        )
    except ValueError:
        return str(text)
