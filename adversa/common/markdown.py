"""Markdown from Jinja templates: what a template prints is escaped, unless it is Markdown already.

CommonMark (https://spec.commonmark.org/0.31.2/) with GitHub's tables, links and strikethrough.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from adversa.common import sanitize

# An underscore between two letters or digits can neither open nor close emphasis, so names stay
# readable in the file itself.
SPECIAL = re.compile(r"[\\`*{}\[\]<>#|~&!$@^]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")
DASH = "\u2013"  # what is not known; a hyphen may start a list
STARTS = re.compile(r"^([-+=](?!\d)|\d+(?=[.)](?!\d)))")  # of a list or a line; no number is one


def text(value: object) -> Markup:
    """One line, without spaces around it, in which nothing is markup, not even a link.

    Markdown (a Markup) stays as it is.
    """
    if isinstance(value, Markup):
        return value
    line = SPECIAL.sub(lambda m: "\\" + m[0], _line(value))
    return Markup(STARTS.sub(lambda m: "\\" + m[0] if m[0] in "-+=" else m[0] + "\\", line))


def code(value: object) -> Markup:
    """A code span that a cell of a table can hold."""
    line = _line(value).replace("|", "\\|")
    fence = "`" * (_longest_fence(line) + 1)
    space = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return Markup(f"{fence}{space}{line}{space}{fence}")


def block(content: str, language: str) -> Markup:
    """Text as it is, behind a fence that it does not hold."""
    fence = "`" * max(3, _longest_fence(content) + 1)
    return Markup(f"{fence}{language}\n{sanitize.printable(content).rstrip()}\n{fence}")


def row(cells: Iterable[object]) -> Markup:
    """A line of a table."""
    return Markup("| " + " | ".join(map(text, cells)) + " |")


def head(cells: Sequence[object], left: int = 1) -> Markup:
    """The first two lines of a table; all columns but the first `left` are aligned to the right."""
    rule = [*["---"] * left, *["---:"] * (len(cells) - left)]
    return Markup(f"{row(cells)}\n| {' | '.join(rule)} |")


def table(cells: Sequence[object], rows: Iterable[Iterable[object]], left: int = 1) -> Markup:
    """A whole table: its head (see `head`) and rows."""
    return Markup("\n".join([head(cells, left), *map(row, rows)]))


def environment(folder: str) -> Environment:
    """Jinja for the templates of a folder of this package: `text` is applied to all they print.

    `autoescape` is on so that macros return Markup; `text` leaves it nothing to escape.
    """
    found = Environment(
        loader=PackageLoader("adversa", folder),
        autoescape=True,
        finalize=text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {"code": code, "block": block}
    found.globals |= {"row": row, "head": head, "table": table, "dash": DASH}
    return found


def _line(value: object) -> str:
    return " ".join(sanitize.printable(str(value)).split())


def _longest_fence(content: str) -> int:
    return max((len(run) for run in re.findall("`+", content)), default=0)
