"""The same load under two prefill schedulers: numbers beside each other, as a table, as sentences and as JSON. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from flowprefill_sglang.bench.experiment import Result
from flowprefill_sglang.bench.probe import EngineSettings
from flowprefill_sglang.bench.report import ClassReport, Report, percentile, to_document
from flowprefill_sglang.bench.timeline_panels import Panel, RequestMarks, panel, timeline_on
from flowprefill_sglang.observe.events import TaskPreempted
from flowprefill_sglang.observe.recording import Recording

UNEVEN_RATIO = 1.25
"""Repeated medians on a quiet machine stay well below."""
NAMES = {"flowprefill": "FlowPrefill", "stock": "stock SGLang"}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One scheduler's run."""

    scheduler: str
    """A key of ``NAMES``, or what else the server is called."""
    result: Result
    recordings: Sequence[Recording]
    """Of its prefill workers, of the whole run or longer."""
    engine: EngineSettings | None = None

    @property
    def name(self) -> str:
        """For people."""
        return NAMES.get(self.scheduler, self.scheduler)

    @property
    def preemptions(self) -> int:
        """Suspensions of running tasks during the run."""
        return sum(
            isinstance(event, TaskPreempted) and self._since_start_s(recording, event.at) >= 0
            for recording in self.recordings
            for event in recording.events
        )

    @property
    def busy_share(self) -> float:
        """Part of the run that its prefill workers spent in forward passes; ``nan`` when they recorded nothing."""
        wall_s = self.result.report.wall_s
        running = [
            max(0.0, min(segment.end_at, wall_s) - max(segment.start_at, 0.0))
            for recording in self.recordings
            for lane in timeline_on(recording, self.result.started_unix_at).lanes
            for segment in lane.segments
            if segment.is_running
        ]
        return sum(running) / (wall_s * len(self.recordings)) if running and wall_s > 0 else math.nan

    def after_prefill_ms(self) -> list[float]:
        """Of each complete answer whose prefill was recorded: from the prefill's end to the client's first token."""
        return [
            1_000 * (request.first_token_at - task.end_at)
            for task in self.panel().tasks
            if task.segments and task.segments[-1].is_running  # else its end was not recorded
            for request in task.requests
            if request.first_token_at is not None and request.chunk == request.chunks
        ]

    def panel(self) -> Panel:
        """Its timeline, in seconds since the start of the load, with the client's own view of who was late."""
        timelines = [timeline_on(recording, self.result.started_unix_at) for recording in self.recordings]
        return panel(self.name, timelines, self._marks())

    def _marks(self) -> dict[str, RequestMarks]:
        objectives = self.result.prepared.objectives
        return {
            record.rid: RequestMarks(
                number=number,
                slo_class=record.class_name,
                tokens=record.input_tokens,
                arrived_at=record.sent_at,
                deadline_at=record.sent_at + objectives[record.class_name].slo_ms / 1_000,
                first_token_at=record.first_token_at if record.error is None else None,
                gave_up_at=None if record.error is None else record.finished_at,
            )
            for number, record in enumerate(self.result.records, start=1)
        }

    def _since_start_s(self, recording: Recording, at: float) -> float:
        return at + recording.unix_now - recording.monotonic_now - self.result.started_unix_at


def comparison_table(one: Contestant, other: Contestant) -> Table:
    """Each cell holds both runs' numbers, ``one``'s first."""
    table = Table(
        title=f"Time to first token in ms: {one.name} | {other.name}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for heading in ("class", "sent", "SLO", "p50", "p90", "p99", "in time"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    reports = one.result.report, other.result.report
    pairs = {c.name: (c, _class_of(reports[1], c.name)) for c in reports[0].classes}
    columns = [
        _pairs([(_ms(getattr(a, key)), _ms(getattr(b, key))) for a, b in pairs.values()])
        for key in ("ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms")
    ]
    totals = (_percent(reports[0].attainment), _percent(reports[1].attainment))
    attained = _pairs([*((_percent(a.attainment), _percent(b.attainment)) for a, b in pairs.values()), totals])
    for row, (name, (a, _)) in enumerate(pairs.items()):
        table.add_row(name, str(a.count), _ms(a.slo_ms), *(column[row] for column in columns), attained[row])
    table.add_section()
    table.add_row("all", str(reports[0].requests), "", "", "", "", attained[-1])
    return table


def facts(one: Contestant, other: Contestant) -> str:
    """What was measured, in a sentence or two."""
    reports = one.result.report, other.result.report
    count = f"Of the same {reports[0].requests} requests, "
    met = f"{reports[0].attained} had their first token in time under {one.name} and {reports[1].attained} under "
    preempted = f"{one.name} suspended running prefills {one.preemptions} times"
    return f"{count}{met}{other.name}; {preempted}, {other.name} {other.preemptions} times."


def unevenness(one: Contestant, other: Contestant) -> str | None:
    """A warning when single requests took another time in one run than in the other; None when they did not.

    The machine was then not the same for both, or one scheduler costs time even when nothing contends.
    """
    measured = [contestant.result.prepared.isolated_ttft_s for contestant in (one, other)]
    ratios = [median(measured[0][name]) / median(measured[1][name]) for name in measured[0] if name in measured[1]]
    if not ratios or max(median(ratios), 1 / median(ratios)) < UNEVEN_RATIO:
        return None
    return (
        f"single requests took {median(ratios):.2f} times as long in {one.name}'s run as in {other.name}'s: this "
        "machine was not equally free in both, or one of them costs time even when nothing contends"
    )


def outline(contestant: Contestant) -> str:
    """One run as a whole, in a sentence."""
    report, busy = contestant.result.report, contestant.busy_share
    workers = ""
    if not math.isnan(busy):
        p50_ms, p99_ms = (percentile(contestant.after_prefill_ms(), percent) for percent in (50, 99))
        workers = (
            f"; prefill workers computed {100 * busy:.0f}% of the time, and the first token came {_ms(p50_ms)} ms "
            f"(p50), {_ms(p99_ms)} ms (p99) after the end of the prefill"
        )
    return (
        f"{report.succeeded} of {report.requests} requests succeeded in {report.wall_s:.1f} s, "
        f"{report.attained / report.wall_s:.2f} per second within their objective{workers}"
    )


def comparison_document(contestants: Sequence[Contestant], timeline: str | None) -> dict[str, Any]:
    """The first run's document, with all runs' numbers under ``schedulers``."""
    return contestants[0].result.to_document() | {
        "schedulers": {c.scheduler: _scheduler_document(c) for c in contestants},
        "timeline": timeline,
    }


def _scheduler_document(contestant: Contestant) -> dict[str, Any]:
    result = contestant.result
    busy, after_prefill_ms = contestant.busy_share, contestant.after_prefill_ms()
    percentiles = {f"p{percent}": percentile(after_prefill_ms, percent) for percent in (50, 90, 99)}
    return to_document(result.report, result.prepared.objectives) | {
        "preemptions": contestant.preemptions,
        "busy_share": None if math.isnan(busy) else round(busy, 4),
        "after_prefill_ms": {key: round(value, 2) for key, value in percentiles.items() if not math.isnan(value)},
        "events_lost": sum(recording.lost for recording in contestant.recordings),
        "isolated_ttft_ms": {
            name: [round(1_000 * ttft_s, 2) for ttft_s in measured]
            for name, measured in result.prepared.isolated_ttft_s.items()
        },
        "engine": asdict(contestant.engine) if contestant.engine else None,
        "records": [asdict(record) for record in result.records],
    }


def _class_of(report: Report, name: str) -> ClassReport:
    return next(c for c in report.classes if c.name == name)


def _pairs(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """``a | b`` with the bars of a column below each other."""
    widths = [max(len(pair[side]) for pair in pairs) for side in (0, 1)]
    return [f"{a:>{widths[0]}} | {b:>{widths[1]}}" for a, b in pairs]


def _ms(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.0f}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f}%"
