"""May a task start? Memory decides, and no preemption may lead to a deadlock on it.

Two kinds of memory. *KV*: a started request keeps its KV until the decode side has it, suspended or not; a prompt that
is computed in chunks takes its KV chunk by chunk. If several prompts were begun and none could get its next chunk, all
would wait for each other. So a prompt is begun only if the pool, after what the half-prefilled ones still need, can
hold all of it (the banker's rule with the prompt's length as the claim): then the half-prefilled can always end one
after another. *Activations*: a suspended task keeps those of the operator it stopped at; their sum has a budget.

Where it is refused a request that could be on time, tasks that were given up may be started over (``retraction``).

Requests whose KV is on its way to the decode side give it back without any help of ours, so they are no part of this.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto


class Refusal(Enum):
    """Why a task cannot start now."""

    TASKS = auto()
    """As many tasks as there are slots for are under way."""
    KV = auto()
    ACTIVATIONS = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What one task under way holds."""

    kv_tokens: int
    """Slots of the KV pool that nobody but its requests uses."""
    claimed_kv_tokens: int
    """What its requests need after its pass."""
    activation_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The memory as a round finds it."""

    free_kv_tokens: int
    """Slots of the KV pool that are free or hold cached prefixes nobody uses."""
    claimed_kv_tokens: int
    """What half-prefilled requests still need until the end of their prompts."""
    tasks: int
    """Begun and not ended."""
    max_tasks: int
    activation_bytes: int
    """Bound on what suspended tasks hold."""
    max_activation_bytes: int

    def refusal(self, kv_tokens: int, activation_bytes: int, *, is_begun: bool) -> Refusal | None:
        """Why a batch cannot start; None if it can.

        ``kv_tokens``: the whole prompts of its requests. ``activation_bytes``: its own bound. ``is_begun``: it is the
        next chunk of a half-prefilled request, whose KV is claimed already.

        With nothing under way nothing can be gained by waiting, so then only SGLang's own admission decides.
        """
        if self.tasks >= self.max_tasks:
            return Refusal.TASKS
        if self.tasks and self.activation_bytes + activation_bytes > self.max_activation_bytes:
            return Refusal.ACTIVATIONS
        is_alone = self.tasks == 0 and self.claimed_kv_tokens == 0
        if not is_begun and not is_alone and not self.has_kv(kv_tokens):
            return Refusal.KV
        return None

    def has_kv(self, tokens: int) -> bool:
        """Whether so many slots are free and not claimed."""
        return self.free_kv_tokens - self.claimed_kv_tokens >= tokens

    def without(self, holding: Holding) -> Room:
        """What there is once a task is gone."""
        return self._with(holding, 1)

    def plus(self, holding: Holding) -> Room:
        """What there was before it was gone."""
        return self._with(holding, -1)

    def _with(self, holding: Holding, gone: int) -> Room:
        return replace(
            self,
            free_kv_tokens=self.free_kv_tokens + gone * holding.kv_tokens,
            claimed_kv_tokens=self.claimed_kv_tokens - gone * holding.claimed_kv_tokens,
            tasks=self.tasks - gone,
            activation_bytes=self.activation_bytes - gone * holding.activation_bytes,
        )
