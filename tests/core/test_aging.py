"""Nobody waits for ever, and nobody flips."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.core.aging import AgingLimits, Claim, Promotions, overdue, with_aging
from flowprefill_sglang.core.candidate import Candidate, Standing
from flowprefill_sglang.core.policies import POLICIES, Policy, feasible, srpt
from flowprefill_testing.single_machine import Decide, Job, aged, draw, serve

LIMITS = AgingLimits(max_wait_s=60.0, max_suspend_s=30.0)
AT_ONCE = AgingLimits(max_wait_s=60.0, max_suspend_s=30.0, max_share=1.0)


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

    def test_the_claim_follows_what_the_promoted_have_had(self) -> None:
        """A twentieth of the time; with a minute's limit the claim to gaps ends 3 s below the one to go first."""
        promotions = Promotions(AgingLimits(max_wait_s=60.0, max_share=0.05), now=0.0)
        candidates = [waiting(0, 0.0)]
        promotions.promote(candidates, 100.0)
        assert promotions.claim is Claim.FIRST
        promotions.ran(1.0)
        assert promotions.claim is Claim.GAP
        promotions.ran(2.0)
        assert promotions.claim is Claim.NONE
        promotions.promote(candidates, 101.0)
        assert promotions.claim is Claim.GAP
        promotions.promote(candidates, 159.0)
        assert promotions.claim is Claim.GAP
        promotions.promote(candidates, 160.0)
        assert promotions.claim is Claim.FIRST

    def test_nothing_is_saved_up_while_nobody_is_promoted(self) -> None:
        promotions = Promotions(AgingLimits(max_wait_s=60.0, max_share=0.5), now=0.0)
        candidates = [waiting(0, 1_000.0)]
        promotions.promote(candidates, 1_000.0)
        promotions.ran(0.25)
        assert promotions.claim is Claim.GAP

    def test_what_was_earned_between_two_events_is_kept(self) -> None:
        """Or whoever waits for an event that comes late would have a smaller share."""
        promotions = Promotions(AgingLimits(max_wait_s=60.0, max_share=0.5), now=0.0)
        candidates = [waiting(0, 0.0)]
        promotions.promote(candidates, 70.0)
        promotions.promote(candidates, 90.0)
        promotions.ran(10.0)
        assert promotions.claim is Claim.FIRST
        promotions.ran(0.25)
        assert promotions.claim is Claim.GAP

    def test_a_debt_is_paid_within_twice_the_limit(self) -> None:
        promotions = Promotions(AgingLimits(max_wait_s=60.0, max_share=0.05), now=0.0)
        candidates = [waiting(0, 0.0)]
        promotions.promote(candidates, 70.0)
        promotions.ran(1_000.0)
        promotions.promote(candidates, 189.0)
        assert promotions.claim is not Claim.FIRST
        promotions.promote(candidates, 190.5)
        assert promotions.claim is Claim.FIRST

    @pytest.mark.parametrize(
        "wrong", [{"max_wait_s": 0.0}, {"max_suspend_s": -1.0}, {"max_share": 0.0}, {"max_share": 2}]
    )
    def test_nonsense_is_refused(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError):
            AgingLimits(**wrong)


class TestWithAging:
    def test_first_means_by_arrival_and_the_policy_orders_the_others(self) -> None:
        promoted = [
            waiting(1, 5.0, is_promoted=True, remaining_s=9.0),
            waiting(0, 3.0, is_promoted=True, deadline_at=inf),
        ]
        others = [waiting(2, 0.0, remaining_s=2.0), waiting(3, 1.0, remaining_s=1.0)]
        candidates = sorted(promoted + others, key=Candidate.order)
        assert [one.key for one in with_aging(srpt)(candidates, 100.0, Claim.FIRST)] == [0, 1, 3, 2]
        assert with_aging(srpt)(candidates, 100.0, Claim.GAP) == srpt(candidates, 100.0)

    def test_without_a_claim_they_go_behind_those_on_time_and_before_the_others(self) -> None:
        late = [
            waiting(0, 0.0, remaining_s=9.0, is_promoted=True),
            waiting(1, 1.0, remaining_s=2.0, is_promoted=True),
            waiting(2, 50.0, remaining_s=0.5),
        ]
        on_time = [waiting(3, 99.0, deadline_at=105.0), waiting(4, 99.0, deadline_at=103.0)]
        candidates = sorted(late + on_time, key=Candidate.order)
        assert [one.key for one in with_aging(feasible)(candidates, 100.0)] == [4, 3, 0, 1, 2]

    @pytest.mark.parametrize(("remaining_s", "is_first"), [(2.0, True), (2.25, False)])
    def test_in_a_gap_the_oldest_goes_first_if_all_of_it_fits(self, remaining_s: float, is_first: bool) -> None:
        """The second of those on time has a slack of 2 s, the first of 9."""
        old = waiting(0, 0.0, remaining_s=remaining_s, is_promoted=True)
        on_time = [waiting(1, 99.0, deadline_at=110.0), waiting(2, 99.0, deadline_at=114.0, remaining_s=11.0)]
        order = with_aging(feasible)(sorted([old, *on_time], key=Candidate.order), 100.0, Claim.GAP)
        assert [one.key for one in order] == ([0, 1, 2] if is_first else [1, 2, 0])

    def test_a_promoted_one_that_is_on_time_keeps_its_place_among_those(self) -> None:
        suspended = waiting(0, 0.0, deadline_at=101.5, is_promoted=True)
        late = waiting(1, 1.0, is_promoted=True)
        order = with_aging(feasible)([late, suspended, waiting(2, 99.0, deadline_at=103.0)], 100.0)
        assert [one.key for one in order] == [0, 2, 1]

    def test_no_deadline_is_not_on_time_before_the_promoted(self) -> None:
        candidates = [waiting(0, 0.0, is_promoted=True, remaining_s=5.0), waiting(1, 99.0, deadline_at=inf)]
        assert [one.key for one in with_aging(feasible)(candidates, 100.0)] == [0, 1]

    def test_a_task_promoted_for_its_suspension_stays_so(self) -> None:
        """Once it runs, it is not suspended any more; that must not be the end of its promotion."""
        task = waiting(0, 0.0, remaining_s=20.0, standing=Standing.SUSPENDED, suspended_at=1.0)
        decide = aged(feasible, AT_ONCE)
        urgent = waiting(1, 31.5, deadline_at=33.0, remaining_s=0.25)
        assert decide([task, urgent], 30.5)[0] is urgent
        assert decide([task, urgent], 31.5)[0] is task
        task.standing, task.suspended_at = Standing.RUNNING, None
        task.remaining_s -= 0.5
        assert decide([task, waiting(2, 32.0, deadline_at=34.0, remaining_s=0.25)], 32.0)[0] is task


@pytest.mark.parametrize("policy", [feasible, srpt], ids=["feasible", "srpt"])
def test_a_long_request_under_a_stream_of_short_ones(policy: Policy) -> None:
    """The stream alone takes all of the time. Without aging the long one is last. With it, its share is all that it
    gets, in slices between the others; with all of the device as its share, it runs at its limit in one piece."""
    stream = [Job(arrived_at=0.125 * index, work_s=0.125, objective_s=0.25) for index in range(1200)]
    jobs = [Job(arrived_at=0.0, work_s=10.0, objective_s=6.0), *stream]
    assert serve(jobs, policy).served[0].ended_at == pytest.approx(160.0)
    fifth = serve(jobs, aged(policy, AgingLimits(max_share=0.2)))
    assert fifth.served[0].ended_at == pytest.approx(60.0 + 10.0 / 0.2, abs=1.0)
    assert serve(jobs, aged(policy, AT_ONCE)).served[0].ended_at == pytest.approx(70.0, abs=0.25)


def test_slices_cost_the_short_ones_what_they_take_and_no_more() -> None:
    """Half of the time is the stream's, and in each of its gaps the long one can go on."""
    stream = [Job(arrived_at=0.25 * index, work_s=0.125, objective_s=0.25) for index in range(600)]
    jobs = [Job(arrived_at=0.0, work_s=100.0, objective_s=6.0), *stream]
    run = serve(jobs, aged(feasible, LIMITS))
    assert sum(one.is_in_time for one in run.served) >= 0.97 * len(stream)


def worst_case_s(jobs: Sequence[Job], limits: AgingLimits) -> list[float]:
    """The module's bound for each job, from the work that was there when it arrived."""
    longest_s = max(job.work_s for job in jobs)
    bounds, at, backlog_s = [], 0.0, 0.0
    for job in jobs:
        backlog_s = max(0.0, backlog_s - (job.arrived_at - at)) + job.work_s
        at = job.arrived_at
        limit_s = limits.max_wait_s if job.objective_s == inf else max(limits.max_wait_s, job.objective_s)
        bounds.append(limit_s + 2 * limits.max_wait_s + backlog_s / limits.max_share + 2 * longest_s)
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
    """Why the promoted have a share. If everything overdue runs first, what is late makes all the rest late."""
    workloads = [draw(seed, load=1.2, count=2000) for seed in range(2)]

    def attainment(decide: Sequence[Decide]) -> float:
        return mean(serve(jobs, one).attainment for jobs, one in zip(workloads, decide, strict=True))

    never = attainment([feasible, feasible])
    shared = attainment([aged(feasible, LIMITS), aged(feasible, LIMITS)])
    at_once = attainment([aged(feasible, AT_ONCE), aged(feasible, AT_ONCE)])
    assert never > 0.95
    assert shared > never - 0.005
    assert at_once < 0.5


def test_in_gaps_they_are_served_by_arrival() -> None:
    """By length, as the policy has it, the longest of those that are late would wait for the end of the overload."""
    jobs = draw(0, load=1.2, count=2000)

    def longest_s(decide: Decide) -> float:
        return max(one.ttft_s for one in serve(jobs, decide).served)

    assert longest_s(aged(feasible, LIMITS)) < 0.8 * longest_s(feasible)
