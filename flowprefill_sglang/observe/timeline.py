"""Events to lanes: who ran when, who waited suspended, when requests came and were due. What a picture is drawn from.

Pure. A recording may begin in the middle of things (the ring forgets its oldest events), end with tasks under way, and
have holes (events are dropped rather than letting the scheduler wait for a reader). What is not known is not drawn: in
any recording a lane's segments do not overlap, and at most one lane runs at any time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from flowprefill_sglang.observe.events import (
    Event,
    Outcome,
    RequestArrived,
    RequestEnded,
    RoundDone,
    TaskFinished,
    TaskPreempted,
    TaskResumed,
    TaskRetracted,
    TaskStarted,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of a task's life."""

    start_at: float
    end_at: float
    is_running: bool
    """Else it was suspended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One task. Times are those of the events: seconds of the worker's monotonic clock."""

    task: int
    rids: tuple[str, ...]
    slo_class: str
    """Of its most urgent request; empty when its arrival was not recorded."""
    arrived_at: float | None
    """Receipt of its oldest request; None when no arrival was recorded."""
    deadline_at: float | None
    """Of its most urgent request, may be infinite; None when neither arrival nor start was recorded."""
    segments: tuple[Segment, ...]
    new_tokens: int
    """Computed by this task; 0 when neither its start nor its end was recorded."""
    preemptions: int
    """Those in the recording."""
    is_finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpan:
    """One request from its receipt to its end."""

    rid: str
    slo_class: str
    tokens: int
    received_at: float | None
    """None when its arrival was not recorded; so is ``deadline_at`` then."""
    deadline_at: float | None
    ended_at: float | None
    """None when it had not ended."""
    outcome: Outcome | None
    is_in_time: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A worker's recording in lanes, by the time that they first appear."""

    lanes: tuple[Lane, ...]
    requests: tuple[RequestSpan, ...]
    start_at: float
    """Time of the first event; 0 when there are none."""
    end_at: float


def lanes(events: Iterable[Event]) -> Timeline:
    """The lanes of a recording; its events may come in any order."""
    ordered = sorted(events, key=lambda event: event.at)  # stable: the order at one moment is the recorded one
    if not ordered:
        return Timeline(lanes=(), requests=(), start_at=0.0, end_at=0.0)
    reader = _Reader(ordered[0].at)
    for event in ordered:
        reader.read(event)
    return reader.timeline(ordered[-1].at)


@dataclass(slots=True)
class _OpenLane:
    task: int
    rids: tuple[str, ...]
    segments: list[Segment] = field(default_factory=list)
    deadline_at: float | None = None
    new_tokens: int = 0
    preemptions: int = 0
    suspended_since: float | None = None
    is_finished: bool = False

    @property
    def known_until(self) -> float | None:
        return self.segments[-1].end_at if self.segments else None


class _Reader:
    def __init__(self, start_at: float) -> None:
        self._start_at = start_at
        self._lanes: dict[int, _OpenLane] = {}
        self._lane_of: dict[str, _OpenLane] = {}  # the latest of a request
        self._arrived: dict[str, RequestArrived] = {}
        self._ended: dict[str, RequestEnded] = {}
        self._running: _OpenLane | None = None
        self._running_since = start_at
        self._idle_since = start_at  # when the device was last known to be given up

    def read(self, event: Event) -> None:
        match event:
            case RequestArrived():
                self._arrived[event.rid] = event
                self._ended.pop(event.rid, None)  # of a former request of that name
            case RequestEnded():
                self._ended[event.rid] = event
                self._give_up(event)
            case TaskStarted():
                lane = self._lane(event)
                lane.new_tokens = event.new_tokens
                lane.deadline_at = event.deadline_at
                self._run(lane, event.at)
            case TaskResumed():
                lane = self._lane(event)
                self._end_suspension(lane, event.at, event.suspended_s)
                self._run(lane, event.at)
            case TaskPreempted():
                lane = self._lane(event)
                self._stop(lane, event.at)
                lane.preemptions += 1
                lane.suspended_since = event.at
            case TaskRetracted():
                self._end_suspension(self._lane(event), event.at)
            case TaskFinished():
                lane = self._lane(event)
                self._finish(lane, event.at)
                lane.new_tokens = event.new_tokens
                lane.is_finished = True
            case RoundDone():
                pass

    def timeline(self, end_at: float) -> Timeline:
        if self._running is not None:
            self._stop(self._running, end_at)
        for lane in self._lanes.values():
            if lane.suspended_since is not None:
                self._add(lane, lane.suspended_since, end_at, is_running=False)
        rids = [*self._arrived, *(rid for rid in self._ended if rid not in self._arrived)]
        return Timeline(
            lanes=tuple(self._closed(lane) for lane in self._lanes.values()),
            requests=tuple(self._span(rid) for rid in rids),
            start_at=self._start_at,
            end_at=end_at,
        )

    def _lane(self, event: TaskStarted | TaskPreempted | TaskResumed | TaskRetracted | TaskFinished) -> _OpenLane:
        lane = self._lanes.get(event.task)
        if lane is None:
            lane = self._lanes[event.task] = _OpenLane(event.task, tuple(event.rids))
            self._lane_of.update(dict.fromkeys(lane.rids, lane))
        return lane

    def _run(self, lane: _OpenLane, at: float) -> None:
        if self._running is not None:  # the record of its stop was lost, and one task runs at a time
            self._stop(self._running, at)
        lane.suspended_since = None
        self._running = lane
        self._running_since = at

    def _stop(self, lane: _OpenLane, at: float) -> None:
        """``lane`` ran until now; since when is unknown if its start was not recorded, and then at the earliest since
        the device was free."""
        if lane is not self._running:
            if self._running is not None:
                self._stop(self._running, at)
            self._running_since = max(self._idle_since, lane.known_until or self._start_at)
            if lane.suspended_since is not None:  # the record of its going on was lost
                self._running_since = at
                self._end_suspension(lane, at)
        self._add(lane, self._running_since, at, is_running=True)
        self._running = None
        self._idle_since = at

    def _finish(self, lane: _OpenLane, at: float) -> None:
        if lane.suspended_since is not None:  # ended where it stood; or its going on was lost, and that is unknown too
            self._end_suspension(lane, at)
        elif lane is self._running or self._running is None:
            self._stop(lane, at)

    def _give_up(self, event: RequestEnded) -> None:
        """A task whose requests were all aborted while it was suspended never goes on."""
        lane = self._lane_of.get(event.rid)
        if lane is not None and lane.suspended_since is not None and all(rid in self._ended for rid in lane.rids):
            self._end_suspension(lane, event.at)

    def _end_suspension(self, lane: _OpenLane, at: float, suspended_s: float = 0.0) -> None:
        since = lane.suspended_since if lane.suspended_since is not None else at - suspended_s
        self._add(lane, max(since, self._start_at, lane.known_until or since), at, is_running=False)
        lane.suspended_since = None

    def _add(self, lane: _OpenLane, start_at: float, end_at: float, *, is_running: bool) -> None:
        if end_at > start_at:
            lane.segments.append(Segment(start_at=start_at, end_at=end_at, is_running=is_running))

    def _closed(self, lane: _OpenLane) -> Lane:
        arrived = [self._arrived[rid] for rid in lane.rids if rid in self._arrived]
        urgent = min(arrived, key=lambda request: request.deadline_at, default=None)
        ended = next((self._ended[rid].slo_class for rid in lane.rids if rid in self._ended), "")
        return Lane(
            task=lane.task,
            rids=lane.rids,
            slo_class=urgent.slo_class if urgent else ended,
            arrived_at=min((request.received_at for request in arrived), default=None),
            deadline_at=lane.deadline_at if urgent is None else urgent.deadline_at,
            segments=tuple(lane.segments),
            new_tokens=lane.new_tokens,
            preemptions=lane.preemptions,
            is_finished=lane.is_finished,
        )

    def _span(self, rid: str) -> RequestSpan:
        arrived, ended = self._arrived.get(rid), self._ended.get(rid)
        return RequestSpan(
            rid=rid,
            slo_class=arrived.slo_class if arrived else self._ended[rid].slo_class,
            tokens=arrived.tokens if arrived else 0,
            received_at=arrived.received_at if arrived else None,
            deadline_at=arrived.deadline_at if arrived else None,
            ended_at=ended.at if ended else None,
            outcome=ended.outcome if ended else None,
            is_in_time=ended.is_in_time if ended else None,
        )
