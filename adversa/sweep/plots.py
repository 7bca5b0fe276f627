"""The figures of a sweep, drawn by matplotlib: score against ratio, a panel a cell, and against the
number of real images.

Nothing of a user's files is in them but numbers and the names of arms; their bytes are the same for
the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from adversa.report.plots import settle, style
from adversa.sweep.grid import ALL
from adversa.sweep.wording import NAMES, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, "Color universal design": told apart by all; markers differ too.
# The colour and marker of an arm, of the guided arm by its strategy.
LOOKS = {
    "real": ("#000000", "o"),
    "replay": ("#5A5A5A", "s"),
    "unguided": ("#0072B2", "o"),
    "sample": ("#009E73", "D"),
    "img2img": ("#D55E00", "^"),
    "inpaint": ("#CC79A7", "v"),
    "outpaint": ("#E69F00", "P"),
    "inout": ("#56B4E9", "X"),
    "interpolate": ("#7A6000", "p"),
}
PANEL = (4.6, 3.5)  # inches
SATURATION = 0.045  # of a panel's height, for each saturation point's line
STEP = 5.0  # points between arms at one place of an axis


@dataclass(frozen=True)
class Look:
    color: str
    marker: str
    line: str


def look(variant: dict[str, Any]) -> Look:
    """The colour, marker and line of an arm; dashed and hollow where its denoiser saw all."""
    color, marker = LOOKS[variant["strategy"] if variant["arm"] == "guided" else variant["arm"]]
    return Look(color, marker, "--" if variant["sees"] == ALL else "-")


# ---- score against ratio -------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One panel: a regime's curves and points.

    Attributes:
        title: Above it.
        ends: Of the score's axis, alike in all panels of a regime.
        curves: Of sweep.json, of one regime.
        points: Theirs and those of the arm real, with finished trials.
    """

    title: str
    ends: tuple[float, float]
    curves: list[dict[str, Any]]
    points: list[dict[str, Any]]


def panels(known: dict[str, Any]) -> list[Panel]:
    """A cell each, the smallest first; where denoisers saw the subset and all of train, one for
    each, with replay in both.
    """
    found = []
    for cell in (c["cell"] for c in known["what"]["cells"]):
        curves = [c for c in known["curves"] if c["cell"] == cell]
        every = [p for p in known["points"] if p["cell"] == cell]
        ends = limits(
            every, curves, max((sum(map(saturates, of)) for of in _split(curves)), default=0)
        )
        parts = _split(curves)
        for of in parts:
            points = [p for p in every if p["mean"] is not None and _is_dose(p, of)]
            also = ", denoiser saw all of train" if len(parts) > 1 and of is parts[-1] else ""
            found.append(Panel(f"{title(cell)}{also}", ends, of, points))
    return [p for p in found if p.points]


def _split(curves: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """By what the denoisers saw: the cell's images, or all of train."""
    sights = [s for s in ("subset", ALL) if any(c["sees"] == s for c in curves)]
    return [[c for c in curves if c["sees"] in ("", sees)] for sees in sights or [""]]


def _is_dose(point: dict[str, Any], curves: Sequence[dict[str, Any]]) -> bool:
    """Whether the point is of an arm, at a ratio that reached more than every smaller one."""
    if point["arm"] == "real":
        return True
    return any(c["variant"] == point["variant"] and point["ratio"] in c["ratios"] for c in curves)


def limits(
    points: Sequence[dict[str, Any]], curves: Sequence[dict[str, Any]], lines: int = 0
) -> tuple[float, float]:
    """The ends of the score's axis: all means, and of the bands what is not far beyond them.

    lines: how many saturation points there must be room for.
    """
    means = [p["mean"] for p in points if p["mean"] is not None]
    bands = [v for c in curves if c["response"] for k in ("low", "high") for v in c["response"][k]]
    if not means:
        return 0.0, 1.0
    low, high = min(means), max(means)
    reach = max(high - low, 0.02)
    low, high = max(low - reach, min([low, *bands])), min(high + reach, max([high, *bands]))
    gap = 0.06 * (high - low)
    low, high = max(0.0, low - gap), min(1.0, high + gap)
    share = SATURATION * (lines + 1) if lines else 0.0
    return low - share / (1 - share) * (high - low), high


def saturates(curve: dict[str, Any]) -> bool:
    return curve["response"] is not None and curve["response"]["saturation_point"] is not None


def ratio_figure(chosen: Sequence[Panel], metric: str) -> Figure:
    """All panels, two in a row; one panel fills the figure."""
    from matplotlib.figure import Figure

    columns = min(2, max(1, len(chosen)))
    rows = max(1, -(-len(chosen) // columns))
    with style():
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.3), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for ax, panel in zip(axes.flat, chosen, strict=False):
            draw_panel(ax, panel, metric)
        for ax in axes.flat[len(chosen) :]:
            ax.set_axis_off()
        key: dict[str, Any] = {}
        for ax in axes.flat:
            key |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
        if key:
            figure.legend(
                key.values(),
                key.keys(),
                loc="outside upper center",
                ncol=min(len(key), 3 if columns == 1 else 5),
            )
        settle(figure)
    return figure


def draw_panel(ax: Axes, panel: Panel, metric: str) -> None:
    """Means with intervals, curves with bands, and below, on a line of its own for each arm, the
    saturation point with its interval.
    """
    ratios = sorted({p["reached"] for p in panel.points})
    _score_axis(ax, panel.ends)
    _ratio_axis(ax, ratios)
    ax.set(title=panel.title, xlabel="images added for each real one", ylabel=NAMES[metric])
    ax.grid(axis="y")
    _whiskers(ax, [p for p in panel.points if p["arm"] == "real"], LOOKS["real"][0], "o", 0.0, True)
    lines = 0
    for i, curve in enumerate(panel.curves):
        of, at = look(curve), STEP * (i - (len(panel.curves) - 1) / 2)
        mine = [p for p in panel.points if p["variant"] == curve["variant"]]
        _line(ax, curve, [p for p in panel.points if p["arm"] == "real"] + mine, of)
        _whiskers(ax, mine, of.color, of.marker, at, of.line == "-")
        if saturates(curve):
            lines += 1
            _saturation_point(ax, curve["response"], of.color, SATURATION * (lines - 0.25))


def _score_axis(ax: Axes, ends: tuple[float, float]) -> None:
    """No tick below 0, where there may be room for saturation points."""
    if ends[0] == ends[1]:  # every score the same
        ends = ends[0] - 0.01, ends[1] + 0.01
    ax.set_ylim(*ends)
    ax.set_yticks([t for t in ax.get_yticks() if max(0.0, ends[0]) <= t <= ends[1]])
    ax.set_ylim(*ends)


def _ratio_axis(ax: Axes, ratios: Sequence[float]) -> None:
    """Logarithmic above the least ratio, straight below it, so that 0 has a place; a tick at every
    ratio that has room.
    """
    least = min((d for d in ratios if d > 0), default=1.0)
    most = max([*ratios, least])
    ax.set_xscale("symlog", linthresh=least, linscale=0.5, base=10)
    ax.set_xlim(-0.28 * least, most * (1.5 if most > 3 * least else 1.15))
    place = ax.transData.transform
    room = place([(most, 0)])[0][0] - place([(0, 0)])[0][0]
    shown: list[float] = []
    for d in ratios:
        if not shown or place([(d, 0)])[0][0] - place([(shown[-1], 0)])[0][0] > 0.1 * room:
            shown.append(d)
    ax.set_xticks(shown, [f"{d:.3g}" for d in shown])
    ax.set_xticks([], minor=True)


def _line(ax: Axes, curve: dict[str, Any], points: Sequence[dict[str, Any]], of: Look) -> None:
    """The fitted curve and its band; where there is none, or scores do not follow it, the means are
    joined, thinly.
    """
    r = curve["response"]
    ax.plot(
        [],
        [],
        label=curve["variant"],
        marker=of.marker,
        markersize=4.5,
        markeredgecolor=of.color,
        markerfacecolor=of.color if of.line == "-" else "white",
        color=of.color,
        linestyle=of.line,
    )
    if r is not None and r["kind"] != "misfit":
        ax.fill_between(r["grid"], r["low"], r["high"], color=of.color, alpha=0.10, linewidth=0)
        for end in ("low", "high"):  # a band stays told where others lie over it
            ax.plot(r["grid"], r[end], color=of.color, alpha=0.35, linewidth=0.6)
        ax.plot(r["grid"], r["middle"], color=of.color, linestyle=of.line, linewidth=1.7)
        return
    at = sorted((p["reached"], p["mean"]) for p in points)
    ax.plot(
        [x for x, _ in at], [y for _, y in at], color=of.color, linestyle=of.line, linewidth=0.7
    )


def _whiskers(
    ax: Axes, points: Sequence[dict[str, Any]], color: str, marker: str, shift: float, full: bool
) -> None:
    """Means and intervals, `shift` points to the right of their ratio."""
    from matplotlib.transforms import ScaledTranslation

    where = ax.transData + ScaledTranslation(shift / 72, 0, ax.figure.dpi_scale_trans)
    for p in points:
        if p["low"] is not None:
            ax.plot(
                [p["reached"]] * 2,
                [p["low"], p["high"]],
                color=color,
                linewidth=0.9,
                alpha=0.55,
                transform=where,
            )
        face = color if full else "white"
        ax.plot(
            [p["reached"]],
            [p["mean"]],
            marker,
            color=color,
            markerfacecolor=face,
            markersize=4.5,
            transform=where,
            zorder=3,
        )


def _saturation_point(ax: Axes, response: dict[str, Any], color: str, height: float) -> None:
    """Draw a saturation point with its interval, and a mark on the curve.

    height: where its line lies, as a share of the panel's height.
    """
    where = ax.get_xaxis_transform()
    low, saturation, high = (
        response[k] for k in ("saturation_low", "saturation_point", "saturation_high")
    )
    ends, at = [low, high], float(np.interp(saturation, response["grid"], response["middle"]))
    ax.plot(ends, [height] * 2, c=color, lw=2.2, transform=where, solid_capstyle="butt")
    mark = partial(ax.plot, [saturation], marker="d", markersize=8, zorder=4)
    mark([height], color=color, markeredgecolor="white", transform=where)
    mark([at], color="white", markeredgecolor=color, markeredgewidth=1.6)


# ---- score against real images -------------------------------------------------------------------


def learning_figure(known: dict[str, Any]) -> Figure:
    """Real images alone by their number, and beside each cell what its arms score, a larger mark
    for a larger ratio.

    Cells have places of one width: true to scale, two of nearly as many images would lie over each
    other.
    """
    from matplotlib.figure import Figure

    real, metric = known["real"], known["what"]["metric"]
    counts = sorted(
        {_count(p): title(p["cell"]) for p in known["points"] if p["mean"] is not None}.items()
    )
    place = {n: i for i, (n, _) in enumerate(counts)}
    variants = list({c["variant"]: c for c in known["curves"]}.values())
    with style():
        figure = Figure(figsize=(9.2, 4.4), layout="constrained")
        ax = figure.subplots()
        ax.set(
            xlabel="real images in training, of all classes (not to scale)", ylabel=NAMES[metric]
        )
        _score_axis(ax, limits(known["points"], [{"response": real}]))
        ax.grid(axis="y")
        if real["counts"]:
            at = [place[n] for n in real["counts"]]
            ax.fill_between(at, real["low"], real["high"], color="#000000", alpha=0.09, linewidth=0)
            ax.plot(
                at,
                real["mean"],
                "o-",
                color="#000000",
                linewidth=1.8,
                markersize=5,
                label="real images alone",
            )
        for i, v in enumerate(variants):
            _beside(ax, known, v, place, 0.8 * (i + 1) / (len(variants) + 1))
        ax.set_xlim(-0.25, max(1, len(counts)) - 0.1)
        ax.set_xticks(range(len(counts)), [f"{n:,}\n{name}" for n, name in counts])
        if known["curves"]:
            figure.legend(loc="outside upper center", ncol=min(4, 1 + len(variants)))
        settle(figure)
    return figure


def _count(point: dict[str, Any]) -> int:
    return int(point["real"] + point["mined"])


def _beside(
    ax: Axes, known: dict[str, Any], variant: dict[str, Any], place: dict[int, int], shift: float
) -> None:
    of, ratios = look(variant), [r for r in known["what"]["ratios"] if r]
    face = of.color if of.line == "-" else "white"
    mark = partial(
        ax.plot, marker=of.marker, color=of.color, markerfacecolor=face, linestyle="none"
    )
    mark([], [], label=variant["variant"], markersize=5)
    for p in known["points"]:
        if p["variant"] == variant["variant"] and p["mean"] is not None:
            size = 3.0 + 3.5 * (ratios.index(p["ratio"]) + 1) / len(ratios)
            at = place[_count(p)] + shift
            mark([at], [p["mean"]], markersize=size, markeredgewidth=0.8, zorder=3)
