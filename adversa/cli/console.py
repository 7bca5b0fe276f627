"""The terminal, for text that others may have written: a name cannot move the cursor, set the title
or copy to the clipboard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from adversa.common.sanitize import printable, unsigned

LOG_SECONDS = 15.0  # between two lines of progress where there is no terminal


def say(console: Console, text: RenderableType) -> None:
    """Print text word for word: no markup, no emoji codes, no wrapping."""
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str, float, float], None]]:
    """What shows how much of something is done (its name, done, total): a bar on a terminal, which
    goes away at the end; elsewhere a line now and then.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    live, tasks, spoken = console.is_terminal, dict[str, TaskID](), time.monotonic()

    def show(what: str, done: float, total: float) -> None:
        nonlocal spoken
        if live:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)
        elif time.monotonic() - spoken > LOG_SECONDS:
            spoken = time.monotonic()
            say(console, f"{what}: {done:.0f} of {total:.0f}")

    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not live
    ) as bars:
        yield show


class Screen(Console):
    """rich's console, which writes escape sequences of its own and none that stand in what is
    shown.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment if text == segment.text else segment._replace(text=text)


def error(message: str) -> None:
    """One line on stderr, word for word."""
    line = unsigned(" ".join(message.split()))
    Screen(stderr=True).print(Text.assemble(("error:", "bold red"), " ", line), soft_wrap=True)
