"""The router's picture of its decode instances: results of health checks in, states out; no socket, no clock.

Decode instances are stock SGLang: they know nothing of the router, so it asks them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flowprefill_sglang.router.states import WorkerState, transition


@dataclass(frozen=True, kw_only=True)
class DecodeFacts:
    """What a decode instance says about itself."""

    model: str
    names: frozenset[str]
    """Names that clients may ask for: the model's, and those of loaded LoRA adapters."""
    cards: tuple[dict[str, Any], ...]
    """Its entries of ``/v1/models``."""
    transfer_backend: str | None = None
    version: str | None = None
    """SGLang's."""


@dataclass(slots=True, kw_only=True, eq=False)
class DecodeInstance:
    """One decode instance, named by its URL."""

    url: str
    state: WorkerState = WorkerState.JOINING
    facts: DecodeFacts | None = None
    reason: str = "not checked yet"
    """Why it is in its state."""
    failures: int = 0
    in_flight: int = 0
    outstanding_tokens: int = 0
    dispatched_total: int = 0
    """Requests handed to it since it was added."""

    def assign(self, tokens: int) -> None:
        self.in_flight += 1
        self.outstanding_tokens += tokens
        self.dispatched_total += 1

    def release(self, tokens: int) -> None:
        self.in_flight -= 1
        self.outstanding_tokens -= tokens


@dataclass(kw_only=True)
class DecodeRegistry:
    """Decode instances by URL."""

    failure_threshold: int
    instances: dict[str, DecodeInstance] = field(default_factory=dict)
    _ready: list[DecodeInstance] | None = None

    def add(self, url: str) -> DecodeInstance:
        """The instance of this URL, new or known."""
        return self.instances.setdefault(url, DecodeInstance(url=url))

    def remove(self, url: str) -> DecodeInstance | None:
        """Forget an instance; requests that it has end as they would have."""
        self._ready = None
        return self.instances.pop(url, None)

    def ready(self) -> list[DecodeInstance]:
        """Instances that take requests, in the order they were added. Do not change the list."""
        if self._ready is None:
            self._ready = [one for one in self.instances.values() if one.state is WorkerState.READY]
        return self._ready

    def on_healthy(self, instance: DecodeInstance, facts: DecodeFacts) -> bool:
        """A check succeeded. True when that changed the state."""
        instance.failures, instance.facts = 0, facts
        return self._set(instance, WorkerState.READY, "healthy")

    def on_failure(self, instance: DecodeInstance, reason: str, *, certain: bool = False) -> bool:
        """A check failed; ``certain`` when the instance is surely gone. True when that changed the state."""
        instance.failures += 1
        if instance.state is WorkerState.READY and not certain and instance.failures < self.failure_threshold:
            return False
        if instance.state is WorkerState.JOINING:
            instance.reason = reason  # it may still be starting
            return False
        return self._set(instance, WorkerState.DEAD, reason)

    def _set(self, instance: DecodeInstance, state: WorkerState, reason: str) -> bool:
        instance.reason = reason
        if instance.state is state:
            return False
        if instance.state is WorkerState.DEAD:
            instance.state = transition(instance.state, WorkerState.JOINING)
        instance.state = transition(instance.state, state)
        self._ready = None
        return True
