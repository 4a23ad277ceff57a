from __future__ import annotations

from dataclasses import replace
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.core.candidate import Candidate, Standing
from flowprefill_sglang.prefill_worker.admission import Holding, Room
from flowprefill_sglang.prefill_worker.retraction import Outlook, tasks_to_retract

FULL = Room(free_kv_tokens=0, claimed_kv_tokens=0, tasks=9, max_tasks=64, activation_bytes=90, max_activation_bytes=100)


def candidate(key: int, due: float, remaining_s: float = 1.0, standing: Standing = Standing.WAITING) -> Candidate:
    return Candidate(key=key, arrived_at=0.0, deadline_at=due, remaining_s=remaining_s, standing=standing)


def test_begun_ones_that_will_be_late_are_given_up_last_first() -> None:
    urgent = candidate(0, 1.0)
    late = candidate(1, 1.5, standing=Standing.SUSPENDED)
    in_time = candidate(2, 3.0, standing=Standing.SUSPENDED)
    running = candidate(3, 3.5, standing=Standing.RUNNING)
    waiting = candidate(4, 3.5)
    outlook = Outlook.of([urgent, late, in_time, running, waiting], 0.0)
    assert outlook.on_time == {urgent, in_time}
    assert list(outlook.given_up) == [running, late]


def test_who_has_no_deadline_is_never_worth_another_s_work_and_can_be_started_over() -> None:
    begun = candidate(0, inf, standing=Standing.SUSPENDED)
    outlook = Outlook.of([candidate(1, inf), begun], 0.0)
    assert outlook.on_time == set()
    assert list(outlook.given_up) == [begun]


def test_promoted_ones_and_half_prefilled_ones_keep_what_they_have() -> None:
    promoted = candidate(0, 0.5, standing=Standing.SUSPENDED)
    promoted.is_promoted = True
    assert list(Outlook.of([promoted, candidate(1, 0.5, standing=Standing.HALF_PREFILLED)], 0.0).given_up) == []


def holdings(*kv_tokens: int) -> dict[object, Holding]:
    return {object(): Holding(kv_tokens=kv, claimed_kv_tokens=0, activation_bytes=10) for kv in kv_tokens}


def choose(held: dict, need: int) -> list[int]:
    chosen = tasks_to_retract(
        held, FULL, holding=held.__getitem__, fits=lambda room: room.refusal(need, 10, is_begun=False) is None
    )
    return [held[task].kv_tokens for task in chosen]


def test_no_more_are_retracted_than_it_takes() -> None:
    held = holdings(100, 50, 300, 80)
    assert choose(held, 90) == [100]
    assert choose(held, 150) == [100, 50]
    assert choose(held, 300) == [300], "the first two are not needed then"
    assert choose(held, 530) == [100, 50, 300, 80]


def test_nothing_is_retracted_in_vain() -> None:
    assert choose(holdings(100, 50), 151) == []
    assert choose({}, 1) == []


@given(kv=st.lists(st.integers(1, 100), max_size=8), need=st.integers(1, 400))
def test_what_is_chosen_suffices_and_each_is_needed(kv: list[int], need: int) -> None:
    chosen = choose(holdings(*kv), need)
    assert (sum(chosen) >= need) == (sum(kv) >= need)
    assert all(sum(chosen) - one < need for one in chosen)


def test_a_task_gives_back_its_claim_and_its_slot_too() -> None:
    holding = Holding(kv_tokens=10, claimed_kv_tokens=20, activation_bytes=30)
    room = replace(FULL, claimed_kv_tokens=50)
    without = room.without(holding)
    assert without == replace(room, free_kv_tokens=10, claimed_kv_tokens=30, tasks=8, activation_bytes=60)
    assert without.plus(holding) == room
