"""Every policy by one suite, then each for what it promises."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import inf
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.core.aging import with_aging
from flowprefill_sglang.core.candidate import Candidate, Standing
from flowprefill_sglang.core.policies import (
    DEFAULT_POLICY,
    POLICIES,
    Policy,
    edf,
    fcfs,
    feasible,
    on_time_first,
    sedf,
    split_on_time,
    srpt,
)
from flowprefill_testing.single_machine import Job, draw, serve

ALL = {**POLICIES, **{f"aged {name}": with_aging(policy) for name, policy in POLICIES.items()}}
every_policy = pytest.mark.parametrize("policy", ALL.values(), ids=ALL.keys())


def queue(*candidates: Candidate) -> list[Candidate]:
    return sorted(candidates, key=Candidate.order)


def waiting(key: int, deadline_at: float, remaining_s: float, arrived_at: float = 0.0, **more: object) -> Candidate:
    return Candidate(key=key, arrived_at=arrived_at, deadline_at=deadline_at, remaining_s=remaining_s, **more)


def keys(candidates: Sequence[Candidate]) -> list[int]:
    return [candidate.key for candidate in candidates]


# Quarters of seconds are exact in binary, so no test depends on rounding; a small range makes ties common.
quarters = st.integers(0, 24).map(lambda quarter: quarter / 4)


@st.composite
def queues(draw: st.DrawFn, max_size: int = 12) -> list[Candidate]:
    candidates = []
    for key in range(draw(st.integers(0, max_size))):
        arrived_at, standing = draw(quarters), draw(st.sampled_from(Standing))
        candidates.append(
            Candidate(
                key=key,
                arrived_at=arrived_at,
                deadline_at=draw(quarters.map(lambda objective_s, at=arrived_at: at + objective_s) | st.just(inf)),
                remaining_s=draw(quarters),
                priority=draw(st.integers(-1, 1)),
                standing=standing,
                suspended_at=arrived_at if standing is Standing.SUSPENDED else None,
                is_promoted=draw(st.booleans()),
            )
        )
    return queue(*candidates)


class TestEveryPolicy:
    @every_policy
    @given(candidates=queues(), now=quarters)
    def test_it_returns_each_once_and_always_the_same(
        self, policy: Policy, candidates: list[Candidate], now: float
    ) -> None:
        before = keys(candidates)
        order = policy(candidates, now)
        assert sorted(keys(order)) == sorted(before)
        assert order == policy(candidates, now), "the same question has the same answer"
        order.clear()
        assert keys(candidates) == before, "the scheduler's list is not the policy's to change"

    @every_policy
    @given(candidates=queues(), now=quarters)
    def test_it_does_not_depend_on_the_zero_of_the_clock(
        self, policy: Policy, candidates: list[Candidate], now: float
    ) -> None:
        order = keys(policy(candidates, now))
        for candidate in candidates:
            candidate.arrived_at -= 100
            candidate.deadline_at -= 100
        assert keys(policy(candidates, now - 100)) == order

    @every_policy
    @given(candidates=queues(), now=quarters)
    def test_the_head_is_who_would_be_chosen_again_after_running(
        self, policy: Policy, candidates: list[Candidate], now: float
    ) -> None:
        """Without an arrival no preemption: running on and asking again changes nothing."""
        if not candidates:
            return
        head = policy(candidates, now)[0]
        head.standing, head.suspended_at = Standing.RUNNING, None
        ran_s = head.remaining_s / 2
        head.remaining_s -= ran_s
        assert policy(candidates, now + ran_s)[0] is head

    @every_policy
    def test_priority_breaks_ties_and_only_ties(self, policy: Policy) -> None:
        low, high = waiting(0, 9.0, 1.0, priority=0), waiting(1, 9.0, 1.0, priority=5)
        assert keys(policy(queue(low, high), 0.0)) == [1, 0]
        urgent = waiting(2, 1.0, 0.5, arrived_at=-1.0, priority=-5)
        assert keys(policy(queue(low, high, urgent), 0.0)) == [2, 1, 0]

    @every_policy
    def test_of_equals_the_first_to_arrive_goes_first(self, policy: Policy) -> None:
        same = [waiting(key, 5.0, 1.0) for key in range(8)]
        assert keys(policy(queue(*same), 0.0)) == list(range(8))
        assert sorted(keys(policy(queue(*same), 9.0))) == list(range(8))

    @every_policy
    def test_nothing_to_choose_from(self, policy: Policy) -> None:
        assert policy([], 0.0) == []

    @every_policy
    def test_work_is_conserved(self, policy: Policy) -> None:
        jobs = draw(seed=7, load=1.2, count=200)
        run = serve(jobs, policy)
        assert run.busy_s == pytest.approx(sum(job.work_s for job in jobs))
        free_at = 0.0
        for job in jobs:
            free_at = max(free_at, job.arrived_at) + job.work_s
        assert max(one.ended_at for one in run.served) == pytest.approx(free_at), "it never idles with work at hand"
        assert all(one.ttft_s >= one.job.work_s - 1e-9 for one in run.served)

    def test_the_default_is_one_of_them(self) -> None:
        assert POLICIES[DEFAULT_POLICY] is feasible


def test_fcfs_goes_by_arrival() -> None:
    candidates = queue(waiting(0, 9.0, 1.0, arrived_at=2.0), waiting(1, inf, 9.0, arrived_at=1.0))
    assert keys(fcfs(candidates, 3.0)) == [1, 0]


def test_edf_goes_by_deadline_however_late() -> None:
    candidates = queue(waiting(0, inf, 0.1), waiting(1, 1.0, 9.0), waiting(2, 5.0, 1.0))
    assert keys(edf(candidates, 3.0)) == [1, 2, 0]


class TestSedf:
    def test_late_ones_go_last_and_among_them_the_latest_deadline_first(self) -> None:
        late = [waiting(0, 1.0, 2.0), waiting(1, 2.0, 3.0), waiting(2, 3.0, 4.0)]
        on_time = [waiting(3, 4.0, 0.5), waiting(4, inf, 50.0)]
        assert keys(sedf(queue(*late, *on_time), 0.0)) == [3, 4, 2, 1, 0]

    def test_equals_keep_their_order_among_the_late(self) -> None:
        late = [waiting(key, 1.0, 2.0, priority=priority) for key, priority in enumerate([0, 0, 1])]
        assert keys(sedf(queue(*late), 0.0)) == [2, 0, 1]

    def test_slack_of_zero_is_on_time(self) -> None:
        assert keys(sedf(queue(waiting(0, 1.0, 2.0), waiting(1, 3.0, 3.0), waiting(2, 4.0, 1.0)), 0.0)) == [1, 2, 0]

    @given(candidates=queues())
    def test_it_is_the_papers_formula(self, candidates: list[Candidate]) -> None:
        now = 0.125  # no slack is zero then, and no deadline is at the clock's zero

        def quotient(candidate: Candidate) -> float:
            return (1 if candidate.slack_s(now) > 0 else -1) / (candidate.deadline_at + 1)

        quotients = [quotient(candidate) for candidate in sedf(candidates, now)]
        assert quotients == sorted(quotients, reverse=True)


class TestSrpt:
    def test_shortest_first(self) -> None:
        assert keys(srpt(queue(waiting(0, 1.0, 3.0), waiting(1, 2.0, 1.0), waiting(2, inf, 2.0)), 0.0)) == [1, 2, 0]

    def test_of_equals_one_that_holds_memory_goes_first(self) -> None:
        started = waiting(1, 9.0, 1.0, standing=Standing.RUNNING)
        assert keys(srpt(queue(waiting(0, 1.0, 1.0), started), 0.0)) == [1, 0]


def can_all_be_on_time(candidates: Sequence[Candidate], now: float) -> bool:
    """Earliest deadline first finds an order if there is one."""
    finish_at = now
    for candidate in sorted(candidates, key=Candidate.order):
        finish_at += candidate.remaining_s
        if finish_at > candidate.deadline_at:
            return False
    return True


def most_on_time(candidates: Sequence[Candidate], now: float) -> int:
    """By looking at every subset."""
    for size in range(len(candidates), 0, -1):
        if any(can_all_be_on_time(some, now) for some in itertools.combinations(candidates, size)):
            return size
    return 0


class TestFeasible:
    @given(candidates=queues(max_size=9), now=quarters)
    def test_the_set_is_on_time_and_none_is_larger(self, candidates: list[Candidate], now: float) -> None:
        on_time, rest = split_on_time(candidates, now)
        assert can_all_be_on_time(on_time, now)
        assert len(on_time) == most_on_time(candidates, now)
        assert on_time == queue(*on_time)
        assert rest == queue(*rest)
        assert sorted(keys(on_time + rest)) == sorted(keys(candidates))

    @given(candidates=queues(), now=quarters)
    def test_served_in_its_order_as_many_are_on_time(self, candidates: list[Candidate], now: float) -> None:
        finish_at, met = now, 0
        for candidate in feasible(candidates, now):
            finish_at += candidate.remaining_s
            met += finish_at <= candidate.deadline_at
        assert met >= len(split_on_time(candidates, now)[0])

    def test_the_longest_is_given_up_and_goes_after_the_others_by_length(self) -> None:
        candidates = queue(waiting(0, 2.0, 2.0), waiting(1, 2.5, 1.0), waiting(2, 3.0, 1.0), waiting(3, 0.5, 0.75))
        assert keys(feasible(candidates, 0.0)) == [1, 2, 3, 0]

    def test_the_others_are_in_deadline_order_whenever_they_were_given_up(self) -> None:
        candidates = queue(waiting(0, 2.0, 2.0), waiting(1, 3.0, 2.5), waiting(2, 3.5, 1.75))
        assert [keys(part) for part in split_on_time(candidates, 0.0)] == [[2], [0, 1]]

    def test_the_others_go_shortest_first(self) -> None:
        late = [waiting(key, -1.0 - key, remaining_s) for key, remaining_s in enumerate([3.0, 1.0, 2.0])]
        assert keys(feasible(queue(*late), 0.0)) == [1, 2, 0]

    def test_no_deadline_is_on_time_anyway_and_goes_by_length(self) -> None:
        candidates = queue(waiting(0, inf, 1.0), waiting(1, inf, 9.0), waiting(2, 0.0, 2.0), waiting(3, 50.0, 30.0))
        assert keys(feasible(candidates, 0.0)) == [3, 0, 2, 1]

    def test_a_task_of_several_is_given_up_after_a_shorter_one_that_is_longer_for_each(self) -> None:
        batch = waiting(0, 10, 6, promises=3)
        single = waiting(1, 10, 5)
        assert keys(feasible(queue(batch, single), 0)) == [0, 1]
        assert keys(feasible(queue(waiting(0, 10, 6), single), 0)) == [1, 0]

    def test_what_is_given_up_makes_room_for_all_that_it_took(self) -> None:
        """A task's whole time, not its time for each request."""
        batch = waiting(0, 12, 10, promises=2)  # 5 for each: the longest
        on_time, dropped = split_on_time(queue(batch, waiting(1, 13, 4), waiting(2, 14, 4)), 0)
        assert (keys(on_time), keys(dropped)) == ([1, 2], [0])

    def test_of_equally_long_ones_a_started_one_is_kept(self) -> None:
        started = waiting(0, 1.0, 1.0, standing=Standing.SUSPENDED)
        assert keys(feasible(queue(started, waiting(1, 1.5, 1.0)), 0.0)) == [0, 1]

    def test_of_equally_long_ones_the_one_with_most_room_is_kept(self) -> None:
        assert keys(feasible(queue(waiting(0, 1.0, 1.0), waiting(1, 1.5, 1.0)), 0.0)) == [1, 0]

    def test_of_equals_the_higher_priority_is_kept(self) -> None:
        same = [waiting(key, 2.0, 1.0, priority=key) for key in range(4)]
        assert keys(split_on_time(queue(*same), 0.0)[0]) == [3, 2]


class TestSetAside:
    """Of the time until its deadline, what a candidate leaves to shorter ones to come."""

    def test_where_not_all_can_be_on_time_those_that_will_be_in_spite_of_arrivals_go_first(self) -> None:
        """Alone each could be on time; the long one is due first, and has hardly a chance if more short ones come."""
        long = waiting(0, 10.0, 9.0, set_aside=0.2)
        short = [waiting(1, 10.5, 1.0), waiting(2, 20.0, 1.0)]
        too_long = waiting(3, 10.0, 9.5, set_aside=0.2)
        assert keys(feasible(queue(long, *short, too_long), 0.0)) == [1, 2, 0, 3]
        long.set_aside = 0.0
        assert keys(feasible(queue(long, *short, too_long), 0.0)) == [0, 1, 2, 3]

    def test_where_all_can_be_on_time_nothing_is_set_aside(self) -> None:
        assert keys(feasible(queue(waiting(0, 10.0, 9.0, set_aside=0.9), waiting(1, 12.0, 1.0)), 0.0)) == [0, 1]

    def test_who_may_be_on_time_goes_before_who_cannot(self) -> None:
        candidates = queue(waiting(0, 10.0, 9.0, set_aside=0.9), waiting(1, 5.0, 6.0), waiting(2, 4.0, 7.0))
        assert keys(feasible(candidates, 0.0)) == [0, 1, 2]

    @given(candidates=queues(), now=quarters, data=st.data())
    def test_each_once_whatever_is_set_aside(
        self, candidates: list[Candidate], now: float, data: st.DataObject
    ) -> None:
        for candidate in candidates:
            candidate.set_aside = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
        order = feasible(candidates, now)
        assert sorted(keys(order)) == sorted(keys(candidates))
        finish_at = now
        for candidate in order:  # who begins the order is on time
            finish_at += candidate.remaining_s
            if candidate.deadline_at < finish_at:
                break
        else:
            return
        if split_on_time([one for one in candidates if one.deadline_at < inf], now)[0]:
            assert order[0].deadline_at - now >= order[0].remaining_s


def test_at_overload_feasible_keeps_more_promises_than_sedf_and_sedf_than_edf() -> None:
    def attainment(policy: Policy) -> float:
        return mean(serve(draw(seed, load=1.8, count=800), policy).attainment for seed in range(5))

    measured = {name: attainment(policy) for name, policy in POLICIES.items()}
    assert measured["feasible"] > measured["sedf"] > measured["srpt"] > measured["edf"], measured
    assert measured["feasible"] > 0.9 > 0.1 > measured["edf"], measured


def test_the_short_one_does_not_wait_for_the_long_one() -> None:
    long, short = Job(arrived_at=0.0, work_s=5.0, objective_s=6.0), Job(arrived_at=1.0, work_s=0.125, objective_s=0.25)
    run = serve([long, short], feasible)
    assert run.attainment == 1.0
    assert run.preemptions == 1
    assert [one.ended_at for one in run.served] == [5.125, 1.125]


def test_a_ranking_begins_with_those_on_time() -> None:
    first, second, late, behind = (waiting(key, due, 1.0) for key, due in enumerate((1.0, 2.0, 2.5, 9.0)))
    assert keys(list(on_time_first([first, second, late, behind], 0.0))) == [0, 1]
    assert keys(list(on_time_first([first, second], 0.5))) == []
    assert keys(list(on_time_first([waiting(4, inf, 5.0), late], 0.0))) == [4]
