"""Draws the paper's two figures: attainment against the scale of the objectives, and against the rate.

Needs Matplotlib, the extra "plot", which is imported only when something is drawn.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowprefill_sglang.bench.curves import Curve
from flowprefill_sglang.bench.timeline_plot import COLOURS, GRID, INK, LATE, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SLO_SCALE_FILE, RATE_FILE = "attainment-slo-scale.png", "attainment-rate.png"
SLO_SCALE_LABEL = "scale of every TTFT objective"
RATE_LABEL = "requests per second"
OF_SERIES = ("#d3222a", "#1f6fb4", "#2a9d8f", "#e09f1f", "#7b4fa3", "#8c564b", "#5f7a1f", "#c2588a", "#4b5d73")
"""For curves that are no classes, in their order."""
MARKERS = "osD^vP*X<"
CAPTION_CHARACTERS = 110


def draw_slo_scales(path: Path, curves: Sequence[Curve], target: float, *, title: str, about: str) -> None:
    """Attainment against the objectives' scale. Raises StartupError without Matplotlib, OSError."""
    _draw(path, curves, target, x_label=SLO_SCALE_LABEL, title=title, about=about, own_x=1.0)


def draw_rates(
    path: Path, curves: Sequence[Curve], target: float, *, title: str, about: str, is_logarithmic: bool = False
) -> None:
    """Attainment against the rate. Raises StartupError without Matplotlib, OSError."""
    _draw(path, curves, target, x_label=RATE_LABEL, title=title, about=about, is_logarithmic=is_logarithmic)


def _draw(
    path: Path,
    curves: Sequence[Curve],
    target: float,
    *,
    x_label: str,
    title: str,
    about: str,
    own_x: float | None = None,
    is_logarithmic: bool = False,
) -> None:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.8, 5.0), facecolor="white")
    FigureCanvasAgg(figure)  # not pyplot, whose backend and figures are the process's
    caption = textwrap.fill(about, CAPTION_CHARACTERS)
    axes = figure.add_axes((0.08, 0.15 + 0.035 * caption.count("\n"), 0.65, 0.75 - 0.035 * caption.count("\n")))
    axes.axhline(100 * target, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(f"{100 * target:.0f}%", (1.005, 100 * target), xycoords=("axes fraction", "data"), va="center")
    if own_x is not None:
        axes.axvline(own_x, color=GRID, linewidth=1.6)
    for curve, colour, marker in zip(curves, _colours(curves), itertools.cycle(MARKERS), strict=False):
        _draw_curve(axes, curve, colour, marker)
    if is_logarithmic:
        _set_logarithmic(axes)
    axes.set_ylim(-2, 103)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel("requests within their objective, %", color=INK)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.055, 1.0), frameon=False, fontsize=9.5, labelcolor=INK)
    figure.text(0.012, 0.015, caption, fontsize=8.5, color=INK, va="bottom", linespacing=1.35)
    figure.savefig(path, dpi=130)


def _draw_curve(axes: Axes, curve: Curve, colour: str, marker: str) -> None:
    is_first = curve.name in ("all", "flowprefill")
    axes.plot(
        curve.x,
        [100 * share for share in curve.attainment],
        color=colour,
        marker=marker,
        markersize=4.5,
        linewidth=2.4 if is_first else 1.4,
        zorder=3 if is_first else 2,
        label=curve.name,
    )


def _set_logarithmic(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _colours(curves: Sequence[Curve]) -> list[str]:
    """The classes' own colours with black for all of them; else colours in the curves' order."""
    if any(curve.name in COLOURS for curve in curves):
        others = itertools.cycle(c for c in OF_SERIES if c != LATE and c not in COLOURS.values())
        return [INK if c.name == "all" else COLOURS.get(c.name) or next(others) for c in curves]
    return [colour for _, colour in zip(curves, itertools.cycle(OF_SERIES), strict=False)]
