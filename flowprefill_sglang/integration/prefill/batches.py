"""SGLang's side of a task: making the batch of chosen requests, and taking its result back.

Admission, prefix matching, KV allocation and chunking stay SGLang's: its own ``get_new_batch_prefill`` is called with a
waiting queue that holds just the chosen requests. SGLang 0.5.23 knows one half-prefilled request at a time, in
``Scheduler.chunked_req``; here that attribute is set only inside a call to SGLang, to the request the call is about,
so that any number of requests can be half-prefilled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sglang.srt.disaggregation.utils import is_aborted
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.observability.req_time_stats import set_schedule_time_batch

from flowprefill_sglang.prefill_worker.task import ForwardTask

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import GenerationBatchResult, Scheduler


@dataclass(slots=True, eq=False)
class Batch:
    """A batch that SGLang has admitted: its KV is allocated, and it will run once."""

    schedule_batch: ScheduleBatch
    chunked: Req | None
    """The request of which only a chunk is in the batch, if there is one."""
    reqs: Sequence[Req] = field(init=False)
    """Its requests, in SGLang's terms. Those it was made of: SGLang takes ``chunked`` out of its own list once the pass
    has ended."""

    def __post_init__(self) -> None:
        self.reqs = tuple(self.schedule_batch.reqs)


@dataclass(slots=True, eq=False)
class Begun:
    """SGLang's side of a task."""

    batch: Batch
    forward: ForwardTask[GenerationBatchResult]
    activation_bytes: int
    """Bound on what it holds while it is suspended."""


class PrefillBatches:
    """Makes and finishes batches on SGLang's scheduler. Owned by the scheduler's thread."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def begin(self, reqs: Sequence[Req]) -> Batch | None:
        """A batch of these waiting requests, or of the first few of them; None when SGLang admits none now."""
        scheduler = self._scheduler
        chosen = set(reqs)
        others = [req for req in scheduler.waiting_queue if req not in chosen]
        scheduler.waiting_queue = list(reqs)
        try:
            return self._build()
        finally:
            scheduler.waiting_queue += others

    def next_chunk(self, req: Req) -> Batch | None:
        """The next chunk of a half-prefilled request; None when SGLang does not admit it now."""
        scheduler = self._scheduler
        if scheduler.enable_lora and not self._finds_adapter_slot(req):
            return None
        waiting, scheduler.waiting_queue = scheduler.waiting_queue, []
        scheduler.chunked_req = req
        try:
            return self._build()
        finally:
            scheduler.waiting_queue = waiting
            scheduler.chunked_req = None

    def finish(self, batch: Batch, result: GenerationBatchResult) -> Req | None:
        """Take the result of a batch's forward pass. Returns the request that is half-prefilled now, if any; it may be
        aborted by now.

        A finished chunk goes into the radix cache and on its way to the decode side at once, as SGLang does before it
        makes the next chunk's batch.
        """
        scheduler = self._scheduler
        scheduler.chunked_req = batch.chunked
        try:
            scheduler.process_batch_result(batch.schedule_batch, result)
            if batch.chunked is not None and not is_aborted(batch.chunked):
                scheduler.process_prefill_chunk(last_batch=batch.schedule_batch, running_batch=scheduler.running_batch)
            return batch.chunked
        finally:
            scheduler.chunked_req = None

    def retire(self, reqs: Sequence[Req]) -> None:
        """Give back everything that aborted requests hold, and tell their clients. Their batch runs no more."""
        scheduler = self._scheduler
        retired = []
        for req in reqs:
            if scheduler._retire_aborted_prefill_result(req):
                req.time_stats.set_completion_time()
                retired.append(req)
        if retired:
            scheduler.output_streamer.stream_output(retired, any(req.return_logprob for req in retired))

    def requeue(self, reqs: Sequence[Req]) -> None:
        """Give back the KV of requests whose batch runs no more, and let them wait again, as if it had never been made:
        what SGLang does with an optimistic prefill that comes too early (``optimistic_release_and_requeue``), but
        that these have met their decode instance already. Nothing of them may have been sent (``is_unsent``)."""
        scheduler = self._scheduler
        for req in reqs:
            scheduler.tree_cache.finish(req.cache_request_handle, CacheRequestOutcome.ABORT)
            release_kv_cache(req, scheduler.tree_cache, checkpoint=False)
            req.reset_for_retract()
            req.time_stats.reset_prefill_retry_time()
            req.advance_cache_request_handle()
            req.time_stats.set_wait_queue_entry_time()
            scheduler.waiting_queue.append(req)
            req.init_next_round_input(scheduler.tree_cache, cow_mamba=False)

    @staticmethod
    def is_unsent(req: Req) -> bool:
        """Whether the decode side has nothing of this request yet, beyond the prefix that it had before."""
        is_it: bool = req.start_send_idx == req.disagg_decode_prefix_len
        return is_it

    def _finds_adapter_slot(self, req: Req) -> bool:
        """Whether the request's adapter finds a slot beside those that are held; SGLang asks this of waiting requests
        only, since nothing can be under way when it makes the next chunk."""
        is_found: bool = self._scheduler.tp_worker.model_runner.lora_manager.validate_lora_batch({req.lora_id})
        return is_found

    def _build(self) -> Batch | None:
        scheduler = self._scheduler
        scheduler.running_batch.batch_is_full = False  # no decode batch ever runs here to reset it
        plan = scheduler.get_new_batch_prefill(scheduler.running_batch)
        scheduler.running_batch = plan.running_batch
        batch = plan.batch_to_run
        if batch is None:
            scheduler.chunked_req = None
            return None
        set_schedule_time_batch(batch)
        batch = scheduler.ngram_embedding_manager.prepare_for_forward(batch, chunked_req=scheduler.chunked_req)
        chunked, scheduler.chunked_req = scheduler.chunked_req, None
        return Batch(batch, chunked)
