"""Which worker gets the next request: pure functions over the router's picture.

A policy is ``(workers, tokens, turn) -> worker``. ``workers`` are those that could take the request, never empty, in a
stable order; ``tokens`` is the request's predicted prefill work; ``turn`` counts the choices made so far, which is all
the memory a policy gets. A policy that needs more of the picture (each worker's tasks with their deadlines) reads it
from the workers it is given; callers do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar


class Loaded(Protocol):
    """A worker as policies see it."""

    @property
    def outstanding_tokens(self) -> int:
        """Predicted work assigned and not yet answered."""


W = TypeVar("W", bound=Loaded)
Policy = Callable[[Sequence[W], int, int], W]


def least_work(workers: Sequence[W], tokens: int, turn: int) -> W:
    """The worker with the least predicted work; among equals, in turn, so that idle workers share the requests."""
    del tokens  # the same on every worker, as long as nothing says that one is faster
    if len(workers) == 1:
        return workers[0]
    start = turn % len(workers)
    best = workers[start]
    for offset in range(1, len(workers)):
        worker = workers[(start + offset) % len(workers)]
        if worker.outstanding_tokens < best.outstanding_tokens:
            best = worker
    return best


def round_robin(workers: Sequence[W], tokens: int, turn: int) -> W:
    """One after the other, whatever they hold."""
    del tokens
    return workers[turn % len(workers)]


POLICIES: Final[dict[str, Policy]] = {"least_work": least_work, "round_robin": round_robin}  # type: ignore[type-arg]  # generic in W
DEFAULT_POLICY: Final = "least_work"
