"""A real SGLang scheduler in this process, without a server and without its loop: load a model, run batches, see KV.

For what must look at a forward from close by: proofs that an interrupted forward equals an uninterrupted one, and
measurements. SGLang 0.5.23 keeps its configuration and process groups in module globals, so a process can hold one such
engine in its life.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from flowprefill_sglang.errors import InternalError, StartupError
from flowprefill_sglang.integration.made_up_prompts import computed_kv

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

_made: list[str] = []  # the model of this process's engine


class OfflineEngine:
    """One model and SGLang's scheduler around it. Not thread-safe."""

    def __init__(self, model_path: str, **settings: Any) -> None:
        """``settings`` are fields of SGLang's ``ServerArgs``. Takes some ten seconds, most of them for imports.

        Raises StartupError when this process has an engine already.
        """
        if _made:
            raise StartupError(f"this process has SGLang loaded with {_made[0]} already; start another one")
        _made.append(model_path)
        self.scheduler: Scheduler = _scheduler(model_path, settings)
        self.model_runner = self.scheduler.tp_worker.model_runner
        self._requests = 0

    def request(self, tokens: Sequence[int], lora_id: str | None = None, **sampling: Any) -> Req:
        """A prompt of token ids, for one greedy token unless ``sampling`` (SGLang's parameters) says otherwise.
        ``lora_id``: of SGLang's ``LoRARef``; None: the base model."""
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        parameters = SamplingParams(**{"temperature": 0.0, "max_new_tokens": 1} | sampling)
        parameters.normalize(None)
        self._requests += 1
        request = Req(
            rid=f"offline-{self._requests}",
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=parameters,
            lora_id=lora_id,
            vocab_size=self.model_runner.model_config.vocab_size,
        )
        request.logprob_start_len = -1
        return request

    def batch(self, requests: Sequence[Req], chunk_tokens: int | None = None) -> ScheduleBatch:
        """A prefill of these requests, as SGLang's scheduler makes it: with what the prefix cache has of them.

        ``chunk_tokens`` bounds the tokens computed by it. A request that was cut then is continued by the next batch
        that is asked for it alone, after ``checkpoint``. InternalError when not all of the requests got in.
        """
        scheduler = self.scheduler
        resumed = [request for request in requests if request.kv.holds_kv]
        scheduler.chunked_prefill_size = chunk_tokens
        scheduler.chunked_req = resumed[0] if resumed else None
        scheduler.waiting_queue = [request for request in requests if request not in resumed]
        batch = scheduler.get_new_batch_prefill(scheduler.running_batch).batch_to_run
        scheduler.chunked_req = None
        if batch is None or list(batch.reqs) != list(requests):
            raise InternalError(f"SGLang did not take {len(requests)} requests into one batch")
        return batch

    def run(self, batch: ScheduleBatch) -> tuple[torch.Tensor, list[int]]:
        """SGLang's own ``run_batch``: logits ``[requests, vocabulary]`` and the sampled tokens. This, inside of a
        ``ForwardTask``, is what a prefill worker runs."""
        with torch.no_grad():
            result = self.scheduler.run_batch(batch)
        return result.logits_output.next_token_logits, result.next_token_ids.tolist()

    def checkpoint(self, request: Req) -> None:
        """Hand what was computed of a request to the prefix cache. Before the request's next chunk."""
        from sglang.srt.mem_cache.common import checkpoint_kv_cache

        checkpoint_kv_cache(request, self.scheduler.tree_cache)

    def release(self, request: Req, *, keep: bool) -> None:
        """The request is over. ``keep``: its KV stays in the prefix cache; else its own part is freed."""
        from sglang.srt.mem_cache.common import release_kv_cache

        release_kv_cache(request, self.scheduler.tree_cache, checkpoint=keep)

    def kv(self, request: Req) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copies of K and V of each layer, ``[tokens, KV heads, head size]``, as far as the request was computed."""
        return computed_kv(self.model_runner, request)

    def forget(self) -> None:
        """Empty the prefix cache and the KV pool. No request may hold any of it."""
        scheduler = self.scheduler
        scheduler.tree_cache.reset()
        scheduler.req_to_token_pool.clear()
        scheduler.token_to_kv_pool_allocator.clear()

    def free_tokens(self) -> int:
        """KV slots that nobody holds, those that the prefix cache could give up included."""
        scheduler = self.scheduler
        return int(scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size())


def _scheduler(model_path: str, settings: dict[str, Any]) -> Scheduler:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, ServerArgs

    arguments = ServerArgs(model_path=model_path, disable_overlap_schedule=True, **settings)
    arguments.resolve_once()
    ports = PortArgs.init_new(arguments)
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    from sglang.srt.managers.scheduler import Scheduler

    return Scheduler(arguments, ports)
