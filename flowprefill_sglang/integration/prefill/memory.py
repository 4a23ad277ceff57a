"""What memory SGLang 0.5.23's scheduler has for another task, in the terms of ``prefill_worker.admission``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil
import torch

from flowprefill_sglang.integration.preemption.activation_bound import activation_bound
from flowprefill_sglang.prefill_worker.admission import Holding, Refusal, Room

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

    from flowprefill_sglang.prefill_worker.scheduler import PrefillScheduler, Request, Task
    from flowprefill_sglang.prefill_worker.settings import SchedulerSettings


class PrefillMemory:
    """Measures once, at its making, what is free after weights and KV pool; asks SGLang for the rest each time."""

    def __init__(
        self, scheduler: Scheduler, settings: SchedulerSettings, least: Callable[[int], int] = lambda value: value
    ) -> None:
        """``least``: the smallest of a value over all ranks, called once."""
        self._scheduler = scheduler
        self._max_tasks = settings.max_tasks
        self._page_tokens: int = scheduler.page_size
        runner = scheduler.tp_worker.model_runner
        self._bound = activation_bound(runner.model_config, dtype=runner.dtype, tp_size=scheduler.tp_size)
        free_bytes = least(_free_bytes(runner.device, scheduler.tp_size))
        self._max_activation_bytes = int(settings.activation_fraction * free_bytes)

    def room(self, core: PrefillScheduler) -> Room:
        """What there is now, with everything begun as ``core`` knows it."""
        pool, cache = self._scheduler.token_to_kv_pool_allocator, self._scheduler.tree_cache
        return Room(
            free_kv_tokens=pool.available_size() + cache.evictable_size(),
            claimed_kv_tokens=sum(map(self.kv_slots, core.claims())),
            tasks=sum(1 for _ in core.tasks),
            max_tasks=self._max_tasks,
            activation_bytes=sum(self.activation_bytes(task.new_tokens, task.cached_tokens) for task in core.tasks),
            max_activation_bytes=self._max_activation_bytes,
        )

    def refusal(self, room: Room, head: Request, *, is_begun: bool) -> Refusal | None:
        """Why nothing of this request can start in this room, ``is_begun`` its next chunk; None if it can."""
        slots = self.kv_slots(head.new_tokens + head.cached_tokens)
        activation_bytes = self.activation_bytes(head.new_tokens, head.cached_tokens)
        return room.refusal(slots, activation_bytes, is_begun=is_begun)

    def holding(self, task: Task) -> Holding:
        """What would be free without this task. The prefixes that it keeps in the cache are not counted: others may
        use them, too."""
        pairs = list(zip(task.requests, task.extents, strict=True))
        rests = [request.new_tokens - extent.new_tokens for request, extent in pairs]
        return Holding(
            kv_tokens=sum(extent.new_tokens for _, extent in pairs),
            claimed_kv_tokens=sum(self.kv_slots(rest) for rest in rests if rest),
            activation_bytes=self.activation_bytes(task.new_tokens, task.cached_tokens),
        )

    def kv_slots(self, tokens: int) -> int:
        """KV slots that so many tokens of one request take, and the page that SGLang's admission keeps beside them."""
        return (-(-tokens // self._page_tokens) + 1) * self._page_tokens

    def activation_bytes(self, new_tokens: int, cached_tokens: int) -> int:
        """Bound on what a task that computes these tokens holds while it is suspended; of a longer prompt, its first
        chunk."""
        return self._bound.bytes(min(new_tokens, self._scheduler.chunked_prefill_size or new_tokens), cached_tokens)


def _free_bytes(device: str, ranks: int) -> int:
    if device == "cpu":  # of which all ranks of this worker have a share
        return int(psutil.virtual_memory().available) // ranks
    return int(torch.get_device_module(device).mem_get_info()[0])
