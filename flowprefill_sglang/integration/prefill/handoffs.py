"""When a prefill worker takes in the KV handoffs that have ended, and frees what they held."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowprefill_sglang.integration.prefill.wakeup import MAY_WAIT_S, News
from flowprefill_sglang.prefill_worker.boundaries import Gate

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler


class Handoffs:
    """Owned by the scheduler's thread."""

    def __init__(self, scheduler: Scheduler, news: News, gate: Gate) -> None:
        self._scheduler = scheduler
        self._news = news
        self._gate = gate
        self._seen_at = float("-inf")

    def take_in(self, now: float, *, is_running: bool, is_waiting: bool) -> float | None:
        """Free what ended handoffs held, if that must be now; when the first of them ended if that is news to somebody,
        who waits for memory, else None. 0: they ended at a time that is not known.

        ``is_running``: a task is under way; ``is_waiting``: a request is.
        """
        scheduler, news = self._scheduler, self._news
        if self._may_wait(now, is_running=is_running, is_waiting=is_waiting):
            if news.ended_at is not None:
                self._gate.raise_within(MAY_WAIT_S)
            return None
        self._seen_at = now
        ended_at, news.ended_at = news.ended_at, None
        if (
            scheduler.disagg_prefill_inflight_queue
            and scheduler.process_disagg_prefill_inflight_queue()
            and news.is_memory_short
        ):
            return ended_at or 0.0
        return None

    def _may_wait(self, now: float, *, is_running: bool, is_waiting: bool) -> bool:
        """Whether they are better taken in later, several at once: nobody waits for what they hold."""
        if self._news.is_memory_short or not self._scheduler.req_to_metadata_buffer_idx_allocator.available_size():
            return False
        if is_running:
            # Transports that report an end only when they are polled are polled between two tasks.
            return self._news.ended_at is None
        return is_waiting and now < self._seen_at + MAY_WAIT_S
