"""The table of worker states."""

from __future__ import annotations

import pytest

from flowprefill_sglang.errors import InternalError
from flowprefill_sglang.router.states import TRANSITIONS, WorkerState, transition


def test_every_state_has_a_row_and_can_be_reached() -> None:
    assert set(TRANSITIONS) == set(WorkerState)
    assert {state for row in TRANSITIONS.values() for state in row} == set(WorkerState)


def test_what_the_table_does_not_allow_raises() -> None:
    assert transition(WorkerState.JOINING, WorkerState.READY) is WorkerState.READY
    with pytest.raises(InternalError, match="dead to ready"):
        transition(WorkerState.DEAD, WorkerState.READY)
