"""When ended handoffs are taken in, which frees their KV: at once if somebody waits for it, else several at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowprefill_sglang.integration.prefill.wakeup import MAY_WAIT_S, News, Taken
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
        if self._may_wait(taken.at):
            if self.ended_at is not None:
                self._gate.raise_within(MAY_WAIT_S)
            return None
        self._seen_at = taken.at
        ended_at, self.ended_at = self.ended_at, None
        scheduler = self._scheduler
        has_freed = scheduler.disagg_prefill_inflight_queue and scheduler.process_disagg_prefill_inflight_queue()
        return (ended_at or 0.0) if has_freed and self._news.is_memory_short else None

    def _may_wait(self, now: float) -> bool:
        """Whether ended handoffs are better taken in later, several at once: nobody waits for what they hold."""
        if self._news.is_memory_short or not self._scheduler.req_to_metadata_buffer_idx_allocator.available_size():
            return False
        if self._core.running is not None:
            # Transports that report an end only when they are polled are polled between two tasks.
            return self.ended_at is None
        return bool(self._core.waiting) and now < self._seen_at + MAY_WAIT_S
