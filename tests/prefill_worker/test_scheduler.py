from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowprefill_sglang.core.aging import AgingLimits
from flowprefill_sglang.core.batching import BatchLimits
from flowprefill_sglang.core.candidate import Standing
from flowprefill_sglang.core.forecast import PART
from flowprefill_sglang.core.prefill_cost import CostModel, Extent, Predictor
from flowprefill_sglang.errors import InternalError
from flowprefill_sglang.prefill_worker.scheduler import PrefillScheduler, Request, Task

SECOND_PER_1000_TOKENS = CostModel(base_s=0.0, short_token_s=0.001, long_token_s=0.001, pair_s=0.0)


def scheduler(policy: str = "feasible", **limits: float) -> PrefillScheduler:
    return PrefillScheduler(
        Predictor(SECOND_PER_1000_TOKENS),
        policy=policy,
        aging=AgingLimits(**limits),
        batching=BatchLimits(),
        now=0.0,
    )


def request(rid: str, tokens: int, *, at: float = 0.0, due: float = 100.0, cached: int = 0) -> Request:
    return Request(rid=rid, slo_class="", new_tokens=tokens, cached_tokens=cached, arrived_at=at, deadline_at=due)


def start(core: PrefillScheduler, *requests: Request, now: float, tokens: int | None = None) -> Task:
    extents = [Extent(tokens or each.new_tokens, each.cached_tokens) for each in requests]
    return core.started(requests, extents, now)


def test_an_urgent_arrival_ranks_before_the_running_task_and_the_task_keeps_what_it_has_done() -> None:
    core = scheduler()
    long, urgent = request("long", 8000, due=60.0), request("urgent", 100, at=1.0, due=1.5)
    core.arrived(long)
    task = start(core, long, now=0.0)
    core.arrived(urgent)
    order = core.ranking(1.0).order
    assert order == [urgent.candidate, task.candidate]
    assert task.candidate.remaining_s == pytest.approx(7.0)
    core.preempted(1.0)
    assert (task.candidate.standing, task.preemptions, core.suspended) == (Standing.SUSPENDED, 1, 1)
    start(core, urgent, now=1.0)
    core.finished(1.1)
    assert core.ranking(1.1).order == [task.candidate]
    assert core.resumed(task, 1.1) == pytest.approx(0.1)
    assert core.finished(8.1).executed_s == pytest.approx(8.0)
    assert core.ranking(8.1).order == []


def test_a_finished_chunk_leaves_its_request_half_prefilled_with_less_to_do() -> None:
    core = scheduler()
    prompt = request("prompt", 3000, cached=500)
    core.arrived(prompt)
    task = start(core, prompt, now=0.0, tokens=1000)
    assert (task.predicted_s, task.rest_s) == (pytest.approx(1.0), pytest.approx(2.0))
    assert list(core.claims()) == [2000]
    core.finished(1.0)
    assert prompt.candidate.standing is Standing.HALF_PREFILLED
    assert (prompt.new_tokens, prompt.cached_tokens) == (2000, 1500)
    assert list(core.claims()) == [2000]
    assert core.first_begun(half_prefilled=False) is None
    assert core.first_begun(half_prefilled=True) is prompt.candidate
    assert core.request_of(prompt.candidate) is prompt


def test_suspended_tasks_end_before_half_prefilled_prompts_go_on() -> None:
    """What the tasks hold may be what the next chunk needs."""
    core = scheduler()
    half, late = request("half", 3000, due=10.0), request("late", 1000, due=100.0)
    core.arrived(half)
    start(core, half, now=0.0, tokens=1000)
    core.finished(1.0)
    core.arrived(late)
    task = start(core, late, now=1.0)
    core.preempted(1.5)
    assert core.first_begun(half_prefilled=True) is task.candidate


def test_a_task_that_outlasts_its_prediction_is_still_taken_for_unfinished() -> None:
    core = scheduler()
    prompt = request("prompt", 1000)
    core.arrived(prompt)
    task = start(core, prompt, now=0.0)
    core.ranking(50.0)
    assert task.candidate.remaining_s == pytest.approx(0.02)


def test_predictions_of_waiting_requests_follow_what_was_measured() -> None:
    core = scheduler()
    first, waiting = request("first", 1000), request("waiting", 1000)
    core.arrived(first)
    core.arrived(waiting)
    start(core, first, now=0.0)
    core.finished(2.0)  # twice as long as predicted
    assert waiting.candidate.remaining_s == pytest.approx(core.predictor.seconds((waiting.extent,)))
    assert waiting.candidate.remaining_s > 1.05


def test_small_requests_share_the_heads_forward_pass_and_large_ones_do_not() -> None:
    core = scheduler()
    small = [request(f"small{i}", 200, due=10.0) for i in range(3)]
    large = request("large", 5000, due=20.0)
    for each in (*small, large):
        core.arrived(each)
    order = core.ranking(0.0).order
    assert order[0] is small[0].candidate
    assert core.batch_of(small[0], order[1:], 0.0, 10_000) == small
    assert core.batch_of(small[0], order[1:], 0.0, 400) == small[:2]


def test_a_long_request_leaves_time_for_short_ones_like_those_that_came_before() -> None:
    """Waiting or begun, by what remains of it; a prompt that goes on in its next chunk is no new arrival."""
    core = scheduler()
    for number in range(100):
        short = request(f"short{number}", 100, at=0.25 * number)
        core.arrived(short)
        core.withdrawn(short)
    long = request("long", 6000, at=25.0, due=60.0)
    core.arrived(long)
    waiting_s = long.candidate.set_aside
    assert waiting_s == pytest.approx(PART * 0.4, rel=0.1)
    task = start(core, long, now=25.0, tokens=3000)
    core.ranking(25.0)
    assert task.candidate.set_aside == waiting_s
    core.finished(28.0)
    assert long.candidate.set_aside == waiting_s
    task = start(core, long, now=28.0)
    core.ranking(30.95)
    assert task.candidate.remaining_s < 0.1
    assert task.candidate.set_aside == 0.0


def test_who_waits_learns_of_what_came_since() -> None:
    core = scheduler()
    long = request("long", 6000, due=60.0)
    core.arrived(long)
    for number in range(100):
        short = request(f"short{number}", 100, at=0.25 * number)
        core.arrived(short)
        core.withdrawn(short)
    assert long.candidate.set_aside == 0.0
    core.ranking(25.0)
    assert long.candidate.set_aside == pytest.approx(PART * 0.4, rel=0.1)


def test_a_promoted_request_keeps_its_place_as_a_task() -> None:
    core = scheduler(max_wait_s=5.0, max_share=1.0)
    old = request("old", 1000, due=1.0)
    core.arrived(old)
    young = request("young", 10, at=6.0, due=6.5)
    core.arrived(young)
    ranking = core.ranking(6.0)
    assert (ranking.order[0], ranking.promoted) == (old.candidate, 1)
    task = start(core, old, now=6.0)
    assert core.ranking(6.2).order[0] is task.candidate
    core.finished(7.0)


def test_two_tasks_cannot_run_at_once() -> None:
    core = scheduler()
    first, second = request("a", 10), request("b", 10)
    core.arrived(first)
    core.arrived(second)
    start(core, first, now=0.0)
    with pytest.raises(InternalError, match="cannot run while"):
        start(core, second, now=0.0)


def test_withdrawn_and_discarded_ones_are_forgotten() -> None:
    core = scheduler()
    waiting, begun = request("waiting", 10), request("begun", 10)
    core.arrived(waiting)
    core.arrived(begun)
    task = start(core, begun, now=0.0)
    core.withdrawn(waiting)
    core.discarded(task, 0.5)
    assert core.ranking(1.0).order == []
    assert (core.running, core.waiting, core.suspended, list(core.claims())) == (None, 0, 0, [])


def test_a_retracted_task_s_requests_wait_as_before_it() -> None:
    core = scheduler("feasible")
    first, second = request("a", 100, at=0.0, due=1.0), request("b", 200, at=0.0, due=2.0)
    core.arrived(first)
    core.arrived(second)
    alone_s = [each.candidate.remaining_s for each in (first, second)]
    task = core.started([first, second], [Extent(100, 0), Extent(200, 0)], 0.0)
    with pytest.raises(InternalError):
        core.retracted(task)  # it runs
    core.preempted(0.1)
    core.retracted(task)
    assert (core.waiting, core.suspended, list(core.claims())) == (2, 0, [])
    assert core.ranking(0.2).order == [first.candidate, second.candidate]
    assert [each.candidate.standing for each in (first, second)] == [Standing.WAITING] * 2
    assert [each.candidate.remaining_s for each in (first, second)] == alone_s


def test_what_has_been_handed_over_in_part_or_is_owed_progress_cannot_be_retracted() -> None:
    core = scheduler("feasible")
    chunked, promoted = request("a", 100, at=0.0, due=1.0), request("b", 200, at=0.0, due=2.0)
    core.arrived(chunked)
    first = start(core, chunked, now=0.0, tokens=50)
    core.preempted(0.1)
    assert first.is_first
    core.resumed(first, 0.1)
    core.finished(0.2)
    second = start(core, chunked, now=0.2)
    core.preempted(0.3)
    core.arrived(promoted)
    owed = start(core, promoted, now=0.3)
    core.preempted(0.4)
    owed.candidate.is_promoted = True
    for task in (second, owed):
        with pytest.raises(InternalError):
            core.retracted(task)


@settings(max_examples=200, deadline=None)
@given(
    policy=st.sampled_from(["fcfs", "edf", "sedf", "srpt", "feasible"]),
    moves=st.lists(
        st.tuples(
            st.sampled_from(["arrive", "run", "preempt", "finish", "chunk", "withdraw", "discard", "retract"]),
            st.integers(0, 9),
        )
    ),
)
def test_any_sequence_of_events_keeps_each_request_in_one_place(policy: str, moves: list[tuple[str, int]]) -> None:
    core = scheduler(policy)
    now, made, alive = 0.0, 0, {}
    for move, pick in moves:
        now += 0.05 * (pick + 1)
        if move == "arrive":
            new = request(f"r{made}", 100 * (pick + 1), at=now, due=now + pick)
            alive[new.rid] = new
            made += 1
            core.arrived(new)
        elif move == "run" and core.running is None and (order := core.ranking(now).order):
            chosen = order[0]
            task = core.task_of(chosen)
            if task is None:
                start(core, core.request_of(chosen), now=now)
            else:
                core.resumed(task, now)
        elif move == "chunk" and core.running is None:
            order = [each for each in core.ranking(now).order if core.task_of(each) is None]
            if order and core.request_of(order[0]).new_tokens > 50:
                start(core, core.request_of(order[0]), now=now, tokens=50)
        elif move == "preempt" and core.running is not None:
            core.preempted(now)
        elif move == "finish" and core.running is not None:
            task = core.finished(now)
            for each in task.requests:
                if each.candidate.standing is not Standing.HALF_PREFILLED:
                    del alive[each.rid]
        elif move == "withdraw":
            waiting = [each for each in core.ranking(now).order if core.task_of(each) is None]
            if waiting:
                gone = core.request_of(waiting[pick % len(waiting)])
                core.withdrawn(gone)
                del alive[gone.rid]
        elif move == "discard" and (tasks := list(core.tasks)):
            task = tasks[pick % len(tasks)]
            core.discarded(task, now)
            for each in task.requests:
                del alive[each.rid]
        elif move == "retract":
            tasks = [t for t in core.tasks if t is not core.running and t.is_first and not t.candidate.is_promoted]
            if tasks:
                core.retracted(tasks[pick % len(tasks)])
        order = core.ranking(now).order
        seen = [core.request_of(each).rid for each in order if core.task_of(each) is None]
        seen += [each.rid for task in core.tasks for each in task.requests]
        assert sorted(seen) == sorted(alive)
        assert sum(each.standing is Standing.RUNNING for each in order) == (core.running is not None)
        assert core.waiting + core.suspended + (core.running is not None) == len(order)
