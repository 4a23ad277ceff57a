"""The search for a schedule that knows the future: it never claims what was not played, and finds what is easy."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.core.prefill_cost import CostModel
from flowprefill_sglang.sim.configuration import parse
from flowprefill_sglang.sim.experiment import Experiment
from flowprefill_sglang.sim.hindsight import best_found
from flowprefill_sglang.sim.machine import LLAMA_LIKE, Machine
from flowprefill_sglang.workload.trace import TraceRequest

ARRIVALS = [float(number) for number in range(20)]


def everyone_lets_a_neighbour_fail(chosen: set[int]) -> set[int]:
    """Of two that come one after the other the second is late; 0, 2, 4 and so on can all be on time."""
    return {one for one in chosen if one - 1 not in chosen}


@given(st.sets(st.integers(0, 19)), st.integers(0, 5), st.floats(0.5, 6.0), st.integers(0, 9))
def test_what_is_found_was_played_and_is_no_worse_than_the_start(
    start: set[int], rounds: int, apart_s: float, seed: int
) -> None:
    runs: list[set[int]] = []

    def play(chosen: set[int]) -> set[int]:
        runs.append(everyone_lets_a_neighbour_fail(chosen))
        return runs[-1]

    found = best_found(play, ARRIVALS, range(20), [start, set()], rounds=rounds, apart_s=apart_s, seed=seed)
    assert found in runs
    assert len(found) >= len(everyone_lets_a_neighbour_fail(start))


def test_it_finds_who_can_still_come() -> None:
    found = best_found(
        everyone_lets_a_neighbour_fail, ARRIVALS, range(20), [{0, 9, 16}], rounds=40, apart_s=4.0, seed=0
    )
    assert len(found) >= 8, "and there are at most 10"


def test_it_leaves_out_who_costs_more_than_he_is_worth() -> None:
    """A long one that can be on time, and three short ones that come when it is under way: of those who know nothing
    of them, nobody has all three."""
    cost = CostModel(base_s=0.0, short_token_s=1e-3, long_token_s=1e-3, pair_s=0.0)
    rows = [TraceRequest(arrival_s=0.0, input_tokens=2000, output_tokens=1, class_name="file")]
    rows += [
        TraceRequest(arrival_s=0.5 + number / 8, input_tokens=400, output_tokens=1, class_name="text")
        for number in range(4)
    ]
    experiment = Experiment(
        workload=lambda: iter(rows),
        machine=Machine(name="m", cost=cost, layers=4, operators=LLAMA_LIKE),
        objectives_s={"text": 1.75, "file": 2.5},
        is_batching=False,
    )
    policy = parse("edf")
    online = experiment.simulate(policy, 1.0).attained
    found = experiment.with_hindsight(policy, 1.0, [set(range(5))], rounds=20)
    most = experiment.without_batches(1.0, 10.0).most
    assert online < found == 4 == most
