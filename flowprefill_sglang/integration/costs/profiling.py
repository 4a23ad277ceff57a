"""Forwards of made-up prompts on a live SGLang model, timed: what a cost model is fitted to.

Used by the scheduler process at its start, before it takes requests, and by ``flowprefill profile``. What runs is what
a worker runs for a prefill: SGLang's own batch preparation, the eager forward, sampling, and the wait for the sampled
tokens. A cached prefix is KV slots that are reserved and not written: how long attention takes does not depend on what
is in them.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from flowprefill_sglang.core.prefill_cost import Extent
from flowprefill_sglang.errors import OutOfCapacity
from flowprefill_sglang.integration.made_up_prompts import made_up_batch, made_up_request, release

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.model_executor.model_runner import ModelRunner


class ForwardTimer:
    """Runs batches of made-up prompts and says how long each took. Not to be used while requests are under way: it
    takes KV slots and request rows for the length of a call, and the attention backend as its own."""

    def __init__(
        self,
        model_runner: ModelRunner,
        tree_cache: BasePrefixCache,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = model_runner
        self._tree_cache = tree_cache
        self._clock = clock
        self._vocabulary = int(model_runner.model_config.vocab_size)

    @torch.no_grad()
    def __call__(self, extents: Sequence[Extent]) -> float:
        """Seconds of one forward of this batch, from its preparation to its sampled tokens on the host.

        Raises OutOfCapacity when the KV pool or the request rows cannot hold it.
        """
        self._require_room(extents)
        requests = [self._request(extent) for extent in extents]
        try:
            cached = [r for r, extent in zip(requests, extents, strict=True) if extent.cached_tokens]
            if cached:
                self._batch(cached)
            for request, extent in zip(requests, extents, strict=True):
                request.prefix_len = extent.cached_tokens
                request.extend_end = extent.cached_tokens + extent.new_tokens
            self._synchronize()
            started_at = self._clock()
            self._forward(self._batch(requests))
            return self._slowest_rank(self._clock() - started_at)
        finally:
            release(requests, self._tree_cache)

    def _require_room(self, extents: Sequence[Extent]) -> None:
        """SGLang's own allocation would stop half-way, with slots taken that it cannot give back."""
        page = int(self._runner.page_size)
        needed = sum(-(-(extent.cached_tokens + extent.new_tokens) // page) * page for extent in extents)
        free = self._runner.token_to_kv_pool_allocator.available_size() + self._tree_cache.evictable_size()
        rows = self._runner.req_to_token_pool.available_size()
        if needed > free or len(extents) > rows:
            raise OutOfCapacity(
                f"a batch of {len(extents)} requests and {needed} tokens, where {rows} requests and {free} tokens fit"
            )

    def _request(self, extent: Extent) -> Req:
        tokens = extent.cached_tokens + extent.new_tokens
        ids = array("q", (1 + i % (self._vocabulary - 1) for i in range(tokens)))
        return made_up_request("profile", ids, extent.cached_tokens)  # first only the prefix: its slots

    def _batch(self, requests: list[Req]) -> ScheduleBatch:
        return made_up_batch(self._runner, self._tree_cache, requests)

    def _forward(self, batch: ScheduleBatch) -> None:
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch

        if batch.input_ids is None:  # stays on the host until the forward in 0.5.23
            batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device, non_blocking=True)
            batch.prefill_input_ids_cpu = None
        forward_batch = ForwardBatch.init_new(batch, self._runner, return_hidden_states_before_norm=False)
        logits = self._runner.forward(forward_batch).logits_output
        self._runner.sample(logits, forward_batch).tolist()

    def _slowest_rank(self, seconds: float) -> float:
        """The same on all tensor-parallel ranks: they must choose the same next batch, or their collectives hang."""
        from sglang.srt.runtime_context import get_parallel

        group = get_parallel().tp_group
        if group.world_size == 1:
            return seconds
        slowest = torch.tensor(seconds, dtype=torch.float64)
        torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
        return float(slowest)

    def _synchronize(self) -> None:
        if self._runner.device != "cpu":
            torch.get_device_module(self._runner.device).synchronize()
