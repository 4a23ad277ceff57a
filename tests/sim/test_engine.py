"""The event core: conservation for everything that can be simulated, and schedules that were computed by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowprefill_sglang.core.aging import AgingLimits
from flowprefill_sglang.core.batching import BatchLimits
from flowprefill_sglang.core.prefill_cost import CostModel
from flowprefill_sglang.sim.configuration import parse
from flowprefill_sglang.sim.engine import ClusterSettings, run
from flowprefill_sglang.sim.machine import Machine, Operator
from flowprefill_sglang.sim.tally import Tally
from flowprefill_sglang.sim.workers import WorkerSettings
from flowprefill_sglang.workload.trace import TraceRequest

OBJECTIVES_S = {"text": 5.0, "file": 100.0}
NAMES = (
    *("feasible", "sedf", "edf", "srpt", "fcfs", "fcfs@operator", "fcfs@layer", "feasible@layer", "feasible@whole"),
    *("feasible@chunk256", "srpt@chunk64", "fcfs@chunk256", "fcfs@chunk1"),
)
SECOND_EACH_HUNDRED = CostModel(base_s=0.0, short_token_s=0.0, long_token_s=0.01, pair_s=0.0)
"""A prompt of 100 tokens takes a second, whatever it is batched with."""


def machine(cost: CostModel = SECOND_EACH_HUNDRED) -> Machine:
    """Two layers of two operators; the first takes a quarter of a layer."""
    operators = (Operator(name="first", token_share=0.25, pair_share=0.5), Operator(name="second", token_share=0.75))
    return Machine(name="m", cost=cost, layers=2, operators=operators)


def row(at: float, tokens: int, class_name: str = "text") -> TraceRequest:
    return TraceRequest(arrival_s=at, input_tokens=tokens, output_tokens=1, class_name=class_name)


def serve(
    name: str,
    rows: list[TraceRequest],
    *,
    cost: CostModel = SECOND_EACH_HUNDRED,
    switch_s: float = 0.0,
    error: float = 0.0,
    max_tasks: int = 64,
    host_s: float = 0.0,
    preempt_s: float = 0.0,
    **cluster: object,
) -> tuple[Tally, list[tuple[str, float]]]:
    """What became of the rows: the tally, and each rid with the time of its first token, in order of time."""
    worker = WorkerSettings(
        machine=replace(machine(cost), host_before_s=host_s, host_after_s=host_s, preempt_s=preempt_s),
        configuration=parse(name),
        aging=AgingLimits(),
        batching=BatchLimits(),
        switch_s=switch_s,
        error=error,
        max_tasks=max_tasks,
    )
    ended: list[tuple[str, float]] = []
    tally = run(
        rows,
        OBJECTIVES_S,
        ClusterSettings(worker=worker, **cluster),
        lambda request, at: ended.append((request.rid, round(at, 9))),
    )
    return tally, ended


TWO = [row(0.0, 800, "file"), row(3.0, 100)]
"""The first has 8 s of work and no hurry; the second one second of work, due at 8 s."""


@pytest.mark.parametrize(
    ("name", "ended"),
    [
        # Operators of the first begin at 0, 1, 4 and 5 s. The second arrives at 3 s and runs from 4 to 5 s.
        ("sedf", [("1", 5.0), ("0", 9.0)]),
        ("sedf@layer", [("1", 5.0), ("0", 9.0)]),
        ("sedf@whole", [("0", 8.0), ("1", 9.0)]),
        # Chunks of 2 s: the second one ends at 4 s.
        ("sedf@chunk200", [("1", 5.0), ("0", 9.0)]),
        ("sedf@chunk500", [("1", 6.0), ("0", 9.0)]),
        ("fcfs", [("0", 8.0), ("1", 9.0)]),
        # SGLang goes on with the prompt it has cut; the last 2 s of it leave no room for another in a chunk of 200.
        ("fcfs@chunk200", [("0", 8.0), ("1", 9.0)]),
        # A chunk of 700, and one of the remaining 100 and the other request's 100.
        ("fcfs@chunk700", [("0", 9.0), ("1", 9.0)]),
        ("fcfs@operator", [("0", 8.0), ("1", 9.0)]),
    ],
)
def test_two_requests_at_each_granularity(name: str, ended: list[tuple[str, float]]) -> None:
    assert serve(name, TWO)[1] == ended


def test_rounds_happen_at_events_only() -> None:
    """Start, boundary, end of the second, end of the first; not at 8 s, when the first would have ended undisturbed."""
    tally, _ = serve("sedf", TWO)
    assert tally.rounds == 4
    assert tally.events == 2 + 4 + 2, "arrivals, wake-ups, answers"


def test_operators_are_finer_than_layers() -> None:
    rows = [row(0.0, 800, "file"), row(0.5, 100)]  # operators begin at 1 s, the second layer at 4 s
    assert serve("sedf", rows)[1][0] == ("1", 2.0)
    assert serve("sedf@layer", rows)[1][0] == ("1", 5.0)


def test_blocking_lasts_from_the_arrival_to_the_boundary() -> None:
    for name, blocked_s in (("sedf", 1.0), ("sedf@layer", 1.0), ("sedf@whole", 5.0), ("fcfs", 5.0)):
        tally, _ = serve(name, TWO)
        assert tally.blocking.count == 1
        assert tally.blocking.longest_s == pytest.approx(blocked_s), name


def test_a_preemption_costs_the_one_that_comes_and_an_end_nobody() -> None:
    # Stopped at 4 s, the second runs from 4.5 to 5.5 s, and the first has its other 4 s at once.
    assert serve("sedf", TWO, preempt_s=0.5)[1] == [("1", 5.5), ("0", 9.5)]
    assert serve("fcfs", TWO, preempt_s=0.5)[1] == serve("fcfs", TWO)[1]


def test_a_switch_costs_the_one_that_comes_and_the_one_that_goes_on() -> None:
    tally, ended = serve("sedf", TWO, switch_s=0.5)
    # Starts at 0.5; its second layer begins at 4.5. The other starts at 5 and ends at 6; the first goes on at 6.5.
    assert ended == [("1", 6.0), ("0", 10.5)]
    assert tally.preemptions == 1
    assert tally.busy_s == pytest.approx(9.0)


LATE_AND_URGENT = [row(0.0, 800), row(3.0, 100)]
"""The first has 8 s of work and was due at 5 s."""


def test_a_task_that_was_given_up_is_started_over_where_it_keeps_out_one_that_can_be_on_time() -> None:
    # Stopped at 4 s, and computed anew from 5 s on: the 4 s that it had run are lost.
    tally, ended = serve("feasible", LATE_AND_URGENT, max_tasks=1)
    assert ended == [("1", 5.0), ("0", 13.0)]
    assert (tally.retractions, tally.forwards) == (1, 3)
    assert tally.busy_s == pytest.approx(13.0)
    assert serve("feasible", LATE_AND_URGENT, max_tasks=2)[1] == [("1", 5.0), ("0", 9.0)]


def test_what_can_be_on_time_or_was_handed_over_in_part_is_not_started_over() -> None:
    for name, rows in (("feasible", TWO), ("feasible@chunk500", LATE_AND_URGENT), ("fcfs@operator", LATE_AND_URGENT)):
        rows = [rows[0], replace(rows[1], arrival_s=6.0)]
        tally, _ = serve(name, rows, max_tasks=1)
        assert tally.retractions == 0, name


def test_arrivals_of_one_instant_are_one_batch() -> None:
    cost = CostModel(base_s=0.5, short_token_s=0.0, long_token_s=0.001, pair_s=0.0)
    tally, ended = serve("feasible", [row(1.0, 100), row(1.0, 100)], cost=cost)
    assert ended == [("0", 1.7), ("1", 1.7)]
    assert tally.forwards == 1


def test_handoff_is_part_of_the_first_tokens_time() -> None:
    worker = WorkerSettings(
        machine=Machine(
            name="m",
            cost=SECOND_EACH_HUNDRED,
            layers=1,
            operators=machine().operators,
            handoff_base_s=0.25,
            handoff_token_s=0.001,
        ),
        configuration=parse("fcfs@chunk100"),
        aging=AgingLimits(),
        batching=BatchLimits(),
    )
    tally = run([row(0.0, 250, "file")], OBJECTIVES_S, ClusterSettings(worker=worker))
    # 2.5 s of work; the KV of the first two chunks travels meanwhile.
    assert tally.mean_ttft_s == pytest.approx(2.5 + 0.25 + 0.05)


def test_the_host_core_is_passed_in_order_there_and_back() -> None:
    """Two at once: one after the other to the worker, where the first has begun when the second comes, and back."""
    host = replace(machine(), host_before_s=0.25, host_after_s=0.5)
    worker = WorkerSettings(
        machine=host, configuration=parse("fcfs"), aging=AgingLimits(), batching=BatchLimits(), is_batching=False
    )
    ended: list[float] = []
    rows = [row(0.0, 100), row(0.0, 100), row(2.0, 100)]
    run(rows, OBJECTIVES_S, ClusterSettings(worker=worker), lambda _, at: ended.append(at))
    # Prefills end at 1.25, 2.25 and 3.25 s. The third comes to the host core at 2 s and holds it until 2.25.
    assert ended == pytest.approx([1.75, 2.75, 3.75])


def test_an_answer_waits_for_the_host_core() -> None:
    host = replace(machine(), host_before_s=0.5, host_after_s=0.25)
    worker = WorkerSettings(machine=host, configuration=parse("fcfs"), aging=AgingLimits(), batching=BatchLimits())
    ended: list[tuple[str, float]] = []
    rows = [row(0.0, 100), row(1.25, 100)]
    run(rows, OBJECTIVES_S, ClusterSettings(worker=worker), lambda one, at: ended.append((one.rid, at)))
    # The first prefill ends at 1.5 s, when the host core is busy with the second request until 1.75 s.
    assert ended == [("0", 2.0), ("1", 3.0)]


def test_routers_share_the_workers_out_and_take_turns() -> None:
    rows = [row(0.0, 100), row(0.0, 100), row(0.0, 100), row(0.0, 100)]
    assert [at for _, at in serve("fcfs", rows, workers=4, routers=2)[1]] == [1.0] * 4
    # The second router has no other worker than its own.
    uneven = [row(0.0, 900, "file"), row(0.0, 100), row(0.25, 100), row(0.25, 100)]
    assert dict(serve("fcfs", uneven, workers=2, routers=2)[1]) == {"1": 1.0, "3": 2.0, "0": 9.0, "2": 10.0}


def test_least_work_looks_at_what_is_not_answered_yet() -> None:
    rows = [row(0.0, 900, "file"), row(0.5, 100), row(0.75, 100), row(5.0, 100)]
    assert dict(serve("fcfs", rows, workers=2)[1]) == {"1": 1.5, "2": 2.5, "3": 6.0, "0": 9.0}
    assert dict(serve("fcfs", rows, workers=2, dispatch="round_robin")[1])["2"] == 10.0


lengths = st.one_of(st.integers(1, 50), st.integers(51, 3000))
workloads = st.lists(st.tuples(st.integers(0, 100), lengths), min_size=1, max_size=25).map(
    lambda pairs: [row(at / 8, tokens, "text" if tokens < 300 else "file") for at, tokens in sorted(pairs)]
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(
    rows=workloads,
    workers=st.integers(1, 4),
    routers=st.integers(1, 4),
    dispatch=st.sampled_from(["least_work", "round_robin"]),
    max_tasks=st.integers(1, 3),
    switch_s=st.sampled_from([0.0, 0.125]),
    error=st.sampled_from([0.0, 0.5]),
    host_s=st.sampled_from([0.0, 0.0625]),
    preempt_s=st.sampled_from([0.0, 0.25]),
    seed=st.integers(0, 3),
)
def test_every_request_arrives_once_and_ends_once(
    name: str, rows: list[TraceRequest], workers: int, routers: int, max_tasks: int, **more: object
) -> None:
    cost = CostModel(base_s=0.02, request_s=0.001, short_token_s=1e-5, long_token_s=1e-3, knee_tokens=64, pair_s=1e-8)
    tally, ended = serve(
        name, rows, cost=cost, workers=max(workers, routers), routers=routers, max_tasks=max_tasks, **more
    )
    assert Counter(rid for rid, _ in ended) == Counter(str(number) for number in range(len(rows)))
    assert tally.arrived == tally.ended == len(rows)
    assert Counter({name: one.arrived for name, one in tally.classes.items()}) == Counter(r.class_name for r in rows)
    for rid, at in ended:
        alone_s = cost.base_s
        assert at >= rows[int(rid)].arrival_s + (0.0 if more["error"] else alone_s) - 1e-9
    assert max(at for _, at in ended) * max(workers, routers) >= tally.busy_s - 1e-6, "nobody works twice at once"


def test_the_same_seed_gives_the_same_run() -> None:
    rows = [row(number / 4, 37 * number % 400 + 1) for number in range(60)]
    first, again = (serve("feasible", rows, error=0.3, workers=2, seed=5)[1] for _ in range(2))
    assert first == again
    assert first != serve("feasible", rows, error=0.3, workers=2, seed=6)[1]
