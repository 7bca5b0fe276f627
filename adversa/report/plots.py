"""What the figures of all reports share, and those of `report.html`, drawn by matplotlib.

Nothing of a user's files is in them but numbers and the names of arms; their bytes are the same for
the same numbers.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from adversa.evaluate.calibration import ReliabilityBin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

RC: dict[RcKeyType, object] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": "#333333",
    "axes.axisbelow": True,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "path",
    "svg.hashsalt": "adversa",
}
FIRST, SECOND = "#1F5F6B", "#5C666D"  # the colours of the page: --accent and --soft
SIZE = (4.2, 4.2)  # inches; the page shows it 360 to 470 pixels wide, so that text stays readable


@contextmanager
def style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(RC):
        yield


def svg(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    out = io.BytesIO()
    with style():
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def png(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    out = io.BytesIO()
    with style():
        figure.savefig(out, format="png", dpi=150, metadata={"Software": None})
    return out.getvalue()


def uri(figure: Figure) -> str:
    """The figure as a data URI of an image, which the page's policy lets run and fetch nothing."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure)).decode()


def settle(figure: Figure) -> None:
    """Lay out once: anew for each file, the last bits would depend on the files before."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def reliability(bins: Sequence[ReliabilityBin]) -> Figure:
    """Accuracy over confidence, a point for each bin that has images, its area by their number.

    Below it a bar for each bin: its images (a mean over seeds may be no whole number).
    """
    from matplotlib.figure import Figure

    known = [b for b in bins if b.confidence is not None and b.accuracy is not None]
    most = max((b.n for b in bins), default=0) or 1
    with style():
        figure = Figure(figsize=SIZE, layout="constrained")
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(4, 1))
        upper.plot([0, 1], [0, 1], color=SECOND, linestyle=(0, (4, 3)), linewidth=1)
        x, y = [b.confidence for b in known], [b.accuracy for b in known]
        upper.plot(x, y, color=FIRST, linewidth=1.8)
        area = [90 * b.n / most + 6 for b in known]
        upper.scatter(x, y, s=area, color=FIRST, edgecolor="white", linewidth=0.8, zorder=3)
        _shares(upper, "share that is right")
        width = [b.high - b.low - 0.004 for b in bins]
        middle, count = [(b.low + b.high) / 2 for b in bins], [b.n for b in bins]
        lower.bar(middle, count, width, color=FIRST, alpha=0.55)
        lower.set(xlabel="probability of the answer", ylabel="images", xlim=(0, 1))
        lower.set_yticks([0, most], ["0", f"{most:,.0f}"])
        settle(figure)
    return figure


def curves(points: Sequence[tuple[float, float, float]]) -> Figure:
    """Two cumulative curves over similarity. points: (share, similarity of generated, of real)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    share, synthetic, held_out = np.asarray(points, float).T
    with style():
        figure = Figure(figsize=(SIZE[0], 3.4), layout="constrained")
        ax = figure.subplots()
        dashes = (0, (5, 3))
        ax.plot(
            held_out, share, color=SECOND, linestyle=dashes, linewidth=1.8, label="held-out real"
        )
        ax.plot(synthetic, share, color=FIRST, linewidth=1.8, label="generated")
        _shares(ax, "share of images")
        ax.set_xlabel("similarity to the nearest real image")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.legend(loc="upper left")
        settle(figure)
    return figure


def _shares(ax: Axes, label: str) -> None:
    """An upright axis of shares."""
    ax.set(ylim=(-0.02, 1.02), ylabel=label, yticks=[0, 0.25, 0.5, 0.75, 1])
    ax.grid(axis="y")
