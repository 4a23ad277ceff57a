"""The one check that a running prefill makes at every operator boundary.

Owned by the scheduler's thread: every method but ``raise_flag`` is called there. Operators that were wrapped once, at
start-up (``integration.preemption.operator_boundaries``), call ``cross``; a task (``prefill_worker.task``) opens the
gate while it runs. Nothing is decided here: an event leads back to the scheduler's loop, and the policy there decides.
"""

from __future__ import annotations

from collections.abc import Callable


class Gate:
    """What a boundary checks; one per scheduler process."""

    __slots__ = ("_poll", "_suspend", "boundaries", "is_closed", "is_raised")

    def __init__(self) -> None:
        self._poll: Callable[[], bool] | None = None
        self._suspend: Callable[[], None] | None = None
        self.is_raised = False
        """Whether an event wants a scheduling round."""
        self.boundaries = 0
        """Boundaries that tasks have passed since the start: progress for a watchdog, and statistics."""
        self.is_closed = True
        """No task may stop here: none is running, or one is inside of an operator."""

    def raise_flag(self) -> None:
        """An event wants a scheduling round: the running task stops at its next boundary. From any thread."""
        self.is_raised = True

    def clear(self) -> None:
        """Lower the flag. The loop must do this before it looks at what happened, or it loses what happens between."""
        self.is_raised = False

    def watch(self, poll: Callable[[], bool] | None) -> None:
        """Ask ``poll`` too at every boundary where the flag is down; True is an event. None: the flag alone.

        It runs inside of the task, so it must change nothing, and cost nothing: small models come to a boundary every
        half millisecond, and a look at a ZeroMQ socket, a system call, takes up to 30 µs there.
        """
        self._poll = poll

    def cross(self) -> None:
        """Stop the running task here if an event is pending. Returns at once when nothing may stop here."""
        if self.is_closed:
            return
        self.boundaries += 1
        if self._suspend is not None and (self.is_raised or (self._poll is not None and self._poll())):
            self._suspend()

    def open(self, suspend: Callable[[], None]) -> None:
        """A task is about to run on this thread; ``suspend``, called inside of it, stops it."""
        self._suspend = suspend
        self.is_closed = False

    def close(self) -> None:
        """No task is running any more."""
        self._suspend = None
        self.is_closed = True
