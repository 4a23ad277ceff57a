"""The picture of the demo: the same seconds of the same load under each scheduler, one panel below the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowprefill_sglang.bench.comparison import Contestant
from flowprefill_sglang.bench.timeline_panels import with_facts
from flowprefill_sglang.bench.timeline_plot import draw_timeline
from flowprefill_sglang.bench.timeline_window import most_telling_window
from flowprefill_sglang.errors import StartupError

MAX_ROWS = 40
"""Requests in a panel: two panels of them can be read on one page."""


def draw_contestants(path: Path, contestants: Sequence[Contestant]) -> str:
    """Draw those whose workers recorded tasks; returns what the picture shows, for people.

    Raises StartupError when there is none, or no Matplotlib, and OSError when the file cannot be written.
    """
    recorded = [contestant for contestant in contestants if any(task.segments for task in contestant.panel().tasks)]
    if not recorded:
        raise StartupError("the prefill workers recorded no tasks")
    panels = [contestant.panel() for contestant in recorded]
    window = most_telling_window(panels, max_rows=MAX_ROWS)
    wall_s = max(contestant.result.report.wall_s for contestant in recorded)
    names = " and under ".join(contestant.name for contestant in recorded)
    shown = f"seconds {max(window.start_at, 0.0):.1f} to {window.end_at:.1f} of {wall_s:.0f}"
    draw_timeline(
        path,
        with_facts(panels, window),
        window,
        title=f"The same requests under {names}" if len(recorded) > 1 else f"Prefill tasks: {names}",
        about=(
            f"Shown: {shown}, the part with the most preemptions that fits {MAX_ROWS} lines a panel. "
            "All times are measured."
        ),
    )
    return f"{shown} under {names}"
