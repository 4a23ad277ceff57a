"""How long a forward pass goes from one boundary to the next: in this process, undisturbed, with slices or without.

All computation is on one thread, and times are CPU seconds of it: what else the machine does is not in them, but for
what it takes of caches and memory.
"""

from __future__ import annotations

import random
import time
from itertools import pairwise

import torch

from flowprefill_sglang.core.calibration import calibrate
from flowprefill_sglang.integration.costs.cost_model import START_UP_BUDGET_S, limits
from flowprefill_sglang.integration.costs.profiling import ForwardTimer
from flowprefill_sglang.integration.offline_forward import OfflineEngine
from flowprefill_sglang.integration.preemption.attention_slots import AttentionSlots
from flowprefill_sglang.integration.preemption.attention_tiles import AttentionTiles
from flowprefill_sglang.integration.preemption.operator_boundaries import install, install_cuts
from flowprefill_sglang.integration.preemption.operator_work import Kind, work_of
from flowprefill_sglang.integration.preemption.sliced_operators import SlicedOperators
from flowprefill_sglang.prefill_worker.boundaries import Gate

WHOLE = 0.0
"""Blocking target of whole operators."""


class OperatorGaps:
    """A real SGLang model on one core, with a worker's boundaries. One a process."""

    def __init__(self, model: str, longest_tokens: int) -> None:
        """Costs come from a short calibration, as in a worker. Prompts have up to ``longest_tokens``."""
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)  # as a worker's loop
        self._engine = OfflineEngine(
            model, chunked_prefill_size=-1, max_total_tokens=2 * longest_tokens, log_level="error"
        )
        self._gate = Gate()
        self._slices = SlicedOperators(self._gate)
        install(self._gate, self._slices)
        install_cuts(self._gate, self._slices)
        slots = AttentionSlots(self._engine.model_runner, self._gate)
        slots.install()
        runner, scheduler = self._engine.model_runner, self._engine.scheduler
        self._costs = calibrate(
            ForwardTimer(runner, scheduler.tree_cache, clock=time.thread_time),
            limits(runner, scheduler.chunked_prefill_size, START_UP_BUDGET_S),
        )
        self._work = work_of(self._engine.model_runner.model)
        self._tiles = AttentionTiles(slots.build, type(self._engine.model_runner.attn_backend).__name__)
        self._crossed_at: list[float] = []
        self._gate.watch(self._note)

    def gaps_ms(self, tokens: int, target_ms: float, rng: random.Random) -> list[float]:
        """CPU milliseconds from the start to the first boundary of a prompt's forward pass, from there to the next, and
        so on to its end. ``target_ms``: as ``--max-blocking-ms``."""
        if target_ms == WHOLE:
            self._slices.off()
        else:
            self._slices.set_costs(self._work, self._costs, target_ms / 1000, self._tiles, list(Kind))
        request = self._engine.request([rng.randrange(97, 123) for _ in range(tokens)])
        batch = self._engine.batch([request])
        self._gate.open(_never)
        self._crossed_at[:] = [time.thread_time()]
        self._engine.run(batch)
        self._note()
        self._gate.close()
        self._engine.release(request, keep=False)
        return [1000 * (after - before) for before, after in pairwise(self._crossed_at)]

    def _note(self) -> bool:
        self._crossed_at.append(time.thread_time())
        return False


def _never() -> None:
    raise AssertionError("an undisturbed forward was stopped")
