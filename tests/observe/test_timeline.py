"""Lanes of whole recordings are what happened; lanes of recordings with holes contradict nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    Trigger,
)
from flowprefill_sglang.observe.timeline import Lane, Segment, Timeline, lanes


def arrived(at: float, rid: str, *, slo_class: str = "text", slo_s: float = 1.0) -> RequestArrived:
    return RequestArrived(
        at=at, rid=rid, tokens=100, slo_class=slo_class, received_at=at - 0.5, deadline_at=at - 0.5 + slo_s
    )


def started(at: float, task: int) -> TaskStarted:
    return TaskStarted(
        at=at, task=task, rids=[f"r{task}"], new_tokens=10 * task, cached_tokens=0, predicted_s=1.0, deadline_at=at + 1
    )


def preempted(at: float, task: int) -> TaskPreempted:
    return TaskPreempted(at=at, task=task, rids=[f"r{task}"], victim_class="a", by_class="b", blocking_s=0.001)


def resumed(at: float, task: int, suspended_s: float) -> TaskResumed:
    return TaskResumed(at=at, task=task, rids=[f"r{task}"], suspended_s=suspended_s)


def retracted(at: float, task: int) -> TaskRetracted:
    return TaskRetracted(at=at, task=task, rids=[f"r{task}"], executed_s=1.0)


def finished(at: float, task: int) -> TaskFinished:
    return TaskFinished(
        at=at, task=task, rids=[f"r{task}"], new_tokens=10 * task, executed_s=1.0, predicted_s=1.0, preemptions=0
    )


def ended(at: float, rid: str, *, is_in_time: bool = True) -> RequestEnded:
    return RequestEnded(
        at=at, rid=rid, outcome=Outcome.PREFILLED, slo_class="text", first_token_s=1.0, is_in_time=is_in_time
    )


ran = {"is_running": True}
waited = {"is_running": False}

WHOLE: Sequence[Event] = [
    arrived(1.0, "r1", slo_class="file", slo_s=6.0),
    started(1.0, 1),
    RoundDone(at=1.0, trigger=Trigger.ARRIVAL, duration_s=0.0, waiting=1, suspended=0),
    arrived(2.0, "r2"),
    preempted(2.0, 1),
    started(2.0, 2),
    finished(3.0, 2),
    ended(3.0, "r2", is_in_time=False),
    resumed(3.0, 1, 1.0),
    finished(5.0, 1),
    ended(5.0, "r1"),
]


def test_a_whole_recording() -> None:
    timeline = lanes(WHOLE)
    assert (timeline.start_at, timeline.end_at) == (1.0, 5.0)
    long, short = timeline.lanes
    assert long.segments == (
        Segment(start_at=1.0, end_at=2.0, **ran),
        Segment(start_at=2.0, end_at=3.0, **waited),
        Segment(start_at=3.0, end_at=5.0, **ran),
    )
    assert (long.task, long.rids, long.slo_class, long.arrived_at, long.deadline_at) == (1, ("r1",), "file", 0.5, 6.5)
    assert (long.new_tokens, long.preemptions, long.is_finished) == (10, 1, True)
    assert short.segments == (Segment(start_at=2.0, end_at=3.0, **ran),)
    first, second = timeline.requests
    assert (first.received_at, first.deadline_at, first.ended_at, first.is_in_time) == (0.5, 6.5, 5.0, True)
    assert (second.rid, second.outcome, second.is_in_time) == ("r2", Outcome.PREFILLED, False)


def test_order_of_the_events_does_not_matter_but_at_one_moment() -> None:
    by_moment = sorted(WHOLE, key=lambda event: -event.at)
    assert lanes(by_moment) == lanes(WHOLE)


def test_nothing_recorded() -> None:
    assert lanes([]) == Timeline(lanes=(), requests=(), start_at=0.0, end_at=0.0)


@pytest.mark.parametrize(
    ("events", "segments"),
    [
        # It ran when the recording began.
        ([arrived(1.0, "x"), finished(2.0, 1)], [(1.0, 2.0, True)]),
        ([arrived(1.0, "x"), preempted(2.0, 1), arrived(3.0, "y")], [(1.0, 2.0, True), (2.0, 3.0, False)]),
        # It was suspended when the recording began; before, nothing is known.
        ([arrived(1.0, "x"), resumed(2.0, 1, 9.0), finished(3.0, 1)], [(1.0, 2.0, False), (2.0, 3.0, True)]),
        ([arrived(1.0, "x"), resumed(2.0, 1, 0.5), finished(3.0, 1)], [(1.5, 2.0, False), (2.0, 3.0, True)]),
        # The recording ends while it runs, or is suspended.
        ([started(1.0, 1), arrived(4.0, "x")], [(1.0, 4.0, True)]),
        ([started(1.0, 1), preempted(2.0, 1), arrived(4.0, "x")], [(1.0, 2.0, True), (2.0, 4.0, False)]),
        # The record of its resumption is lost: since when it ran is unknown.
        ([started(1.0, 1), preempted(2.0, 1), finished(4.0, 1)], [(1.0, 2.0, True), (2.0, 4.0, False)]),
        # The record of another one's start is lost, not that of its end: which of the two ran is unknown.
        ([started(1.0, 1), finished(2.0, 2), finished(3.0, 1)], [(1.0, 3.0, True)]),
        # Aborted while it was suspended and another one ran.
        ([started(1.0, 1), preempted(2.0, 1), started(2.0, 2), ended(3.0, "r1"), finished(4.0, 2)],
         [(1.0, 2.0, True), (2.0, 3.0, False)]),
        # Started over: another task computes its request.
        ([started(1.0, 1), preempted(2.0, 1), retracted(2.5, 1), started(2.5, 2), finished(4.0, 2)],
         [(1.0, 2.0, True), (2.0, 2.5, False)]),
        # The record of its preemption is lost: another one runs, and how long it was suspended is told by its return.
        ([started(1.0, 1), started(2.0, 2), finished(3.0, 2), resumed(4.0, 1, 1.5), finished(5.0, 1)],
         [(1.0, 2.0, True), (2.5, 4.0, False), (4.0, 5.0, True)]),
    ],
)  # fmt: skip
def test_what_is_not_known_is_not_drawn(events: list[Event], segments: list[tuple[float, float, bool]]) -> None:
    lane = next(lane for lane in lanes(events).lanes if lane.task == 1)
    assert [(one.start_at, one.end_at, one.is_running) for one in lane.segments] == segments


def test_a_lane_whose_arrival_was_forgotten() -> None:
    (lane,) = lanes([started(1.0, 1), finished(2.0, 1)]).lanes
    assert (lane.arrived_at, lane.deadline_at, lane.slo_class) == (None, 2.0, "")
    (lane,) = lanes([finished(2.0, 1), ended(2.0, "r1")]).lanes
    assert (lane.arrived_at, lane.deadline_at, lane.slo_class, lane.segments) == (None, None, "text", ())


def test_a_batch_is_drawn_by_its_most_urgent_request_and_its_oldest() -> None:
    late = RequestArrived(at=2, rid="b", tokens=1, slo_class="image", received_at=2.0, deadline_at=2.5)
    early = RequestArrived(at=1, rid="a", tokens=1, slo_class="file", received_at=1.0, deadline_at=math.inf)
    start = TaskStarted(at=3, task=1, rids=["a", "b"], new_tokens=2, cached_tokens=0, predicted_s=1, deadline_at=2.5)
    (lane,) = lanes([early, late, start, finished(4, 1)]).lanes
    assert (lane.arrived_at, lane.deadline_at, lane.slo_class) == (1.0, 2.5, "image")


# ---- any sequence that a scheduler can produce ---------------------------------------------------------------------


@dataclass
class Machine:
    """One device with preemption, driven by draws; it notes itself what happened."""

    now: float = 100.0
    running: int | None = None
    since: float = 0.0
    suspended: dict[int, float] = field(default_factory=dict)
    truth: dict[int, list[tuple[float, float, bool]]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def stop(self) -> int:
        assert self.running is not None
        task, self.running = self.running, None
        self.note(task, self.since, is_running=True)
        return task

    def note(self, task: int, since: float, *, is_running: bool) -> None:
        if self.now > since:
            self.truth.setdefault(task, []).append((since, self.now, is_running))

    def run(self, task: int) -> None:
        self.running, self.since = task, self.now

    def step(self, word: str, after_s: float) -> None:
        self.now += after_s
        if word == "finish" and self.running is not None:
            self.events.append(finished(self.now, self.stop()))
        elif word in ("abandon", "abort") and self.suspended:  # of a suspended task: it ends where it stood
            task = min(self.suspended)
            self.note(task, self.suspended.pop(task), is_running=False)
            self.events.append(finished(self.now, task) if word == "abort" else ended(self.now, f"r{task}"))
        elif word in ("start", "resume"):
            if word == "resume" and not self.suspended:
                return
            if self.running is not None:
                task = self.stop()
                self.events.append(preempted(self.now, task))
                self.suspended[task] = self.now
            if word == "start":
                task = len({event.task for event in self.events if isinstance(event, TaskStarted)})
                self.events.append(started(self.now, task))
            else:
                task = max(self.suspended)
                since = self.suspended.pop(task)
                self.note(task, since, is_running=False)
                self.events.append(resumed(self.now, task, self.now - since))
            self.run(task)


words = st.lists(
    st.tuples(
        st.sampled_from(["start", "start", "finish", "resume", "abort", "abandon"]),
        st.sampled_from([0.0, 0.25, 1.0, 2.0]),
    ),
    max_size=40,
)


def machine_after(steps: list[tuple[str, float]]) -> Machine:
    machine = Machine()
    for word, after_s in steps:
        machine.step(word, after_s)
    return machine


def check_consistency(timeline: Timeline) -> None:
    for lane in timeline.lanes:
        for segment in lane.segments:
            assert timeline.start_at <= segment.start_at < segment.end_at <= timeline.end_at
        assert all(former.end_at <= later.start_at for former, later in pairwise(lane.segments)), lane
    running = sorted((one.start_at, one.end_at) for lane in timeline.lanes for one in lane.segments if one.is_running)
    assert all(former[1] <= later[0] for former, later in pairwise(running)), "one task runs at a time"


@given(words)
def test_any_whole_recording_is_drawn_as_it_was(steps: list[tuple[str, float]]) -> None:
    machine = machine_after(steps)
    timeline = lanes(machine.events)
    check_consistency(timeline)
    if machine.events:  # what goes on after the last event is not in the recording
        machine.now = machine.events[-1].at
        if machine.running is not None:
            machine.stop()
        for task, since in machine.suspended.items():
            machine.note(task, since, is_running=False)
    drawn = {lane.task: _plain(lane) for lane in timeline.lanes if lane.segments}
    assert drawn == machine.truth


@given(words, st.data())
def test_a_recording_with_holes_contradicts_nothing(steps: list[tuple[str, float]], data: st.DataObject) -> None:
    events = machine_after(steps).events
    kept = data.draw(st.lists(st.booleans(), min_size=len(events), max_size=len(events)))
    check_consistency(lanes([event for event, keep in zip(events, kept, strict=True) if keep]))


def _plain(lane: Lane) -> list[tuple[float, float, bool]]:
    return [(one.start_at, one.end_at, one.is_running) for one in lane.segments]
