"""When a worker's events are sent to its HTTP process.

A send wakes a thread of ZeroMQ, which takes a tenth of a millisecond where that shares a core with the scheduler's: as
long as a round. So the events of short tasks travel together, while nobody hears late of a long one.
"""

from __future__ import annotations

from typing import Final

from flowprefill_sglang.observe.events import Event
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.drained_events import DrainedEvents
from flowprefill_sglang.prefill_worker.reporter import SchedulerReporter
from flowprefill_sglang.prefill_worker.run_ahead import RunAhead
from flowprefill_sglang.prefill_worker.scheduler import Task

EVERY_S: Final = 0.02
"""How often events are sent, at most, while short tasks follow one another."""
WITHIN_S: Final = 0.2
"""How long an event waits while a long task runs, at most: then the task is stopped for it."""


class Reports:
    """Owned by the scheduler's thread."""

    def __init__(self, reporter: SchedulerReporter, gate: Gate, device: RunAhead) -> None:
        self._reporter = reporter
        self._gate = gate
        self._device = device
        self._events = DrainedEvents(reporter.record, device)
        self._sent_at = float("-inf")

    def record(self, event: Event) -> None:
        """Keep an event until it is sent, that of a preemption once the device has ended what was stopped."""
        self._events(event)

    def send_if_due(self, now: float, running: Task | None, *, has_started: bool = False) -> None:
        """After what happened at ``now``; ``running`` goes on next, and ``has_started`` or gone on just now."""
        self._events.settle()
        is_long = running is not None and running.predicted_s > EVERY_S
        if now - self._sent_at > EVERY_S or (is_long and has_started):
            self._sent_at = now
            self._reporter.flush()
        elif is_long and self._reporter.has_unsent:
            self._gate.raise_within(WITHIN_S)

    def send(self) -> None:
        """At once, when nothing runs and nothing may happen for long. Waits for what the device still has of tasks that
        were suspended, or discarded."""
        self._device.drain()
        self._events.settle()
        self._reporter.flush()
