from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from flowprefill_sglang.bench.timeline_panels import (
    Panel,
    RequestMarks,
    TaskRow,
    Window,
    longest_prompt,
    panel,
    recorded_requests,
    timeline_on,
    with_facts,
)
from flowprefill_sglang.observe.events import (
    Event,
    Outcome,
    RequestArrived,
    RequestEnded,
    TaskFinished,
    TaskPreempted,
    TaskResumed,
    TaskStarted,
)
from flowprefill_sglang.observe.recording import Recording
from flowprefill_sglang.observe.timeline import Segment


def marks(number: int, **changes: object) -> RequestMarks:
    fields = {"slo_class": "text", "tokens": 100, "arrived_at": float(number), "deadline_at": number + 0.5}
    return RequestMarks(number=number, **fields | {"first_token_at": number + 0.1} | changes)


def task(*requests: RequestMarks, segments: Sequence[tuple[float, float, bool]] = ()) -> TaskRow:
    return TaskRow(
        requests=requests, segments=tuple(Segment(start_at=a, end_at=b, is_running=r) for a, b, r in segments)
    )


def arrived(rid: str, at: float, objective_s: float = 1.0, tokens: int = 10) -> RequestArrived:
    return RequestArrived(at=at, rid=rid, tokens=tokens, slo_class="text", received_at=at, deadline_at=at + objective_s)


def started(task: int, rids: str, at: float) -> TaskStarted:
    numbers = {"new_tokens": 10, "cached_tokens": 0, "predicted_s": 0.1, "deadline_at": math.inf}
    return TaskStarted(at=at, task=task, rids=rids.split(), **numbers)


def finished(task: int, rids: str, at: float) -> TaskFinished:
    return TaskFinished(
        at=at, task=task, rids=rids.split(), new_tokens=10, executed_s=0.1, predicted_s=0.1, preemptions=0
    )


def ended(rid: str, at: float, outcome: Outcome = Outcome.PREFILLED) -> RequestEnded:
    return RequestEnded(at=at, rid=rid, outcome=outcome, slo_class="text", first_token_s=0.1, is_in_time=True)


def recording(*events: Event) -> Recording:
    """A worker whose clock read 100 when the time of day was 1,100."""
    return Recording(worker="w", monotonic_now=100.0, unix_now=1_100.0, events=list(events))


def read(*events: Event) -> Panel:
    timeline = timeline_on(recording(*events), zero_unix_at=1_010.0)
    return panel("panel", [timeline], recorded_requests([timeline]))


PREEMPTION = (
    arrived("long", 11.0, objective_s=3, tokens=9_000),
    started(1, "long", 11.0),
    arrived("short", 12.0),
    TaskPreempted(at=12.1, task=1, rids=["long"], victim_class="text", by_class="text", blocking_s=0.1),
    started(2, "short", 12.1),
    finished(2, "short", 12.3),
    ended("short", 12.3),
    TaskResumed(at=12.3, task=1, rids=["long"], suspended_s=0.2),
    finished(1, "long", 15.0),
    ended("long", 15.0),
)


def test_a_preemption_on_the_panels_axis() -> None:
    long, short = read(*PREEMPTION).tasks
    assert [(s.start_at, s.end_at, s.is_running) for s in long.segments] == [
        (pytest.approx(1.0), pytest.approx(2.1), True),
        (pytest.approx(2.1), pytest.approx(2.3), False),
        (pytest.approx(2.3), pytest.approx(5.0), True),
    ]
    assert list(long.preempted_at()) == [pytest.approx(2.1)]
    assert list(short.preempted_at()) == []
    assert (long.requests[0].number, long.requests[0].is_late) == (1, True)
    assert (short.requests[0].number, short.requests[0].is_late) == (2, False)
    assert long.requests[0].deadline_at == pytest.approx(4.0)


def test_chunks_of_one_prompt_share_a_row() -> None:
    (row,) = read(
        arrived("a", 11.0),
        started(1, "a", 11.0),
        finished(1, "a", 12.0),
        started(2, "a", 13.0),
        finished(2, "a", 14.0),
        ended("a", 14.0),
    ).tasks
    assert [(s.start_at, s.end_at) for s in row.segments] == [(1, 2), (3, 4)]
    assert list(row.preempted_at()) == [], "a pause between chunks is no preemption"


def test_a_chunk_that_shares_a_batch_is_seen_in_both_and_its_deadline_where_it_fell() -> None:
    first, second = read(
        arrived("a", 11.0, objective_s=1.5),
        arrived("b", 11.5, objective_s=5),
        started(1, "a", 11.0),
        finished(1, "a", 12.0),
        started(2, "a b", 12.0),
        finished(2, "a b", 14.0),
    ).tasks
    assert [(m.number, m.chunk, m.chunks) for m in first.requests] == [(1, 1, 2)]
    assert [(m.number, m.chunk, m.chunks) for m in second.requests] == [(1, 2, 2), (2, 1, 1)]
    assert [m.shows_deadline for m in (*first.requests, *second.requests)] == [False, True, True]
    early = read(arrived("a", 11.0, objective_s=0.5), arrived("b", 11.5), *(
        started(1, "a", 11.0), finished(1, "a", 12.0), started(2, "a b", 12.0), finished(2, "a b", 14.0)
    ))  # fmt: skip
    assert [m.shows_deadline for t in early.tasks for m in t.requests if m.number == 1] == [True, False]


def test_what_waits_has_a_row_and_what_was_lost_has_none() -> None:
    seen = read(
        arrived("waits", 11.0),
        arrived("aborted", 12.0),
        ended("aborted", 13.0, Outcome.ABORTED),
        arrived("lost its task", 14.0),
        ended("lost its task", 15.0),
    )
    waits, aborted = seen.tasks
    assert (waits.requests[0].number, waits.segments, waits.end_at) == (1, (), math.inf)
    assert (aborted.requests[0].number, aborted.end_at) == (2, 3)
    assert not aborted.requests[0].is_late


def test_requests_that_are_not_asked_for_are_left_out() -> None:
    timeline = timeline_on(recording(*PREEMPTION), zero_unix_at=1_010.0)
    requests = {"short": recorded_requests([timeline])["short"]}
    assert [len(t.requests) for t in panel("panel", [timeline], requests).tasks] == [1]


def test_rows_are_in_the_order_of_their_start() -> None:
    seen = read(
        arrived("a", 11.0),
        arrived("b", 11.1),
        started(1, "b", 11.2),
        finished(1, "b", 11.3),
        started(2, "a", 11.3),
        finished(2, "a", 11.4),
    )
    assert [t.requests[0].number for t in seen.tasks] == [2, 1]
    waiting = read(arrived("waits", 10.5), arrived("b", 11.1), started(1, "b", 11.2), finished(1, "b", 11.3))
    assert [t.requests[0].number for t in waiting.tasks] == [1, 2], "what waits, by its arrival"


def test_a_window_shows_what_waits_or_runs_in_it() -> None:
    whole = Panel(title="", tasks=(task(marks(1), segments=[(3, 4, True)]), task(marks(9), segments=[(9, 9.2, True)])))
    numbers = [
        [t.requests[0].number for t in whole.within(Window(start_at=a, end_at=b)).tasks]
        for a, b in ((0, 0.5), (1.5, 2), (3.5, 5), (4, 8), (0, 10))
    ]
    assert numbers == [[], [1], [1], [], [1, 9]]


def test_a_window_before_a_batch_shows_those_of_it_that_have_come() -> None:
    batch = task(marks(1), marks(5), segments=[(6, 7, True)])
    whole = Panel(title="", tasks=(batch,))
    assert [m.number for t in whole.within(Window(start_at=2, end_at=4)).tasks for m in t.requests] == [1]
    assert [m.number for t in whole.within(Window(start_at=2, end_at=6.5)).tasks for m in t.requests] == [1, 5]


def test_titles_count_what_is_shown() -> None:
    one = read(*PREEMPTION)
    window = Window(start_at=0, end_at=6)
    (titled,) = with_facts([one], window)
    assert titled.title == (
        "panel: 1 preemption, 1 of 2 requests late; of 1 that came during the prefill of #1, 0 late"
    )
    longest = longest_prompt([one], window)
    assert longest is not None
    assert longest.tokens == 9_000
    assert longest_prompt([one], Window(start_at=5.5, end_at=6)) is None, "its prefill has ended by then"
    assert (
        longest_prompt([one, Panel(title="", tasks=(task(marks(2), segments=[(1, 2, True)]),))], window)
        == (one.tasks[1].requests[0])
    )
    assert with_facts([Panel(title="empty", tasks=())], window)[0].title == "empty: 0 preemptions, 0 of 0 requests late"
