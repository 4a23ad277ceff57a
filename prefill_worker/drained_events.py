"""A preemption is over when the device has ended what the stopped task had launched, and not when the host has stopped.

The device goes on for up to the run-ahead budget and one operator, while the scheduler decides and the urgent task is
launched behind it. Waiting for it would make it idle. So the record of a preemption waits for it instead, and the
events after it wait behind it, in their order: some milliseconds, and nothing where the host computes itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec

from flowprefill_sglang.observe.events import Event, TaskPreempted
from flowprefill_sglang.prefill_worker.run_ahead import RunAhead, Stop


class DrainedEvents:
    """Passes events on, those of preemptions with the blocking time until the device's end. Owned by the scheduler's
    thread."""

    def __init__(self, record: Callable[[Event], None], device: RunAhead) -> None:
        self._record = record
        self._device = device
        self._held: deque[tuple[Event, Stop | None]] = deque()

    def __call__(self, event: Event) -> None:
        """Take an event. A preemption is of the task that the device's last stop was of."""
        stop = self._device.last_stop if isinstance(event, TaskPreempted) else None
        if stop is None and not self._held:
            self._record(event)
            return
        self._held.append((event, stop))
        self.settle()

    def settle(self) -> None:
        """Pass on what need not wait any longer."""
        if not self._held:
            return
        self._device.look()
        while self._held:
            event, stop = self._held[0]
            if stop is not None:
                if stop.ended_at is None:
                    return
                assert isinstance(event, TaskPreempted)
                event = msgspec.structs.replace(event, blocking_s=event.blocking_s + stop.ended_at - stop.stopped_at)
            self._record(event)
            self._held.popleft()
