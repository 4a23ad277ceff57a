"""A gate whose clock the test sets, and what a running task would do at it."""

from __future__ import annotations

from flowprefill_sglang.prefill_worker.boundaries import Gate


class Clock:
    """Stands until it is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def stops(gate: Gate) -> bool:
    """Whether a running task would be stopped at its next boundary."""
    asked: list[bool] = []
    gate.open(lambda: asked.append(True))
    gate.cross()
    gate.close()
    return bool(asked)
