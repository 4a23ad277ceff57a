"""When ended handoffs are taken in, which frees their KV: at once if somebody waits for it, else several at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowprefill_sglang.integration.prefill.wakeup import ENDED_MAY_WAIT_S, MAY_WAIT_S, News, Taken
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.scheduler import PrefillScheduler

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler


class EndedHandoffs:
    """Owned by the scheduler's thread. Decides the same on every rank: to take one in is a collective."""

    def __init__(self, scheduler: Scheduler, core: PrefillScheduler, gate: Gate, news: News) -> None:
        self._scheduler = scheduler
        self._core = core
        self._gate = gate
        self._news = news
        self._seen_at = 0.0
        self.ended_at: float | None = None
        """When the first of those ended that are not taken in yet."""

    def take_in(self, taken: Taken) -> float | None:
        """Free what ended handoffs held, unless that can wait. When the first of them ended (0 if nobody knows) if this
        has freed memory that somebody waits for; else None."""
        if self.ended_at is None:
            self.ended_at = taken.ended_at
        if self._may_wait(taken):
            if self.ended_at is not None:
                self._gate.raise_within(self.ended_at + ENDED_MAY_WAIT_S - taken.at)
            return None
        self._seen_at = taken.at
        ended_at, self.ended_at = self.ended_at, None
        scheduler = self._scheduler
        has_freed = scheduler.disagg_prefill_inflight_queue and scheduler.process_disagg_prefill_inflight_queue()
        return (ended_at or 0.0) if has_freed and self._news.is_memory_short else None

    def _may_wait(self, taken: Taken) -> bool:
        """Whether ended handoffs are better taken in later, several at once and not in the middle of a forward pass:
        nobody waits for what they hold."""
        scheduler = self._scheduler
        if taken.has_failure or self._news.is_memory_short or scheduler._engine_paused:
            return False
        if not scheduler.req_to_metadata_buffer_idx_allocator.available_size():
            return False
        if self.ended_at is not None and taken.at >= self.ended_at + ENDED_MAY_WAIT_S:
            return False
        # Transports that report an end only when they are polled are polled between two tasks.
        return self._core.running is not None or (bool(self._core.waiting) and taken.at < self._seen_at + MAY_WAIT_S)
