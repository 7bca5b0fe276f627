"""Geometry of the figures: numbers in, coordinates of an SVG out. The templates draw them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adversa.evaluate.calibration import ReliabilityBin

LEFT, TOP, WIDTH, HEIGHT = (
    34.0,
    10.0,
    250.0,
    190.0,
)  # of the area that is plotted in, in units of the SVG
COUNTS = 46.0  # height of the bars under a reliability curve
GAP = 12.0


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Reliability:
    """points: (x, y, radius); line: them as a polyline; bars: (x, y, width, height) of the counts;
    most: the largest count.
    """

    points: list[tuple[float, float, float]]
    line: str
    bars: list[tuple[float, float, float, float]]
    most: float


@dataclass(frozen=True)
class Curves:
    """Shares of images, from 0 at the bottom to 1, at most so similar: two polylines on one
    axis.
    """

    synthetic: str
    held_out: str
    ticks: list[Tick]


def x_of(share: float) -> float:
    return round(LEFT + WIDTH * share, 2)


def y_of(share: float) -> float:
    return round(TOP + HEIGHT * (1 - share), 2)


def reliability(bins: Sequence[ReliabilityBin]) -> Reliability:
    """Accuracy over confidence, a point a bin that has images; its area goes with their number."""
    most = max((b.n for b in bins), default=0) or 1
    points = [
        (x_of(b.confidence), y_of(b.accuracy), round(1.5 + 4.5 * math.sqrt(b.n / most), 2))
        for b in bins
        if b.confidence is not None and b.accuracy is not None
    ]
    foot, tall = TOP + HEIGHT + GAP + COUNTS, [round(COUNTS * b.n / most, 2) for b in bins]
    bars = [
        (x_of(b.low) + 0.5, foot - h, round(WIDTH * (b.high - b.low) - 1, 2), h)
        for b, h in zip(bins, tall, strict=True)
        if b.n
    ]
    return Reliability(points, " ".join(f"{x},{y}" for x, y, _ in points), bars, most)


def curves(points: Sequence[tuple[float, float, float]]) -> Curves:
    """(share, similarity of synthetic, of held-out) -> both cumulative curves over similarity."""
    values = [v for _, s, h in points for v in (s, h)]
    ticks = nice(min(values), max(values))
    low, span = ticks[0], ticks[-1] - ticks[0]

    def line(column: int) -> str:
        return " ".join(f"{x_of((p[column] - low) / span)},{y_of(p[0])}" for p in points)

    return Curves(
        line(1),
        line(2),
        [Tick(x_of((t - low) / span), f"{t:.10g}".replace("-", "\u2212")) for t in ticks],
    )


def nice(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, some `about` of them."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]
