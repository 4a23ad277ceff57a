"""Which seconds of a long recording to draw. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

from flowprefill_sglang.bench.timeline_panels import Panel, Window

WINDOW_LENGTHS_S = (15.0, 12.0, 10.0, 8.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.25)
"""Longest first. Fifteen seconds across a page is where a prefill of 50 ms is still seen."""


def most_telling_window(panels: Sequence[Panel], *, max_rows: int) -> Window:
    """The window with the most preemptions that shows at most ``max_rows`` rows in each panel.

    Among equals the one with the most late requests, then with the most requests, then the longest. When even the
    shortest window has too many rows, that one. Panels without tasks give a second that shows nothing.
    """
    tallies = [_Tally(p) for p in panels]
    begins = sorted({task.begin_of(m) for p in panels for task in p.tasks for m in task.requests})
    best: tuple[tuple[int, int, int, float], Window] | None = None
    for length_s in WINDOW_LENGTHS_S:
        for begin_at in begins:
            window = Window(start_at=begin_at - length_s / 50, end_at=begin_at + length_s * 49 / 50)
            rows = [tally.rows.within(window) for tally in tallies]
            if max(rows) > max_rows and length_s != WINDOW_LENGTHS_S[-1]:
                continue
            preemptions = sum(tally.preemptions.within(window) for tally in tallies)
            score = (preemptions, sum(tally.late.within(window) for tally in tallies), sum(rows), length_s)
            if best is None or score > best[0]:
                best = (score, window)
    return _trimmed(best[1], panels) if best else Window(start_at=0.0, end_at=1.0)


def _trimmed(window: Window, panels: Sequence[Panel]) -> Window:
    """Without the time after the last thing that happened."""
    happened = [segment.end_at for p in panels for task in p.tasks for segment in task.segments]
    happened += [m.arrived_at for p in panels for task in p.tasks for m in task.requests]
    margin_s = (window.end_at - window.start_at) / 50
    return replace(window, end_at=min(window.end_at, max(happened) + margin_s))


class _Tally:
    """What a panel shows in any window, counted fast."""

    def __init__(self, panel: Panel) -> None:
        rows = [(task.begin_of(m), task.end_at, m) for task in panel.tasks for m in task.requests]
        self.rows = _Overlaps([(begin_at, end_at, 1) for begin_at, end_at, _ in rows])
        self.late = _Overlaps([(begin_at, end_at, int(m.is_late)) for begin_at, end_at, m in rows])
        self.preemptions = _Overlaps([(at, at, 1) for task in panel.tasks for at in task.preempted_at()])


class _Overlaps:
    """Weighted intervals, of which those that overlap a window are summed in logarithmic time."""

    def __init__(self, intervals: Sequence[tuple[float, float, int]]) -> None:
        self._begins, self._begun = _cumulated((begin_at, weight) for begin_at, _, weight in intervals)
        self._ends, self._ended = _cumulated((end_at, weight) for _, end_at, weight in intervals)

    def within(self, window: Window) -> int:
        """Weight of the intervals that overlap the window."""
        begun = self._begun[bisect_left(self._begins, window.end_at)]
        return begun - self._ended[bisect_right(self._ends, window.start_at)]


def _cumulated(weighted: Iterable[tuple[float, int]]) -> tuple[list[float], list[int]]:
    """Points in order, and the weight of all before each place in that order."""
    ordered = sorted(weighted)
    return [at for at, _ in ordered], [0, *accumulate(weight for _, weight in ordered)]
