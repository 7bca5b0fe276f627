"""The terminal, for text that others may have written: a name cannot move the cursor, set the title
or copy to the clipboard.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from adversa.common.sanitize import printable, unsigned


def say(console: Console, text: RenderableType) -> None:
    """Print text word for word: no markup, no emoji codes, no wrapping."""
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def bars(console: Console) -> Progress:
    """Progress bars that go away at the end; nothing where there is no terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


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
