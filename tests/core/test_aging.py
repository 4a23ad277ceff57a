"""Nobody waits for ever, and nobody flips."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.core.aging import AgingLimits, Promotions, overdue, with_aging
from flowprefill_sglang.core.candidate import Candidate, Standing
from flowprefill_sglang.core.policies import POLICIES, Policy, feasible, srpt
from flowprefill_testing.single_machine import Decide, Job, draw, serve

LIMITS = AgingLimits(max_wait_s=60.0, max_suspend_s=30.0)
AT_ONCE = AgingLimits(max_wait_s=60.0, max_suspend_s=30.0, max_share=1.0)


def aged(policy: Policy, limits: AgingLimits) -> Decide:
    """A whole round: promote, then ask."""
    promotions, decide = Promotions(limits, now=0.0), with_aging(policy)

    def round_(candidates: Sequence[Candidate], now: float) -> list[Candidate]:
        promotions.promote(candidates, now)
        return decide(candidates, now)

    return round_


def waiting(key: int, arrived_at: float, **more: object) -> Candidate:
    given = {"deadline_at": arrived_at + 1.0, "remaining_s": 1.0} | more
    return Candidate(key=key, arrived_at=arrived_at, **given)


class TestOverdue:
    def test_older_than_the_limit_in_order_of_arrival(self) -> None:
        candidates = [waiting(3, 39.9), waiting(2, 40.0), waiting(1, 10.0), waiting(0, 90.0)]
        assert [one.key for one in overdue(candidates, 100.0, LIMITS)] == [1, 3]

    @pytest.mark.parametrize(
        ("objective_s", "age_s", "is_overdue"),
        [(1.0, 61.0, True), (inf, 61.0, True), (inf, 59.0, False), (100.0, 61.0, False), (100.0, 101.0, True)],
    )
    def test_a_promise_longer_than_the_limit_takes_its_place(
        self, objective_s: float, age_s: float, is_overdue: bool
    ) -> None:
        candidate = waiting(0, 0.0, deadline_at=objective_s)
        assert (overdue([candidate], age_s, LIMITS) == [candidate]) is is_overdue

    def test_suspended_for_too_long(self) -> None:
        short, long = waiting(0, 0.0, suspended_at=10.0), waiting(1, 0.0, suspended_at=9.0)
        assert overdue([short, long], 40.0, LIMITS) == [long]

    def test_each_only_once(self) -> None:
        assert overdue([waiting(0, 0.0, is_promoted=True)], 100.0, LIMITS) == []


class TestPromotions:
    def test_the_count_is_of_the_new_ones(self) -> None:
        candidates = [waiting(0, 0.0), waiting(1, 1.0), waiting(2, 50.0)]
        promotions = Promotions(AT_ONCE, now=0.0)
        assert promotions.promote(candidates, 70.0) == 2
        assert promotions.promote(candidates, 71.0) == 0
        assert [one.is_promoted for one in candidates] == [True, True, False]

    def test_the_budget(self) -> None:
        """Credit starts full, at a twentieth of a minute: 3 s. It may be overdrawn by one, and is earned back."""
        promotions = Promotions(AgingLimits(max_wait_s=60.0, max_share=0.05), now=0.0)
        candidates = [waiting(key, float(key), remaining_s=2.0) for key in range(4)]
        assert promotions.promote(candidates, 100.0) == 2
        assert promotions.promote(candidates, 119.0) == 0
        assert promotions.promote(candidates, 121.0) == 1
        assert [one.is_promoted for one in candidates] == [True, True, True, False]

    @pytest.mark.parametrize(
        "wrong", [{"max_wait_s": 0.0}, {"max_suspend_s": -1.0}, {"max_share": 0.0}, {"max_share": 2}]
    )
    def test_nonsense_is_refused(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError):
            AgingLimits(**wrong)


class TestWithAging:
    def test_the_promoted_go_first_by_arrival_and_the_policy_orders_the_others(self) -> None:
        promoted = [
            waiting(1, 5.0, is_promoted=True, remaining_s=9.0),
            waiting(0, 3.0, is_promoted=True, deadline_at=inf),
        ]
        others = [waiting(2, 0.0, remaining_s=2.0), waiting(3, 1.0, remaining_s=1.0)]
        candidates = sorted(promoted + others, key=Candidate.order)
        assert [one.key for one in with_aging(srpt)(candidates, 100.0)] == [0, 1, 3, 2]

    def test_a_task_promoted_for_its_suspension_is_not_suspended_again_at_once(self) -> None:
        """Once it runs, it is not suspended any more; that must not be the end of its promotion."""
        task = waiting(0, 0.0, remaining_s=20.0, standing=Standing.SUSPENDED, suspended_at=1.0)
        decide = aged(feasible, LIMITS)
        urgent = waiting(1, 31.5, deadline_at=33.0, remaining_s=0.25)
        assert decide([task, urgent], 30.5)[0] is urgent
        assert decide([task, urgent], 31.5)[0] is task
        task.standing, task.suspended_at = Standing.RUNNING, None
        assert decide([task, waiting(2, 32.0, deadline_at=34.0, remaining_s=0.25)], 32.0)[0] is task


@pytest.mark.parametrize("policy", [feasible, srpt], ids=["feasible", "srpt"])
def test_a_long_request_under_a_stream_of_short_ones(policy: Policy) -> None:
    """The stream alone takes all of the time. Without aging the long one is last; with it, it runs at its limit in one
    piece."""
    stream = [Job(arrived_at=0.125 * index, work_s=0.125, objective_s=0.25) for index in range(1200)]
    jobs = [Job(arrived_at=0.0, work_s=10.0, objective_s=6.0), *stream]
    assert serve(jobs, policy).served[0].ended_at == pytest.approx(160.0)
    for limits in (LIMITS, AT_ONCE):
        run = serve(jobs, aged(policy, limits))
        assert run.served[0].ended_at == pytest.approx(70.0, abs=0.25)


def worst_case_s(jobs: Sequence[Job], limits: AgingLimits) -> list[float]:
    """The module's bound for each job, from the work that was there when it arrived."""
    longest_s = max(job.work_s for job in jobs)
    bounds, at, backlog_s = [], 0.0, 0.0
    for job in jobs:
        backlog_s = max(0.0, backlog_s - (job.arrived_at - at)) + job.work_s
        at = job.arrived_at
        limit_s = limits.max_wait_s if job.objective_s == inf else max(limits.max_wait_s, job.objective_s)
        bounds.append(limit_s + (backlog_s + longest_s) / limits.max_share + longest_s + backlog_s)
    return bounds


sixteenths = st.integers(1, 40).map(lambda count: count / 16)
arrivals = st.lists(
    st.builds(lambda gap_s, work_s, objective_s: (gap_s, work_s, objective_s),
              st.integers(0, 24).map(lambda count: count / 16), sixteenths, sixteenths | st.just(inf) | st.just(8.0)),
    min_size=1, max_size=40,
)  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@given(arrivals=arrivals, share=st.sampled_from([0.125, 0.5, 1.0]), max_suspend_s=st.sampled_from([0.5, 2.0, 100.0]))
def test_whatever_arrives_each_request_ends_within_the_bound(
    policy: Policy, arrivals: list[tuple[float, float, float]], share: float, max_suspend_s: float
) -> None:
    jobs, at = [], 0.0
    for gap_s, work_s, objective_s in arrivals:
        at += gap_s
        jobs.append(Job(arrived_at=at, work_s=work_s, objective_s=objective_s))
    limits = AgingLimits(max_wait_s=4.0, max_suspend_s=max_suspend_s, max_share=share)
    run = serve(jobs, aged(policy, limits))
    for one, bound_s in zip(run.served, worst_case_s(jobs, limits), strict=True):
        assert one.ttft_s <= bound_s + 1e-6


@pytest.mark.parametrize("share", [0.125, 1.0])
def test_the_bound_binds(share: float) -> None:
    """The same pattern that breaks the bound without aging keeps it with aging."""
    stream = [Job(arrived_at=0.125 * index, work_s=0.125, objective_s=0.25) for index in range(1000)]
    jobs = [Job(arrived_at=0.0, work_s=2.0, objective_s=0.5), *stream]
    limits = AgingLimits(max_wait_s=4.0, max_share=share)
    bound_s = worst_case_s(jobs, limits)[0]
    assert serve(jobs, feasible).served[0].ttft_s > bound_s
    assert serve(jobs, aged(feasible, limits)).served[0].ttft_s <= bound_s


def test_lasting_overload_does_not_turn_into_first_come_first_served() -> None:
    """Why promotions have a budget. With everything overdue promoted at once, what is late makes all the rest late."""
    workloads = [draw(seed, load=1.2, count=2000) for seed in range(2)]

    def attainment(decide: Sequence[Decide]) -> float:
        return mean(serve(jobs, one).attainment for jobs, one in zip(workloads, decide, strict=True))

    never = attainment([feasible, feasible])
    budgeted = attainment([aged(feasible, LIMITS), aged(feasible, LIMITS)])
    at_once = attainment([aged(feasible, AT_ONCE), aged(feasible, AT_ONCE)])
    assert never > 0.95
    assert budgeted > 0.9
    assert at_once < 0.5
