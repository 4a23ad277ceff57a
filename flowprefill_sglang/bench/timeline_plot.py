"""Draws timelines: one lane a task, running and suspended parts, arrivals and deadlines.

Needs Matplotlib, the extra "plot", which is imported only when something is drawn.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowprefill_sglang.bench.timeline_panels import Panel, RequestMarks, TaskRow, Window
from flowprefill_sglang.errors import BadInput, StartupError
from flowprefill_sglang.observe.timeline import Segment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING_MATPLOTLIB = "a picture needs Matplotlib: pip install 'flowprefill-sglang[plot]'"
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")
COLOURS = {"text": "#1f6fb4", "image": "#2a9d8f", "search": "#e09f1f", "file": "#7b4fa3"}
OTHER_COLOURS = ("#8c564b", "#5f7a1f", "#c2588a", "#4b5d73")
"""For classes of the user's own, in the order of their names."""
WAITING, LATE, INK, GRID = "#a9adb3", "#d3222a", "#22262b", "#e6e8eb"
WIDTH_INCHES, ROW_INCHES = 13.0, 0.19
ABOVE_INCHES, BETWEEN_INCHES, BELOW_INCHES = 1.15, 0.62, 1.25
BAR = 0.76
"""Height of a bar, in rows."""
MIN_ROWS = 4
LABEL_POINTS, LABEL_CHARACTER_INCHES = 7.5, 0.0635
CAPTION_CHARACTERS = 176
"""That fill the width at the caption's size."""
HATCH = "//////"
HOW_TO_READ = (
    "How to read it: a lane is one task, the prefill of one prompt, or of several as one batch, in a grey frame with a "
    "line each. A bar is solid while the worker computes, and hatched while the task is suspended: stopped between two "
    "operators, with all that it has computed kept. A thin line is a request that waits for its first operator, red "
    "from its deadline on. #12 is the same request everywhere; /2 is the second chunk of a prompt."
)


def check_suffix(flag: str, path: Path, also: Sequence[str] = ()) -> None:
    """Raise BadInput for a file that is none of the pictures that can be drawn, nor ``also``."""
    known = (*PICTURE_SUFFIXES, *also)
    if path.suffix not in known:
        raise BadInput(f"{flag}: expected a file that ends in {', '.join(known)}, got {path.name!r}")


def require_matplotlib() -> None:
    """Raise StartupError, which says what to install, when nothing can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise StartupError(MISSING_MATPLOTLIB) from error


def draw_timeline(path: Path, panels: Sequence[Panel], window: Window, *, title: str, about: str) -> None:
    """Write the picture of what the panels, one below the other, show in the window; the suffix names the format.

    ``about`` is the first line of the caption. Raises StartupError without Matplotlib, OSError when the file cannot be
    written.
    """
    timeline_figure(panels, window, title=title, about=about).savefig(path, dpi=110)


def timeline_figure(panels: Sequence[Panel], window: Window, *, title: str, about: str) -> Figure:
    """The picture, not written yet. Raises StartupError without Matplotlib."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [panel.within(window) for panel in panels]
    colours = _colours(shown)
    heights = [ROW_INCHES * max(panel.rows(), MIN_ROWS) for panel in shown]
    height = ABOVE_INCHES + sum(heights) + BETWEEN_INCHES * (len(shown) - 1) + BELOW_INCHES
    figure = Figure(figsize=(WIDTH_INCHES, height), facecolor="white")
    FigureCanvasAgg(figure)  # not pyplot, whose backend and figures are the process's
    figure.text(0.012, 1 - 0.16 / height, title, fontsize=16, fontweight="bold", color=INK, va="top")
    longest = max((len(_label(m)) for panel in shown for task in panel.tasks for m in task.requests), default=0)
    left = 0.02 + longest * LABEL_CHARACTER_INCHES / WIDTH_INCHES
    top = height - ABOVE_INCHES
    for panel, panel_height in zip(shown, heights, strict=True):
        axes = figure.add_axes((left, (top - panel_height) / height, 0.988 - left, panel_height / height))
        _draw_panel(axes, panel, window, colours)
        top -= panel_height + BETWEEN_INCHES
    axes.set_xlabel("seconds", fontsize=10, color=INK)
    _draw_legend(figure, colours, height)
    caption = "\n".join(textwrap.fill(text, CAPTION_CHARACTERS) for text in (about, HOW_TO_READ))
    figure.text(0.012, 0.1 / height, caption, fontsize=9.5, color=INK, va="bottom", linespacing=1.4)
    return figure


def _draw_panel(axes: Axes, panel: Panel, window: Window, colours: Mapping[str, str]) -> None:
    axes.set_xlim(window.start_at, window.end_at)
    axes.set_ylim(max(panel.rows(), MIN_ROWS) - 0.4, -0.6)
    axes.set_title(panel.title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=6)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="both", length=0, labelsize=9, colors=INK)
    if not panel.tasks:
        axes.text(0.5, 0.5, "nothing ran", transform=axes.transAxes, ha="center", va="center", color=WAITING)
    row = 0
    for task in panel.tasks:
        _draw_task(axes, task, row, window, colours)
        row += len(task.requests)
    requests = [request for task in panel.tasks for request in task.requests]
    axes.set_yticks(range(row), [_label(request) for request in requests], fontsize=LABEL_POINTS, family="monospace")
    for text, request in zip(axes.get_yticklabels(), requests, strict=True):
        text.set_color(colours[request.slo_class])


def _draw_task(axes: Axes, task: TaskRow, row: int, window: Window, colours: Mapping[str, str]) -> None:
    for segment in task.segments if len(task.requests) > 1 else ():
        block = [(segment.start_at, segment.end_at - segment.start_at)]
        tall = (row - 0.47, len(task.requests) - 0.06)
        axes.broken_barh(block, tall, facecolor="#dfe2e6", edgecolor="#5d636b", linewidth=1.0, zorder=2.2)
    for place, request in enumerate(task.requests, start=row):
        _draw_waiting(axes, request, place, task.start_at if task.segments else min(task.end_at, window.end_at))
        for segment in task.segments:
            _draw_segment(axes, segment, place, colours[request.slo_class])
        if request.shows_deadline:
            _draw_deadline(axes, request, place)


def _draw_segment(axes: Axes, segment: Segment, row: int, colour: str) -> None:
    span, height = [(segment.start_at, segment.end_at - segment.start_at)], (row - BAR / 2, BAR)
    if segment.is_running:  # with an edge, so that a task of a millisecond is seen too
        axes.broken_barh(span, height, facecolor=colour, edgecolor=colour, linewidth=0.8, zorder=3)
    else:
        axes.broken_barh(span, height, facecolor="white", edgecolor=colour, hatch=HATCH, linewidth=0.6, zorder=2.5)


def _draw_waiting(axes: Axes, request: RequestMarks, row: int, start_at: float) -> None:
    if request.chunk > 1:
        return
    late_at = min(start_at, max(request.arrived_at, request.deadline_at))
    axes.hlines(row, request.arrived_at, late_at, color=WAITING, linewidth=1.4, zorder=2)
    if start_at > late_at:
        axes.hlines(row, late_at, start_at, color=LATE, linewidth=1.4, zorder=2)
    axes.plot(request.arrived_at, row, marker=">", markersize=4.5, color=INK, markeredgewidth=0, zorder=4)


def _draw_deadline(axes: Axes, request: RequestMarks, row: int) -> None:
    from matplotlib.patheffects import withStroke

    if not math.isfinite(request.deadline_at):
        return
    colour = LATE if request.is_late else INK
    halo = [withStroke(linewidth=3.2, foreground="white")]  # to be seen on a bar
    axes.vlines(request.deadline_at, row - 0.4, row + 0.4, color=colour, linewidth=1.4, zorder=5, path_effects=halo)
    if request.is_late:
        cross: dict[str, Any] = {"marker": "x", "markersize": 5.5, "markeredgewidth": 1.8}  # arguments of Line2D
        axes.plot(request.deadline_at, row, color=colour, zorder=6, path_effects=halo, **cross)


def _draw_legend(figure: Figure, colours: Mapping[str, str], height: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    mark: dict[str, Any] = {"linestyle": "none"}  # keyword arguments of Line2D
    handles = [
        *(Patch(facecolor=colour, label=f"{name or 'no class'}") for name, colour in colours.items()),
        Patch(facecolor="white", edgecolor="#555a61", hatch=HATCH, label="suspended"),
        Line2D([], [], color=WAITING, linewidth=1.8, label="waiting"),
        Line2D([], [], color=LATE, linewidth=1.8, label="waiting, late"),
        Line2D([], [], marker=">", markersize=6, color=INK, label="arrival", **mark),
        Line2D([], [], marker="|", markersize=10, markeredgewidth=1.6, color=INK, label="deadline, met", **mark),
        Line2D([], [], marker="x", markersize=7, markeredgewidth=2, color=LATE, label="deadline, missed", **mark),
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.006, 1 - 0.46 / height),
        ncols=len(handles),
        fontsize=9.5,
        frameon=False,
        handletextpad=0.5,
        columnspacing=1.4,
        labelcolor=INK,
    )


def _label(request: RequestMarks) -> str:
    chunk = f"/{request.chunk}" if request.chunks > 1 else ""
    tokens = f"{request.tokens:>6,}" if request.tokens else " " * 6
    return f"#{request.number} {request.slo_class}{chunk} {tokens}"


def _colours(panels: Sequence[Panel]) -> dict[str, str]:
    """Of the classes that occur: the paper's in their order, then others by name."""
    found = {request.slo_class for panel in panels for task in panel.tasks for request in task.requests}
    others = zip(sorted(found - set(COLOURS)), itertools.cycle(OTHER_COLOURS), strict=False)
    return {name: colour for name, colour in COLOURS.items() if name in found} | dict(others)
