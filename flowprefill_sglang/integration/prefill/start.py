"""How SGLang's scheduler process becomes a FlowPrefill one: its prefill event loops are replaced by ``serve``.

Everything that a suspended forward pass needs is put in place here, once the model is loaded and before the first
request is taken in; what cannot be ends the process with a reason.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch

from flowprefill_sglang.errors import FlowPrefillError, StartupError
from flowprefill_sglang.integration.hooks import Hook, HookKind, stop
from flowprefill_sglang.prefill_worker.settings import SchedulerSettings

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

    from flowprefill_sglang.core.batching import BatchLimits
    from flowprefill_sglang.prefill_worker.boundaries import Gate

logger = logging.getLogger(__name__)

GRAMMAR_POLL_S: Final = 1e-5
"""How long SGLang may wait for grammars to compile whenever a batch is made. It would be 5 ms, for each urgent request;
here a compiled grammar is an event like others, and the next round takes it."""

READY_SLOTS: Final = 4
"""Attention backends built at start-up. More are built when more tasks are under way at once, which is rare; on a GPU
one takes milliseconds to build and, with flashinfer, some megabytes."""


def hooks(settings: SchedulerSettings) -> list[Hook]:
    """Replace SGLang's two prefill loops of one pipeline stage."""

    @torch.no_grad()  # as SGLang's own loops; a replaced function loses its decorators
    def event_loop(scheduler: Scheduler) -> None:
        try:
            serve(scheduler, settings)
        except FlowPrefillError as error:
            stop(error)

    mixin = "sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin"
    why = "requests would be prefilled without preemption, in SGLang's own order"
    return [
        Hook(target=f"{mixin}.{name}", kind=HookKind.REPLACE, function=event_loop, why=why)
        for name in ("event_loop_normal_disagg_prefill", "event_loop_overlap_disagg_prefill")
    ]


def serve(scheduler: Scheduler, settings: SchedulerSettings) -> None:
    """Run the prefill loop on SGLang's scheduler until it is told to exit. Raises StartupError."""
    from flowprefill_sglang.core.aging import AgingLimits
    from flowprefill_sglang.core.prefill_cost import Predictor
    from flowprefill_sglang.integration.costs.cost_model import cost_model
    from flowprefill_sglang.integration.preemption.attention_slots import AttentionSlots
    from flowprefill_sglang.integration.preemption.forward_state import ForwardState, obstacles
    from flowprefill_sglang.integration.preemption.lora_slots import hold_adapters
    from flowprefill_sglang.integration.preemption.operator_boundaries import ensure_boundaries, install
    from flowprefill_sglang.integration.preemption.prefill_graphs import choice
    from flowprefill_sglang.integration.preemption.run_ahead import run_ahead
    from flowprefill_sglang.integration.preemption.self_test import interruption_fault
    from flowprefill_sglang.integration.preemption.sliced_operators import SlicedOperators
    from flowprefill_sglang.integration.preemption.slicing import slice_long_operators
    from flowprefill_sglang.integration.prefill.control import control
    from flowprefill_sglang.integration.prefill.loop import PrefillLoop
    from flowprefill_sglang.integration.prefill.memory import PrefillMemory
    from flowprefill_sglang.integration.prefill.tensor_parallel import join
    from flowprefill_sglang.integration.prefill.wakeup import news
    from flowprefill_sglang.prefill_worker.boundaries import Gate
    from flowprefill_sglang.prefill_worker.reporter import SchedulerReporter, from_environment
    from flowprefill_sglang.prefill_worker.scheduler import PrefillScheduler

    if scheduler.max_recv_per_poll >= 0:
        # What a limited read leaves in the socket announces itself to nobody (wakeup.Doorbell).
        raise StartupError("SGLANG_SCHEDULER_MAX_RECV_PER_POLL is set: unset it, or use --prefill-scheduler stock")
    model_runner = scheduler.tp_worker.model_runner
    group = join(scheduler)
    gate = Gate(lease=group.lease)
    slices = SlicedOperators(gate)
    install(gate, slices)
    places, are_layers = ensure_boundaries(model_runner.model, gate)
    if not places:
        raise StartupError(
            f"{type(model_runner.model).__name__} has no operator that FlowPrefill knows, so its forward pass cannot "
            "be interrupted; use --prefill-scheduler stock"
        )
    slots = AttentionSlots(model_runner, gate)
    slots.reserve(READY_SLOTS)
    slots.install()
    state = ForwardState(model_runner, stage_metrics=scheduler.scheduler_stage_metrics)
    with group.blaming_the_dead():
        reasons = group.everybody("; ".join(obstacles()))  # all ranks try it, or none: a forward pass takes all
        if not any(reasons):
            reasons = group.everybody(interruption_fault(scheduler, gate, state) or "")
    if any(reasons):
        reason = next(filter(None, reasons))
        logger.error("forward passes run whole, one after the other, in FlowPrefill's order: %s", reason)
        gate = Gate()  # which no operator crosses
    costs = group.everybody(cost_model(scheduler, settings.cost_file))[0]  # the leader's: a file may differ
    target_s = settings.slice_target_s(torch.device(model_runner.device).type)
    if target_s and not any(reasons):
        with group.blaming_the_dead():
            slice_long_operators(scheduler, gate, state, slices, slots, costs, target_s, group.everybody)
    core = PrefillScheduler(
        Predictor(costs),
        policy=settings.policy,
        aging=AgingLimits(max_wait_s=settings.max_wait_s, max_suspend_s=settings.max_suspend_s),
        batching=_batch_limits(scheduler, settings),
        now=time.monotonic(),
    )
    device, gate.device = run_ahead(model_runner, settings)
    choice.leave_to(lambda: any(reasons) or device.is_short)  # what runs whole may as well run as a graph
    _adapt(scheduler, gate)
    loop = PrefillLoop(
        scheduler,
        core,
        gate=gate,
        state=state,
        reporter=from_environment() if group.ranks.leads else SchedulerReporter(None),
        news=news,
        memory=PrefillMemory(scheduler, settings, group.least),
        settings=settings,
        device=device,
        ranks=group.ranks,
    )
    if model_runner.lora_manager is not None:
        hold_adapters(model_runner.lora_manager, loop.adapters_in_use)
    logger.info(
        "FlowPrefill schedules this worker: policy %s, %d boundaries a forward pass%s",
        settings.policy,
        places,
        " (decoder layers; this model has few operators that can be told apart)" if are_layers else "",
    )
    control.loop = loop
    try:
        with group.blaming_the_dead():
            loop.run()
    finally:
        control.loop = None
        group.ranks.close()


def _batch_limits(scheduler: Scheduler, settings: SchedulerSettings) -> BatchLimits:
    from sglang.srt.runtime_context import get_schedule

    from flowprefill_sglang.core.batching import BatchLimits

    limits = BatchLimits(
        max_new_tokens=settings.batch_tokens, alpha=settings.slack_fraction, page_tokens=scheduler.page_size
    )
    most = get_schedule().prefill_max_requests
    return limits if most is None else replace(limits, max_requests=min(limits.max_requests, most))


def _adapt(scheduler: Scheduler, gate: Gate) -> None:
    """Settings of SGLang's scheduler that assume its own loop."""
    scheduler.idle_sleeper = None  # the loop has its own bed, which handoffs wake too
    scheduler.grammar_manager.SGLANG_GRAMMAR_POLL_INTERVAL = GRAMMAR_POLL_S
    # SGLang's admission keeps up to a page and three tokens free beside a prompt, but its intake does not count them: a
    # prompt that just fits into the pool would never be admitted, nor be refused, and would in time block all others.
    intake, page_tokens = scheduler.disagg_prefill_bootstrap_queue, scheduler.page_size
    admissible_tokens = scheduler.token_to_kv_pool_allocator.available_size() - page_tokens - 3
    intake.max_input_len = min(intake.max_input_len, admissible_tokens // page_tokens * page_tokens)
    # Progress is boundaries: many forward passes may begin and none end for a while, or one long one run alone.
    scheduler.watchdog.get_counter = lambda: scheduler.forward_ct + gate.boundaries
    if getattr(scheduler, "soft_watchdog", None) is not None:
        scheduler.soft_watchdog.get_counter = scheduler.watchdog.get_counter
