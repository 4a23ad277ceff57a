"""Whether this very model, on this very machine, can be interrupted: tried at start-up, before the first request.

The list of what is moved (``forward_state``) was read out of SGLang's source, and a model may keep state of a forward
in a place of its own. So three small batches are run one after the other and then interleaved at every boundary. Logits
and KV must be the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import partial
from itertools import chain, cycle
from typing import TYPE_CHECKING, Final

import torch

from flowprefill_sglang.integration.made_up_prompts import (
    computed_kv,
    made_up_batch,
    made_up_request,
    release,
)
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.task import ForwardTask, SharedState

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
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
    run = TestRun(scheduler, BATCHES)
    with torch.no_grad():
        alone, again = run.one_by_one(), run.one_by_one()
        interleaved, suspensions = run.interleaved(gate, state)
    if not suspensions:
        return "no boundary stopped a forward pass"
    for name, first, second, third in zip(PARTS, alone, again, interleaved, strict=True):
        allowed = TOLERANCE * farthest(first, second)
        found = farthest(first, third)
        if not found <= allowed:  # NaN is a fault
            return f"{name} of an interrupted forward pass is {found:.2g} off an uninterrupted one"
    return None


PARTS: Final = ("the logits", "the KV")
Tensors = tuple[list[torch.Tensor], list[torch.Tensor]]


class TestRun:
    """The same made-up batches, prefilled in several ways: their logits, and KV by request and layer."""

    __test__ = False  # not what pytest looks for

    def __init__(self, scheduler: Scheduler, batches: Sequence[Sequence[int]]) -> None:
        """``batches``: prompt lengths in tokens."""
        self._scheduler = scheduler
        self._batches = batches
        self._runner = scheduler.tp_worker.model_runner

    def one_by_one(self) -> Tensors:
        """Outside of tasks."""
        parts: Tensors = ([], [])
        for number, lengths in enumerate(self._batches):
            requests = self._requests(number, lengths)
            try:
                self._note(parts, requests, self._forward(self._batch(requests)))
            finally:
                release(requests, self._scheduler.tree_cache)
        return parts

    def interleaved(self, gate: Gate, state: SharedState, *, is_stopped: bool = True) -> tuple[Tensors, int]:
        """In tasks that stop at every boundary, or at none; and how often they were stopped."""
        parts: Tensors = ([], [])
        batches = [self._requests(number, lengths) for number, lengths in enumerate(self._batches)]
        tasks: list[ForwardTask[torch.Tensor]] = []
        if is_stopped:
            gate.raise_flag()
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
                release(requests, self._scheduler.tree_cache)
        return parts, sum(task.suspensions for task in tasks)

    def _requests(self, number: int, lengths: Sequence[int]) -> list[Req]:
        vocabulary = int(self._scheduler.model_config.vocab_size)
        made = []
        for row, length in enumerate(lengths):
            step = 2 * (number * 7 + row) + 3  # other tokens in every prompt
            ids = array("q", (1 + (i + 1) * step % (vocabulary - 1) for i in range(length)))
            made.append(made_up_request(f"self-test-{number}-{row}", ids, length))
        return made

    def _batch(self, requests: list[Req]) -> ScheduleBatch:
        return made_up_batch(self._runner, self._scheduler.tree_cache, requests)

    def _forward(self, batch: ScheduleBatch) -> torch.Tensor:
        from sglang.srt.managers.overlap_utils import resolve_forward_inputs

        resolve_forward_inputs(batch, self._scheduler.future_map)
        output = self._scheduler.tp_worker.forward_batch_generation(batch).logits_output
        logits: torch.Tensor = output.next_token_logits
        return logits.clone()

    def _note(self, parts: Tensors, requests: Sequence[Req], logits: torch.Tensor) -> None:
        parts[0].append(logits)
        for request in requests:
            parts[1].extend(chain.from_iterable(computed_kv(self._runner, request)))


def farthest(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """The largest difference of two numbers at one place; NaN if there is one."""
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(some, others, strict=True))
