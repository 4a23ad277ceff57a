"""The bound: against a linear-programming solver, against brute force, and against every policy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowprefill_sglang.core.prefill_cost import CostModel, Extent
from flowprefill_sglang.sim.bound import Charges, bound, largest_batches, least_token_s, most_in_time
from flowprefill_sglang.sim.configuration import parse
from flowprefill_sglang.sim.experiment import Experiment
from flowprefill_sglang.sim.intervals import Job
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


def test_two_that_exclude_each_other_count_as_what_fits() -> None:
    first = Job(released_at=0.0, deadline_at=1.0, work_s=0.75, alone_s=0.75)
    second = Job(released_at=0.0, deadline_at=1.0, work_s=1.0, alone_s=1.0)
    assert most_in_time([first, second]) == 1.25
    assert most_in_time([first, second], workers=2) == 2.0


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
    together = [request(0.0, tokens) for tokens in lengths]
    charged_s = sum(job.work_s for job in charges.jobs(together, {"text": 1e3, "file": 1e3}))
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
    assert tally.attainment <= experiment.bound([configuration], 1.0, window=5, whole_s=5.0) + 1e-6


@given(rows, costs, st.integers(1, 4000))
def test_no_batch_that_makes_nobody_late_is_larger_than_said(
    played: tuple[TraceRequest, ...], cost: CostModel, batch_tokens: int
) -> None:
    alone = Charges(machine=machine(cost), batch_tokens=None).jobs(played, OBJECTIVES_S)
    tokens = [row.input_tokens for row in played]
    largest = largest_batches(alone, tokens, cost, batch_tokens)
    assert all(most >= own for most, own in zip(largest, tokens, strict=True))
    for members in itertools.combinations(range(len(played)), 3):
        together = sum(tokens[one] for one in members)
        begins_at = max(alone[one].released_at for one in members)
        due_at = min(alone[one].deadline_at for one in members)
        takes_s = cost.seconds([Extent(tokens[one]) for one in members])
        if together <= batch_tokens and begins_at + takes_s <= due_at:
            assert all(largest[one] >= together for one in members)


def test_who_is_not_there_in_time_shares_nothing() -> None:
    cost = CostModel(base_s=0.1, short_token_s=1e-4, long_token_s=1e-4, pair_s=0.0)
    alone = Charges(machine=machine(cost), batch_tokens=None)
    played = [request(0.0, 500), request(0.125, 400), request(0.25, 300)]  # each is due 0.249 s after it came
    # The second comes when the first is due in 0.124 s, and the two take 0.19 s.
    assert largest_batches(alone.jobs(played, OBJECTIVES_S), [500, 400, 300], cost, 2048) == [500, 400, 300]
    slow = alone.jobs(played, {"text": 0.5})
    # The three take 0.22 s and have 0.249 s. Where only two of them may be together, it does not look which.
    assert largest_batches(slow, [500, 400, 300], cost, 2048) == [1200, 1200, 1200]
    assert largest_batches(slow, [500, 400, 300], cost, 1000) == [1000, 1000, 1000]


def test_windows_add_up() -> None:
    experiment_rows = [request(number / 4, 500) for number in range(8)]
    charges = Charges(
        machine=machine(CostModel(base_s=0.1, short_token_s=0, long_token_s=0, pair_s=0)), batch_tokens=None
    )
    assert bound([experiment_rows[:3], experiment_rows[3:]], OBJECTIVES_S, charges, workers=1) == pytest.approx(1.0)
