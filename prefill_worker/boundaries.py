"""The one check that a running prefill makes at every operator boundary.

Owned by the scheduler's thread: every method but ``raise_flag`` is called there. Operators that were wrapped once, at
start-up (``integration.preemption.operator_boundaries``), call ``cross``; a task (``prefill_worker.task``) opens the
gate while it runs. Nothing is decided here: an event leads back to the scheduler's loop, and the policy there decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from flowprefill_sglang.prefill_worker.lease import Lease
from flowprefill_sglang.prefill_worker.run_ahead import RunAhead


class Gate:
    """What a boundary checks; one per scheduler process."""

    __slots__ = (
        "_clock",
        "_due_at",
        "_lease",
        "_look",
        "_suspend",
        "boundaries",
        "device",
        "is_closed",
        "is_raised",
    )

    def __init__(self, clock: Callable[[], float] = time.monotonic, lease: Lease | None = None) -> None:
        """``lease``: this rank's end, where several ranks compute together; it then decides where a task stops."""
        self._clock = clock
        self._lease = lease
        self._look: Callable[[], bool] | None = None
        self._suspend: Callable[[], None] | None = None
        self._due_at: float | None = None
        self.device: RunAhead | None = None
        """What must not fall far behind; None where the host computes itself. Operators tell it what they launch."""
        self.is_raised = False
        """Whether an event wants a scheduling round."""
        self.boundaries = 0
        """Boundaries that tasks have passed since the start: progress for a watchdog, and statistics."""
        self.is_closed = True
        """No task may stop here: none is running, or one is inside of an operator."""

    def raise_flag(self) -> None:
        """An event wants a scheduling round: the running task stops at its next boundary. From any thread."""
        self.is_raised = True

    def raise_within(self, seconds: float) -> None:
        """Something has happened that can change no decision: the running task stops for it after so long, unless it
        has stopped before. From any thread."""
        due_at, before = self._clock() + seconds, self._due_at
        if before is None or due_at < before:  # two threads may be here at once: one of the two times then holds
            self._due_at = due_at

    def clear(self) -> None:
        """Lower the flag. The loop must do this before it looks at what happened, or it loses what happens between."""
        self.is_raised = False
        self._due_at = None

    def watch(self, look: Callable[[], bool] | None) -> None:
        """For instruments and tests: call ``look`` too at every boundary where the flag is down; True stops the task.
        None: no more."""
        self._look = look

    def cross(self, kind: int = 0, operator: object = None, part: float = 1.0) -> None:
        """Wait until the device is near, and stop the running task here if an event is pending. Returns at once when
        nothing may stop here. ``kind``: a number for the operator, by which ranks compare what they have run.

        ``operator``: what is launched next, of which ``part`` is launched before the next boundary. The gate is closed
        for it; who launches it opens the gate again (``is_closed``). None: nothing is."""
        # All of a boundary is this one call: Python's calls are most of what it costs.
        if self.is_closed:
            return
        self.boundaries += 1
        device = self.device
        if device is not None:
            device.hold(self._is_wanted)
        stops = (
            self.is_raised
            or (self._due_at is not None and self._clock() >= self._due_at)
            or (self._look is not None and self._look())
        )
        if self._lease is not None:
            stops = self._lease.cross(stops, kind)
        if stops and self._suspend is not None:
            self._suspend()
            if device is not None:
                device.hold(_never)  # others have run since, or the stop was postponed
        if operator is not None:
            if device is not None:
                device.launched(operator, part)
            self.is_closed = True

    def _is_wanted(self) -> bool:
        return self.is_raised or (self._due_at is not None and self._clock() >= self._due_at)

    def open(self, suspend: Callable[[], None]) -> None:
        """A task is about to run on this thread; ``suspend``, called inside of it, stops it, or calls
        ``cannot_stop``. Raises what the lease raises."""
        if self._lease is not None:
            self._lease.begin()
        self._suspend = suspend
        self.is_closed = False

    def cannot_stop(self) -> None:
        """The task goes on at a boundary at which it was to stop."""
        if self._lease is not None:
            self._lease.cannot_stop()

    def close(self) -> None:
        """No task is running any more."""
        if self._lease is not None and self._suspend is not None:
            self._lease.end()
        self._suspend = None
        self.is_closed = True


def _never() -> bool:
    return False
