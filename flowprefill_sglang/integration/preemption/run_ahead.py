"""Which device a model runs on, and how it is kept near (``prefill_worker.run_ahead``)."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final

import torch

from flowprefill_sglang.integration.preemption.cuda_marks import CudaMarks
from flowprefill_sglang.integration.preemption.operator_shares import operator_shares
from flowprefill_sglang.prefill_worker.run_ahead import InStep, RunAhead, RunAheadLimiter
from flowprefill_sglang.prefill_worker.settings import RunAheadKind, SchedulerSettings

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

BUDGETS_S: Final = {RunAheadKind.BUDGET: None, RunAheadKind.SYNCHRONISE: 0.0, RunAheadKind.UNBOUNDED: math.inf}
"""None: ``RunAheadLimiter``'s own."""


def run_ahead(model_runner: ModelRunner, settings: SchedulerSettings) -> tuple[RunAhead, RunAhead | None]:
    """What the loop talks to, and what the gate does: nothing there where the host computes itself. Call it once the
    model has its boundaries, on the thread that runs it."""
    kind = torch.device(model_runner.device).type
    max_blocking_s = settings.blocking_target_s(kind)
    if kind != "cuda":
        if kind != "cpu":
            logger.warning("run-ahead on %s is not bounded: a task stops only where all it has launched ends", kind)
        return InStep(max_blocking_s), None
    limiter = RunAheadLimiter(
        CudaMarks(torch.device("cuda", torch.cuda.current_device())),
        operator_shares(model_runner.model, model_runner.prefill_cuda_graph_runner),
        max_blocking_s=max_blocking_s,
        budget_s=BUDGETS_S[settings.run_ahead],
    )
    return limiter, limiter
