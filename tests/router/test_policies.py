"""Dispatch policies: pure choices."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.router.policies import POLICIES, least_work, round_robin


@dataclass(eq=False)
class Worker:
    outstanding_tokens: int


loads = st.lists(st.integers(0, 5), min_size=1, max_size=6)


@pytest.mark.parametrize("name", POLICIES)
@given(loads, st.integers(1, 1000), st.integers(0, 1000))
def test_every_policy_chooses_one_of_the_workers(name: str, tokens: list[int], size: int, turn: int) -> None:
    workers = [Worker(load) for load in tokens]
    assert POLICIES[name](workers, size, turn) in workers


@given(loads, st.integers(0, 1000))
def test_least_work_chooses_a_least_loaded_one(tokens: list[int], turn: int) -> None:
    workers = [Worker(load) for load in tokens]
    assert least_work(workers, 1, turn).outstanding_tokens == min(tokens)


def test_least_work_shares_among_equals() -> None:
    workers = [Worker(0), Worker(0), Worker(0)]
    assert {id(least_work(workers, 1, turn)) for turn in range(3)} == {id(worker) for worker in workers}


def test_round_robin_takes_turns() -> None:
    workers = [Worker(9), Worker(0)]
    assert [round_robin(workers, 1, turn) for turn in range(4)] == workers * 2
