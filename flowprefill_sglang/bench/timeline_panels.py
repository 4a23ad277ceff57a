"""From workers' recordings to the rows of a picture: which task ran when, for which requests, and who was late.

Pure. Times of a panel are seconds on one axis, whatever the clocks of the recordings were.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flowprefill_sglang.observe.events import Outcome
from flowprefill_sglang.observe.recording import Recording
from flowprefill_sglang.observe.timeline import Lane, Segment, Timeline, lanes


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestMarks:
    """One request: when it came, when its first token was due and when it was there."""

    number: int
    """Its place in the order of arrival, from 1: the same request has the same number in every panel."""
    slo_class: str
    tokens: int
    """Of the prompt; 0 when that is not known."""
    arrived_at: float
    deadline_at: float
    """May be infinite."""
    first_token_at: float | None
    """None when there was none, or none yet."""
    gave_up_at: float | None = None
    """When it ended without a first token."""
    chunk: int = 1
    """Which task of the request this is."""
    chunks: int = 1
    """In how many tasks it was computed."""
    shows_deadline: bool = True
    """Whether its deadline is drawn here: on the row of the chunk that the worker was at."""

    @property
    def is_late(self) -> bool:
        """Whether the first token came after its deadline, as far as is known."""
        return self.first_token_at is not None and self.first_token_at > self.deadline_at


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRow:
    """One task, as wide as its time and as high as it has requests."""

    requests: tuple[RequestMarks, ...]
    """In order of arrival, at least one."""
    segments: tuple[Segment, ...]
    """Empty for a request that still waits."""

    @property
    def slo_class(self) -> str:
        """The class of its most urgent request."""
        return min(self.requests, key=lambda request: request.deadline_at).slo_class

    @property
    def start_at(self) -> float:
        """When it began to run; when it arrived, if it did not."""
        return self.segments[0].start_at if self.segments else self.requests[0].arrived_at

    def preempted_at(self) -> Iterator[float]:
        """When it was suspended."""
        return (
            one.end_at
            for one, following in zip(self.segments, self.segments[1:], strict=False)
            if one.is_running and not following.is_running
        )

    def begin_of(self, request: RequestMarks) -> float:
        """When there is something of this request to see here: its arrival, or the start of a later chunk."""
        return min(self.start_at, request.arrived_at) if request.chunk == 1 else self.start_at

    @property
    def end_at(self) -> float:
        """When there is nothing more to see of it but deadlines; infinite for what still waits."""
        if self.segments:
            return self.segments[-1].end_at
        gave_up_at = self.requests[0].gave_up_at
        return math.inf if gave_up_at is None else gave_up_at


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """All tasks of one scheduler, in the order in which they started."""

    title: str
    tasks: tuple[TaskRow, ...]

    def within(self, window: Window) -> Panel:
        """Only what the window shows, deadlines left aside. Of a batch that has not begun by its end, those requests
        that have come."""
        seen = [
            replace(task, requests=tuple(m for m in task.requests if task.begin_of(m) < window.end_at))
            for task in self.tasks
            if task.end_at > window.start_at
        ]
        return replace(self, tasks=tuple(task for task in seen if task.requests))

    def rows(self) -> int:
        """Requests to draw."""
        return sum(len(task.requests) for task in self.tasks)

    def preemptions(self, window: Window) -> int:
        """Suspensions inside the window."""
        return sum(window.start_at <= at <= window.end_at for task in self.tasks for at in task.preempted_at())

    def count_during(self, number: int) -> tuple[int, int] | None:
        """How many requests arrived while that request's prefill was under way, and how many of them were late.

        None when it is not in this panel. Its own tasks' other requests count too.
        """
        own = [task for task in self.tasks if task.segments and any(m.number == number for m in task.requests)]
        if not own:
            return None
        begin_at, end_at = min(task.start_at for task in own), max(task.end_at for task in own)
        marks = {m.number: m for task in self.tasks for m in task.requests if begin_at < m.arrived_at < end_at}
        return len(marks), sum(m.is_late for m in marks.values())

    def late(self) -> int:
        """Requests whose first token was late, each counted once."""
        return len({request.number for task in self.tasks for request in task.requests if request.is_late})

    def requests(self) -> int:
        """Requests, each counted once."""
        return len({request.number for task in self.tasks for request in task.requests})


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A part of the axis."""

    start_at: float
    end_at: float


def panel(title: str, timelines: Sequence[Timeline], requests: Mapping[str, RequestMarks]) -> Panel:
    """The tasks of one scheduler's workers; all times must lie on one axis already.

    Tasks of one chunked prompt share a row. A task none of whose requests is in ``requests`` is left out: it is not
    part of the load that the picture is about. A request without a task, which waits or gave up, has a row of its own.
    """
    chunks: dict[tuple[str, ...], list[Segment]] = {}
    for lane in _by_start(timelines):
        known = tuple(rid for rid in lane.rids if rid in requests)
        if known:
            chunks.setdefault(known, []).extend(lane.segments)
    starts: dict[str, list[float]] = {}
    for rids, segments in chunks.items():
        for rid in rids:
            starts.setdefault(rid, []).append(segments[0].start_at)
    seen: Counter[str] = Counter()
    rows = []
    for rids, segments in chunks.items():
        seen.update(rids)
        marks = [_of_chunk(requests[rid], seen[rid], starts[rid]) for rid in rids]
        rows.append(TaskRow(requests=tuple(sorted(marks, key=lambda m: m.number)), segments=tuple(segments)))
    # One that got its first token without a task had its task's events lost: nothing is known to draw.
    waited = (marks for rid, marks in requests.items() if rid not in seen and marks.first_token_at is None)
    rows += [TaskRow(requests=(marks,), segments=()) for marks in waited]
    return Panel(title=title, tasks=tuple(sorted(rows, key=lambda row: (row.start_at, row.requests[0].number))))


def _of_chunk(request: RequestMarks, chunk: int, starts: Sequence[float]) -> RequestMarks:
    begun = sum(start_at <= request.deadline_at for start_at in starts)
    return replace(request, chunk=chunk, chunks=len(starts), shows_deadline=chunk == max(begun, 1))


def _by_start(timelines: Sequence[Timeline]) -> list[Lane]:
    started = [lane for timeline in timelines for lane in timeline.lanes if lane.segments]
    return sorted(started, key=lambda lane: lane.segments[0].start_at)


def longest_prompt(panels: Sequence[Panel], window: Window) -> RequestMarks | None:
    """The request with the most tokens among those whose prefill is under way in the window in every panel."""
    under_way = [
        {
            m.number: m
            for task in p.tasks
            if task.segments and task.start_at < window.end_at and task.end_at > window.start_at
            for m in task.requests
        }
        for p in panels
    ]
    common = set.intersection(*(set(marks) for marks in under_way)) if under_way else set()
    return max((under_way[0][n] for n in common), key=lambda m: (m.tokens, -m.number), default=None)


def with_facts(panels: Sequence[Panel], window: Window) -> list[Panel]:
    """The panels, with what the window shows of each counted in its title."""
    shown = [p.within(window) for p in panels]
    longest = longest_prompt(panels, window)
    titled = []
    for whole, part in zip(panels, shown, strict=True):
        preemptions = part.preemptions(window)
        title = f"{part.title}: {preemptions} preemption{'' if preemptions == 1 else 's'}"
        title += f", {part.late()} of {part.requests()} requests late"
        during = whole.count_during(longest.number) if longest else None
        if longest and during:
            title += f"; of {during[0]} that came during the prefill of #{longest.number}, {during[1]} late"
        titled.append(replace(whole, title=title))
    return titled


def timeline_on(recording: Recording, zero_unix_at: float) -> Timeline:
    """The recording's lanes on an axis of seconds since ``zero_unix_at``, a time of day in seconds.

    The time of day is what the clocks of several hosts have in common, as far as they are in step.
    """
    offset_s = recording.unix_now - recording.monotonic_now - zero_unix_at
    seen = lanes(recording.events)

    def shifted(at: float | None) -> float | None:
        return None if at is None else at + offset_s

    return Timeline(
        lanes=tuple(
            replace(
                lane,
                arrived_at=shifted(lane.arrived_at),
                deadline_at=shifted(lane.deadline_at),
                segments=tuple(
                    replace(segment, start_at=segment.start_at + offset_s, end_at=segment.end_at + offset_s)
                    for segment in lane.segments
                ),
            )
            for lane in seen.lanes
        ),
        requests=tuple(
            replace(
                request,
                received_at=shifted(request.received_at),
                deadline_at=shifted(request.deadline_at),
                ended_at=shifted(request.ended_at),
            )
            for request in seen.requests
        ),
        start_at=seen.start_at + offset_s,
        end_at=seen.end_at + offset_s,
    )


def recorded_requests(timelines: Iterable[Timeline]) -> dict[str, RequestMarks]:
    """Requests as the workers saw them, by rid: those whose arrival was recorded."""
    spans = [span for timeline in timelines for span in timeline.requests]
    known = {span.rid: span for span in spans if span.received_at is not None and span.deadline_at is not None}
    ordered = sorted(known.values(), key=lambda span: (span.received_at or 0.0, span.rid))
    return {
        span.rid: RequestMarks(
            number=number,
            slo_class=span.slo_class,
            tokens=span.tokens,
            arrived_at=span.received_at or 0.0,
            deadline_at=math.inf if span.deadline_at is None else span.deadline_at,
            first_token_at=span.ended_at if span.outcome is Outcome.PREFILLED else None,
            gave_up_at=None if span.outcome is Outcome.PREFILLED else span.ended_at,
        )
        for number, span in enumerate(ordered, start=1)
    }
