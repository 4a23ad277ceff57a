"""The cost model of a live SGLang model: kept in a file, or measured at start-up."""

from __future__ import annotations

import hashlib
import logging
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from flowprefill_sglang.core.calibration import Limits, calibrate
from flowprefill_sglang.core.cost_file import HardwareKey, ModelKey, default_path, load
from flowprefill_sglang.core.prefill_cost import CostModel
from flowprefill_sglang.integration.costs.profiling import ForwardTimer

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

START_UP_BUDGET_S: Final = 1.5
"""Of forwards. A short calibration is some 10% off, which the predictor corrects within tens of requests; loading the
model takes longer than this."""


def cost_model(scheduler: Scheduler, cost_file: str | None) -> CostModel:
    """That of ``cost_file``; without one that of the file kept for this model and hardware; without that, a short
    calibration, for which no request may be under way. Call it on all tensor-parallel ranks.

    Raises StartupError for a file that cannot be used.
    """
    model_runner = scheduler.tp_worker.model_runner
    model, hardware = model_key(model_runner), hardware_key(model_runner)
    path = Path(cost_file) if cost_file is not None else default_path(model, hardware)
    if cost_file is not None or path.exists():
        logger.info("prefill cost model: %s", path)
        return load(path, model, hardware)
    found = calibrate(
        ForwardTimer(model_runner, scheduler.tree_cache),
        limits(model_runner, scheduler.chunked_prefill_size, START_UP_BUDGET_S),
    )
    logger.info("prefill cost model from a short calibration (%s is not there): %s", path, found)
    return found


def limits(
    model_runner: ModelRunner, chunk_tokens: int | None, budget_s: float, *, length_factor: float = 4.0
) -> Limits:
    """What may be measured on this model. ``chunk_tokens``: SGLang's ``chunked_prefill_size``, None or -1: none."""
    context, pool = int(model_runner.model_config.context_len), int(model_runner.max_total_num_tokens)
    request = min(context, pool) - 1  # SGLang keeps a token's room for the answer
    return Limits(
        max_new_tokens=min(request, chunk_tokens) if chunk_tokens and chunk_tokens > 0 else request,
        max_request_tokens=request,
        max_batch_tokens=pool - 1,
        max_requests=min(16, model_runner.req_to_token_pool.available_size()),
        budget_s=budget_s,
        length_factor=length_factor,
    )


def model_key(model_runner: ModelRunner) -> ModelKey:
    """What of this model, as loaded, decides how fast it is."""
    from sglang.srt.runtime_context import get_parallel

    digest = hashlib.sha256()
    for name, parameter in sorted(model_runner.model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
    return ModelKey(
        architecture=type(model_runner.model).__name__,
        dtype=str(model_runner.dtype).removeprefix("torch."),
        kv_dtype=str(model_runner.kv_cache_dtype).removeprefix("torch."),
        tp_size=int(get_parallel().tp_size),
        attention_backend=type(model_runner.attn_backend).__name__,
        shape_digest=digest.hexdigest()[:16],
    )


def hardware_key(model_runner: ModelRunner) -> HardwareKey:
    """What this process computes on."""
    device = str(model_runner.device)
    if device == "cpu":
        return HardwareKey(device=device, name=_cpu_name(), threads=torch.get_num_threads())
    return HardwareKey(device=device, name=str(torch.get_device_module(device).get_device_name()))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
