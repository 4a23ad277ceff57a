"""Where a worker stands in its life, for prefill workers and decode instances alike."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from flowprefill_sglang.errors import InternalError


class WorkerState(StrEnum):
    """One worker's state as the router sees it."""

    JOINING = "joining"
    """Known by name or URL, not yet heard from."""
    READY = "ready"
    DRAINING = "draining"
    """Ends what it has, takes nothing new."""
    DEAD = "dead"


TRANSITIONS: Final[dict[WorkerState, frozenset[WorkerState]]] = {
    WorkerState.JOINING: frozenset({WorkerState.READY, WorkerState.DEAD}),
    WorkerState.READY: frozenset({WorkerState.DRAINING, WorkerState.DEAD}),
    WorkerState.DRAINING: frozenset({WorkerState.DEAD}),
    WorkerState.DEAD: frozenset({WorkerState.JOINING}),
}


def transition(old: WorkerState, new: WorkerState) -> WorkerState:
    """``new``, when the table allows it. Raises InternalError."""
    if new not in TRANSITIONS[old]:
        raise InternalError(f"a worker cannot go from {old} to {new}")
    return new
