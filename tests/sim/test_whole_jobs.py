"""Whole jobs only: against brute force, and against the linear program."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowprefill_sglang.sim import whole_jobs
from flowprefill_sglang.sim.bound import most_in_time
from flowprefill_sglang.sim.intervals import Intervals, Job
from flowprefill_sglang.sim.whole_jobs import bracket

# Quarters of seconds are exact in binary, so no comparison depends on rounding.
quarters = st.integers(0, 16).map(lambda quarter: quarter / 4)
jobs = st.builds(
    lambda at, window, work: Job(released_at=at, deadline_at=at + window + 0.25, work_s=work, alone_s=work),
    quarters,
    quarters,
    st.integers(1, 8).map(lambda quarter: quarter / 4),
)


def can_all_be_in_time(jobs: Sequence[Job]) -> bool:
    """On one preemptive machine: no interval is asked for more than it has."""
    return all(
        sum(j.work_s for j in jobs if start <= j.released_at and j.deadline_at <= end) <= end - start
        for start in {j.released_at for j in jobs}
        for end in {j.deadline_at for j in jobs}
        if start < end
    )


def most_by_brute_force(jobs: Sequence[Job]) -> int:
    return max(
        size
        for size in range(len(jobs) + 1)
        for chosen in itertools.combinations(jobs, size)
        if can_all_be_in_time(chosen)
    )


def job(released_at: float, deadline_at: float, work_s: float) -> Job:
    return Job(released_at=released_at, deadline_at=deadline_at, work_s=work_s, alone_s=work_s)


@settings(max_examples=200)
@given(st.lists(jobs, max_size=9))
def test_it_is_the_best_there_is(some: list[Job]) -> None:
    pytest.importorskip("scipy")  # comes with SGLang
    found = bracket(Intervals(some), 10.0)
    assert found.least == found.most == most_by_brute_force(some)
    assert can_all_be_in_time([some[number] for number in found.chosen])


@given(st.lists(jobs, max_size=9))
def test_without_time_it_is_on_both_sides_of_the_best(some: list[Job]) -> None:
    found = bracket(Intervals(some), 0.0)
    assert found.least <= most_by_brute_force(some) <= found.most <= most_in_time(some) + 1e-6
    assert can_all_be_in_time([some[number] for number in found.chosen])


def test_without_scipy_it_is_the_greedys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_jobs, "optimize", None)
    found = bracket(Intervals([job(0.0, 1.0, 0.5), job(0.0, 1.0, 0.5), job(0.0, 1.0, 0.75)]), 10.0)
    assert (found.least, found.most) == (2, 2)


def test_parts_of_jobs_do_not_add_up() -> None:
    """Three separate seconds, in each of which one of two jobs fits and half of the other: the linear program has five
    jobs where three fit."""
    pytest.importorskip("scipy")
    some = [job(at, at + 1.0, work_s) for at in (0.0, 2.0, 4.0) for work_s in (0.625, 0.75)]
    assert most_in_time(some) == pytest.approx(3 * 1.5)
    assert bracket(Intervals(some), 0.0).most == 4
    assert bracket(Intervals(some), 10.0).most == 3


def test_the_shortest_first_is_not_always_best() -> None:
    """The short one lies across the other two and lets neither fit."""
    pytest.importorskip("scipy")
    some = [job(0.0, 2.0, 2.0), job(1.5, 2.5, 1.0), job(2.0, 4.0, 2.0)]
    assert bracket(Intervals(some), 0.0).least == 1
    assert bracket(Intervals(some), 10.0).chosen == {0, 2}


def test_jobs_that_no_window_holds_are_in_no_set() -> None:
    some = [job(0.0, 1.0, 2.0), job(0.0, 3.0, 1.0)]
    assert bracket(Intervals(some), 0.0).chosen == {1}
    assert bracket(Intervals([some[0]]), 1.0).most == 0


def test_workers_share_the_jobs() -> None:
    some = [job(0.0, 1.0, 0.75) for _ in range(4)]
    assert bracket(Intervals(some, 1), 0.0).most == 1
    assert bracket(Intervals(some, 3), 0.0).most == 4
