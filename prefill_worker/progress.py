"""What the scheduler's events mean for the requests that a router dispatched: value in, value out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from flowprefill_sglang.observe.events import (
    Event,
    RequestArrived,
    RequestEnded,
    TaskPreempted,
    TaskResumed,
    TaskStarted,
)
from flowprefill_sglang.wire.messages import Phase

_MAX_BATCHED_NAMES: Final = 65_536
"""Prompts of batches whose dispatch is remembered. The event that says that one has ended may be lost."""

_PHASES: Final = {TaskStarted: Phase.STARTED, TaskPreempted: Phase.PREEMPTED, TaskResumed: Phase.RESUMED}


class ProgressReader:
    """Knows which dispatch a prompt of a batch belongs to, from its arrival to its end."""

    def __init__(self) -> None:
        self._dispatch_of: dict[str, str] = {}  # a single prompt has its dispatch's own name, and no entry

    def read(self, events: Iterable[Event]) -> Iterator[tuple[str, Phase]]:
        """The dispatches that were started, preempted or resumed, in order; those of other senders included."""
        for event in events:
            match event:
                case RequestArrived(rid=rid, dispatch_rid=dispatch_rid):
                    self._remember(rid, dispatch_rid)
                case RequestEnded(rid=rid):
                    self._dispatch_of.pop(rid, None)
                case TaskStarted(rids=rids) | TaskPreempted(rids=rids) | TaskResumed(rids=rids):
                    for rid in rids:
                        yield self._dispatch_of.get(rid, rid), _PHASES[type(event)]

    def _remember(self, rid: str, dispatch_rid: str) -> None:
        if dispatch_rid in ("", rid):
            return
        self._dispatch_of[rid] = dispatch_rid
        if len(self._dispatch_of) > _MAX_BATCHED_NAMES:
            del self._dispatch_of[next(iter(self._dispatch_of))]
