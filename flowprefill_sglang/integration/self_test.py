"""Whether this very model, on this very machine, can be interrupted: tried at start-up, before the first request.

The list of what is moved (``forward_state``) was read out of SGLang's source, and a model may keep state of a forward
in a place of its own. So three small batches are run one after the other and then interleaved at every boundary. Logits
and KV must be the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, Final

import torch

from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.task import ForwardTask, SharedState

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

BATCHES: Final = ((24,), (24,), (11, 18))
"""Prompt lengths in tokens: two batches of one shape, whose mixing up raises no error, and one of another."""
TOLERANCE: Final = 8.0
"""Where two uninterrupted runs differ already (kernels that add up in any order): how many times as far apart an
interrupted one may be."""


def interruption_fault(scheduler: Scheduler, gate: Gate, state: SharedState) -> str | None:
    """What goes wrong when forwards are interrupted; None if nothing does.

    Runs on the scheduler's thread, with boundaries and attention slots in place and no request under way. Takes some
    KV slots for the time of the call. Raises what a forward raises.
    """
    run = _Run(scheduler)
    with torch.no_grad():
        alone, again = run.one_by_one(), run.one_by_one()
        interleaved, suspensions = run.interleaved(gate, state)
    if not suspensions:
        return "no boundary stopped a forward pass"
    for name, first, second, third in zip(_PARTS, alone, again, interleaved, strict=True):
        allowed = TOLERANCE * max(_distance(a, b) for a, b in zip(first, second, strict=True))
        found = max(_distance(a, c) for a, c in zip(first, third, strict=True))
        if not found <= allowed:  # NaN is a fault
            return f"{name} of an interrupted forward pass is {found:.2g} off an uninterrupted one"
    return None


_PARTS: Final = ("the logits", "the KV")
_Tensors = tuple[list[torch.Tensor], list[torch.Tensor]]


class _Run:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def one_by_one(self) -> _Tensors:
        parts: _Tensors = ([], [])
        for number, lengths in enumerate(BATCHES):
            requests = self._requests(number, lengths)
            try:
                self._note(parts, requests, self._forward(self._batch(requests)))
            finally:
                self._release(requests)
        return parts

    def interleaved(self, gate: Gate, state: SharedState) -> tuple[_Tensors, int]:
        parts: _Tensors = ([], [])
        batches = [self._requests(number, lengths) for number, lengths in enumerate(BATCHES)]
        tasks: list[ForwardTask[torch.Tensor]] = []
        gate.raise_flag()  # stop at every boundary
        try:
            tasks += [ForwardTask(partial(self._forward, self._batch(requests)), gate, state) for requests in batches]
            for task in cycle(tasks):
                if all(task.is_over for task in tasks):
                    break
                if not task.is_over:
                    task.advance()
            for requests, task in zip(batches, tasks, strict=True):
                self._note(parts, requests, task.result)
        finally:
            gate.clear()
            for task in tasks:
                task.discard()
            for requests in batches:
                self._release(requests)
        return parts, sum(task.suspensions for task in tasks)

    def _requests(self, number: int, lengths: Sequence[int]) -> list[Req]:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        vocabulary = int(self._scheduler.model_config.vocab_size)
        made = []
        for row, length in enumerate(lengths):
            step = 2 * (number * 7 + row) + 3  # other tokens in every prompt
            ids = array("q", (1 + (i + 1) * step % (vocabulary - 1) for i in range(length)))
            parameters = SamplingParams(temperature=0, max_new_tokens=1)
            parameters.normalize(None)
            request = Req(
                rid=f"self-test-{number}-{row}", origin_input_text="", origin_input_ids=ids, sampling_params=parameters
            )
            request.full_untruncated_fill_ids = ids
            request.logprob_start_len = -1
            request.extend_end = length
            made.append(request)
        return made

    def _batch(self, requests: list[Req]) -> Any:
        from sglang.srt.managers.schedule_batch import ScheduleBatch

        scheduler = self._scheduler
        batch = ScheduleBatch.init_new(
            reqs=requests,
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            tree_cache=scheduler.tree_cache,
            model_config=scheduler.model_config,
            enable_overlap=False,
            spec_algorithm=scheduler.spec_algorithm,
        )
        batch.prepare_for_extend()
        return batch

    def _forward(self, batch: Any) -> torch.Tensor:
        from sglang.srt.managers.overlap_utils import resolve_forward_inputs

        resolve_forward_inputs(batch, self._scheduler.future_map)
        output = self._scheduler.tp_worker.forward_batch_generation(batch).logits_output
        logits: torch.Tensor = output.next_token_logits
        return logits.clone()

    def _note(self, parts: _Tensors, requests: Sequence[Req], logits: torch.Tensor) -> None:
        parts[0].append(logits)
        pool, rows = (
            self._scheduler.tp_worker.model_runner.token_to_kv_pool,
            self._scheduler.req_to_token_pool.req_to_token,
        )
        for request in requests:
            row = rows[request.kv.req_pool_idx, : request.extend_end].long()
            for layer in range(pool.start_layer, pool.start_layer + pool.layer_num):
                parts[1].extend((pool.get_key_buffer(layer)[row].clone(), pool.get_value_buffer(layer)[row].clone()))

    def _release(self, requests: Sequence[Req]) -> None:
        from sglang.srt.mem_cache.common import release_kv_cache

        for request in requests:
            if request.kv.holds_kv:
                release_kv_cache(request, self._scheduler.tree_cache, checkpoint=False)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max())
