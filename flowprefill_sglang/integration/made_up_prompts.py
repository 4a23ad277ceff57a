"""Prompts that nobody sent, on a live SGLang 0.5.23 model: made, batched, looked at and given back.

For forwards before the first request: the start-up self-test and the timing of forwards. Neither goes through SGLang's
admission, so its queues and its prefix cache see nothing of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.model_executor.model_runner import ModelRunner


def made_up_request(rid: str, ids: array[int], extend_end: int) -> Req:
    """A prompt of these token ids for one greedy token, whose next batch computes up to ``extend_end``."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    parameters = SamplingParams(temperature=0, max_new_tokens=1)
    parameters.normalize(None)
    request = Req(rid=rid, origin_input_text="", origin_input_ids=ids, sampling_params=parameters)
    request.full_untruncated_fill_ids = ids
    request.logprob_start_len = -1
    request.extend_end = extend_end
    return request


def made_up_batch(model_runner: ModelRunner, tree_cache: BasePrefixCache, requests: list[Req]) -> ScheduleBatch:
    """A prefill of these requests, with KV slots and rows taken."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    batch = ScheduleBatch.init_new(
        reqs=requests,
        req_to_token_pool=model_runner.req_to_token_pool,
        token_to_kv_pool_allocator=model_runner.token_to_kv_pool_allocator,
        tree_cache=tree_cache,
        model_config=model_runner.model_config,
        enable_overlap=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )
    batch.prepare_for_extend()
    return batch


def release(requests: Sequence[Req], tree_cache: BasePrefixCache) -> None:
    """Give back what these requests hold; nothing of it enters the prefix cache."""
    from sglang.srt.mem_cache.common import release_kv_cache

    for request in requests:
        if request.kv.holds_kv:
            release_kv_cache(request, tree_cache, checkpoint=False)


def computed_kv(model_runner: ModelRunner, request: Req) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Copies of K and V of each layer, ``[tokens, KV heads, head size]``, as far as the request was computed."""
    row = model_runner.req_to_token_pool.req_to_token[request.kv.req_pool_idx, : request.extend_end].long()
    pool = model_runner.token_to_kv_pool
    layers = range(pool.start_layer, pool.start_layer + pool.layer_num)
    return [(pool.get_key_buffer(layer)[row].clone(), pool.get_value_buffer(layer)[row].clone()) for layer in layers]
