"""What became of the requests of a soak (``soak.py``): as its client saw it, and by the worker's own events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from flowprefill_sglang.observe.events import Outcome, RequestArrived, RequestEnded, TaskFinished, TaskPreempted


@dataclass(slots=True)
class Tally:
    """What became of the requests, as the client saw it."""

    sent: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    by_behaviour: dict[str, Counter[str]] = field(default_factory=dict)

    def count(self, behaviour: str, end: str) -> None:
        """One request ended so."""
        self.ended[end] += 1
        self.by_behaviour.setdefault(behaviour, Counter())[end] += 1


@dataclass(slots=True)
class Ledger:
    """What the worker's events say about the prompts that entered its scheduler."""

    arrived: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    preemptions: int = 0
    tasks: int = 0
    lost: int = 0
    encoded_bytes: int = 0
    """Of all events, as the worker's HTTP process keeps them."""
    seen_until: float = 0.0

    def add(self, events: Sequence[Any], lost: int) -> None:
        """Take in events that are newer than those before."""
        self.lost = lost
        for event in events:
            if event.at <= self.seen_until:
                continue
            self.encoded_bytes += len(msgspec.msgpack.encode(event))
            if isinstance(event, RequestArrived):
                self.arrived[event.rid] += 1
            elif isinstance(event, RequestEnded):
                self.ended[event.rid] += 1
                self.outcomes[event.outcome] += 1
            self.preemptions += isinstance(event, TaskPreempted)
            self.tasks += isinstance(event, TaskFinished)
        self.seen_until = max((event.at for event in events), default=self.seen_until)
