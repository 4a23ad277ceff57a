"""Who joins the request that runs next: SLO-aware batching (arXiv 2602.16603), as a pure function.

The forward pass of one short prompt takes nearly as long as that of several, so small waiting requests join the head,
under a budget of new tokens, while the predicted time of the joint batch leaves the head a part ``alpha`` of its
objective. A prompt that alone fills the budget runs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import Final

from flowprefill_sglang.core.candidate import Candidate
from flowprefill_sglang.core.prefill_cost import Extent

MAX_ADDED_SHARE: Final = 0.5
"""Of what it takes alone, one that was given up may add so much to a batch: it is taken along only where the batch
saves the larger part. Up to 0.8 does the same on long prompts; no limit costs there what the rule gains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    max_new_tokens: int = 2048
    """Of the whole batch. Beyond a few hundred tokens a batch saves little and everyone in it waits for its end."""
    max_requests: int = 64
    alpha: float = 0.1
    """Part of its objective that stays unspent for each request of the batch that is on time (the paper's value)."""
    max_considered: int = 32
    """How many of the others are looked at, which bounds a round whatever the queue. Twice as many hardly helped."""
    page_tokens: int = 1
    """KV is handed out in pages of so many tokens, and each request takes whole ones."""

    def __post_init__(self) -> None:
        if min(self.max_new_tokens, self.max_requests, self.page_tokens) < 1:
            raise ValueError(f"max_new_tokens, max_requests and page_tokens must be positive: {self}")
        if self.max_considered < 0 or not 0 <= self.alpha < 1:
            raise ValueError(f"max_considered must not be negative, alpha must be in [0, 1): {self}")

    def added_s(self, extent: Extent, parts: Callable[[Sequence[Extent]], tuple[float, float, float]]) -> float:
        """Seconds of the device that a request takes as a part of the largest batch: its share, by tokens, of what a
        forward costs beside attention, and its own attention. What it takes alone, if that is less or it fills a batch.
        ``parts``: as ``CostModel.parts``."""
        alone = parts((extent,))
        if self.max_requests == 1 or extent.new_tokens >= self.max_new_tokens:
            return sum(alone)
        overhead_s, tokens_s, _ = parts((Extent(self.max_new_tokens, 0),))
        return min(sum(alone), (overhead_s + tokens_s) * extent.new_tokens / self.max_new_tokens + alone[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What runs as one task."""

    members: list[Candidate]
    """The head first, the others in the order in which they joined."""
    extents: list[Extent]
    """One for each member."""
    predicted_s: float


def fill_batch(
    head: Candidate,
    others: Iterable[Candidate],
    now: float,
    *,
    extent_of: Callable[[Candidate], Extent | None],
    predict: Callable[[Sequence[Extent]], float],
    kv_room_tokens: int,
    limits: BatchLimits,
    kept: Container[Candidate] | None = None,
) -> Batch:
    """The head and those that join it.

    ``others``: who may join, in that order; the head among them is passed over. ``extent_of``: what a candidate would
    compute in this batch, or None if it cannot join one (a task, a prompt that goes in chunks); the head's must not be
    None. ``predict``: seconds of a batch on the device, called at most once for each candidate considered, with a list
    that is not to be kept. ``kv_room_tokens``: KV free for new tokens; that the head fits is the caller's business.
    ``kept``: those that the policy counts on being on time, all the others given up; None: it does not say.

    Whoever would be on time if all ran one by one in this order stays so, as far as prediction goes (which must not
    charge a batch more than its parts). One who would be late alone may be carried by the batch, and cost a little.

    - Whoever in the batch is on time keeps ``alpha`` of its objective when the next one joins. The one who joins must
      be on time itself and no more: if its time is short, in the batch is still better than after it.
    - Whoever is passed over, being large or a task, is overtaken by those who join after it. If it can be on time after
      the batch and after those passed over before it, it stays so.
    - Whoever is late, or would be in the batch, joins only a head that is late too, and delays no one in the batch who
      is on time. The paper has no word on late ones. To fill a late head's batch clears a backlog faster and breaks no
      promise; late ones in the batch of a head on time cost some later arrivals theirs (both seen in simulation).

    - Who was given up joins only where it takes a small part of what it takes alone (``MAX_ADDED_SHARE``), and may be
      overtaken: its time has been given to others.

    S-EDF's order is the one to join in, for ``feasible`` too, whose own order has those it gave up last: the batch may
    have room for them after all, and the earliest deadlines gain most by it (docs/scheduling.md).

    Raises ``ValueError`` if the head has no extent.
    """
    extent = extent_of(head)
    if extent is None:
        raise ValueError(f"candidate {head.key} heads a batch and has no extent")
    filling = _Filling(head, extent, now, predict, kv_room_tokens, limits, kept)
    for other in islice((other for other in others if other is not head), limits.max_considered):
        if filling.is_full():
            break
        extent = extent_of(other)
        if extent is None or not filling.try_join(other, extent):
            filling.pass_over(other)
    return Batch(members=filling.members, extents=filling.extents, predicted_s=filling.ends_at - now)


class _Filling:
    """A batch while it is being put together."""

    def __init__(
        self,
        head: Candidate,
        extent: Extent,
        now: float,
        predict: Callable[[Sequence[Extent]], float],
        kv_room_tokens: int,
        limits: BatchLimits,
        kept: Container[Candidate] | None,
    ) -> None:
        self._kept = kept
        self.members, self.extents = [head], [extent]
        self._now, self._predict, self._limits = now, predict, limits
        self._tokens_left = limits.max_new_tokens - extent.new_tokens
        self._kv_tokens_left = kv_room_tokens - self._kv_tokens(extent)
        self.ends_at = now + predict(self.extents)
        self._is_head_late = self.ends_at > head.deadline_at
        self._must_end_at = inf if self._is_head_late else self._margin_at(head)
        self._overtaken_s = 0.0

    def is_full(self) -> bool:
        """Whether nobody can join any more, however small."""
        return (
            self._tokens_left <= 0
            or self._kv_tokens_left <= 0
            or len(self.members) >= self._limits.max_requests
            or self.ends_at >= self._must_end_at
        )

    def try_join(self, other: Candidate, extent: Extent) -> bool:
        kv_tokens = self._kv_tokens(extent)
        if extent.new_tokens > self._tokens_left or kv_tokens > self._kv_tokens_left:
            return False
        self.extents.append(extent)
        ends_at = self._now + self._predict(self.extents)
        is_late = ends_at > other.deadline_at
        is_dear = self._is_given_up(other) and ends_at - self.ends_at > MAX_ADDED_SHARE * other.remaining_s
        if is_dear or ends_at > self._must_end_at or (is_late and not self._is_head_late):
            self.extents.pop()
            return False
        self.members.append(other)
        self.ends_at = ends_at
        self._tokens_left -= extent.new_tokens
        self._kv_tokens_left -= kv_tokens
        if not is_late:
            self._must_end_at = min(self._must_end_at, self._margin_at(other))
        return True

    def pass_over(self, other: Candidate) -> None:
        """Whoever joins from now on overtakes ``other``, which must not cost it its deadline."""
        if self._is_given_up(other):
            return
        latest_start_at = other.deadline_at - self._overtaken_s - other.remaining_s
        if self.ends_at <= latest_start_at:
            self._overtaken_s += other.remaining_s
            self._must_end_at = min(self._must_end_at, latest_start_at)

    def _is_given_up(self, other: Candidate) -> bool:
        return self._kept is not None and other not in self._kept

    def _margin_at(self, member: Candidate) -> float:
        """When the batch must have ended for the member to keep its part of its objective."""
        if member.deadline_at == inf:
            return inf
        return member.deadline_at - self._limits.alpha * member.objective_s

    def _kv_tokens(self, extent: Extent) -> int:
        return -(-extent.new_tokens // self._limits.page_tokens) * self._limits.page_tokens
