"""The bound: against a linear-programming solver, against brute force, and against every policy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowprefill_sglang.core.prefill_cost import CostModel, Extent
from flowprefill_sglang.sim.bound import Charges, Job, bound, least_token_s, most_in_time, surely_in_time
from flowprefill_sglang.sim.configuration import parse
from flowprefill_sglang.sim.experiment import Experiment
from flowprefill_sglang.sim.machine import LLAMA_LIKE, Machine
from flowprefill_sglang.workload.trace import TraceRequest

OBJECTIVES_S = {"text": 0.25, "file": 2.0}
CONFIGURATIONS = (
    "feasible",
    "sedf",
    "edf",
    "srpt",
    "feasible@layer",
    "sedf@chunk300",
    "sedf@whole",
    "fcfs",
    "fcfs@chunk300",
    "fcfs@operator",
)

# Quarters of seconds are exact in binary, so no comparison depends on rounding.
quarters = st.integers(0, 16).map(lambda quarter: quarter / 4)
jobs = st.builds(
    lambda at, window, work: Job(released_at=at, deadline_at=at + window + 0.25, work_s=work, alone_s=work),
    quarters,
    quarters,
    st.integers(1, 8).map(lambda quarter: quarter / 4),
)


def linear_program(jobs: Sequence[Job], workers: int) -> float:
    """The same program, all intervals written out, by SciPy's solver."""
    linprog = pytest.importorskip("scipy.optimize").linprog  # comes with SGLang
    possible = [job for job in jobs if job.deadline_at - job.released_at >= job.alone_s]
    if not possible:
        return 0.0
    rows, room = [], []
    for start, end in itertools.product({j.released_at for j in possible}, {j.deadline_at for j in possible}):
        inside = [start <= j.released_at and j.deadline_at <= end for j in possible]
        if any(inside):
            rows.append([j.work_s * is_in for j, is_in in zip(possible, inside, strict=True)])
            room.append(workers * (end - start))
    solved = linprog([-1.0] * len(possible), A_ub=np.array(rows), b_ub=room, bounds=(0, 1))
    return float(-solved.fun)


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


@given(st.lists(jobs, max_size=14), st.integers(1, 3))
def test_it_is_the_linear_programs_value(some: list[Job], workers: int) -> None:
    assert most_in_time(some, workers) == pytest.approx(linear_program(some, workers), abs=1e-6)


@given(st.lists(jobs, max_size=8))
def test_no_schedule_of_one_machine_beats_it(some: list[Job]) -> None:
    most = most_by_brute_force(some)
    assert surely_in_time(some) <= most
    assert most - 1e-9 <= most_in_time(some) <= len(some)


def test_two_that_exclude_each_other_count_as_what_fits() -> None:
    first = Job(released_at=0.0, deadline_at=1.0, work_s=0.75, alone_s=0.75)
    second = Job(released_at=0.0, deadline_at=1.0, work_s=1.0, alone_s=1.0)
    assert most_in_time([first, second]) == 1.25
    assert most_in_time([first, second], workers=2) == 2.0
    assert surely_in_time([first, second]) == 1


def test_a_job_longer_than_its_window_counts_nothing() -> None:
    assert most_in_time([Job(released_at=0.0, deadline_at=1.0, work_s=0.5, alone_s=1.5)]) == 0.0


costs = st.builds(
    CostModel,
    base_s=st.floats(0.0, 0.05),
    request_s=st.floats(0.0, 0.002),
    short_token_s=st.floats(1e-6, 2e-4),
    long_token_s=st.floats(1e-6, 2e-4),
    knee_tokens=st.integers(0, 600),
    pair_s=st.floats(0.0, 1e-8),
)


@given(costs, st.lists(st.integers(1, 900), min_size=1, max_size=8))
def test_what_a_batch_is_charged_is_no_more_than_it_takes(cost: CostModel, lengths: list[int]) -> None:
    charges = Charges(machine=machine(cost), batch_tokens=sum(lengths))
    charged_s = sum(charges.job(request(0.0, tokens), 1.0).work_s for tokens in lengths)
    assert charged_s <= cost.seconds([Extent(tokens) for tokens in lengths]) * (1 + 1e-9)
    assert least_token_s(cost, sum(lengths)) <= least_token_s(cost, max(lengths)) * (1 + 1e-9)


def machine(cost: CostModel) -> Machine:
    return Machine(name="a machine", cost=cost, layers=4, operators=LLAMA_LIKE, handoff_base_s=0.001)


def request(at: float, tokens: int) -> TraceRequest:
    return TraceRequest(
        arrival_s=at, input_tokens=tokens, output_tokens=1, class_name="text" if tokens < 800 else "file"
    )


rows = st.lists(
    st.tuples(st.integers(0, 60), st.one_of(st.integers(1, 799), st.integers(800, 6000))), min_size=2, max_size=14
).map(lambda pairs: tuple(request(at / 16, tokens) for at, tokens in sorted(pairs)))


@pytest.mark.parametrize("name", CONFIGURATIONS)
@settings(max_examples=60)
@given(played=rows, cost=costs, workers=st.integers(1, 3), is_batching=st.booleans())
def test_no_policy_beats_it(
    name: str, played: tuple[TraceRequest, ...], cost: CostModel, workers: int, is_batching: bool
) -> None:
    experiment = Experiment(
        workload=lambda: iter(played),
        machine=machine(cost),
        objectives_s=OBJECTIVES_S,
        workers=workers,
        is_batching=is_batching,
    )
    configuration = parse(name)
    tally = experiment.simulate(configuration, 1.0)
    assert tally.attainment <= experiment.bound([configuration], 1.0, window=5) + 1e-6


def test_windows_add_up() -> None:
    experiment_rows = [request(number / 4, 500) for number in range(8)]
    charges = Charges(
        machine=machine(CostModel(base_s=0.1, short_token_s=0, long_token_s=0, pair_s=0)), batch_tokens=None
    )
    assert bound([experiment_rows[:3], experiment_rows[3:]], OBJECTIVES_S, charges, workers=1) == pytest.approx(1.0)
