"""Slicing is switched on at start-up, after each kind of it was seen to reproduce this model's operators here.

Whether an operator is a function of its rows is read out of SGLang's source (``sliced_operators``); a quantisation that
takes its scale from the whole input, or a model with a layer of its own, may make it false. So every kind is tried with
slices far shorter than any in use. What is not reproduced runs whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch

from flowprefill_sglang.core.prefill_cost import CostModel
from flowprefill_sglang.core.slicing import GRANULE_ROWS, OperatorCosts
from flowprefill_sglang.integration.preemption.attention_keys import least_rows
from flowprefill_sglang.integration.preemption.attention_tiles import AttentionTiles
from flowprefill_sglang.integration.preemption.operator_boundaries import install_cuts
from flowprefill_sglang.integration.preemption.operator_work import Kind, Work, work_of
from flowprefill_sglang.integration.preemption.self_test import PARTS, TOLERANCE, TestRun, farthest
from flowprefill_sglang.integration.preemption.sliced_operators import SlicedOperators

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

    from flowprefill_sglang.integration.preemption.attention_slots import AttentionSlots
    from flowprefill_sglang.prefill_worker.boundaries import Gate
    from flowprefill_sglang.prefill_worker.task import SharedState

logger = logging.getLogger(__name__)

BATCHES: Final = ((2 * GRANULE_ROWS + 22,), (GRANULE_ROWS + 26, GRANULE_ROWS + 6))
"""Prompt lengths in tokens, long enough that attention is cut by rows and by keys, and within and between requests."""
TEST_ROWS: Final = 16
TEST_PAIRS: Final = float(GRANULE_ROWS * GRANULE_ROWS)
ROUNDING: Final = {torch.float32: 1e-3, torch.float64: 1e-9}
"""How far apart results may be, over the largest of them, when sums are taken in another order."""
HALF_ROUNDING: Final = 0.1
"""The same of 16-bit numbers: their rounding, through all layers. Wrong rows are off by about 1."""


def slice_long_operators(
    scheduler: Scheduler,
    gate: Gate,
    state: SharedState,
    slices: SlicedOperators,
    slots: AttentionSlots,
    model: CostModel,
    max_blocking_s: float,
    everybody: Callable[[list[Kind]], list[list[Kind]]] = lambda kinds: [kinds],
) -> None:
    """Slice what ``model`` expects to take longer than ``max_blocking_s``, of the kinds that can be sliced here.

    ``everybody`` gathers a value of every rank: they must cut alike, or they would stop at different boundaries. On the
    scheduler's thread, with boundaries and attention slots in place and no request under way. Raises what a forward
    raises.
    """
    runner = scheduler.tp_worker.model_runner
    install_cuts(gate, slices)
    work = work_of(runner.model)
    tiles = AttentionTiles(slots.build, type(runner.attn_backend).__name__)
    kinds = []
    for kind in work.all_kinds:
        fault = slicing_fault(scheduler, gate, state, slices, work, tiles, kind)
        if fault is None:
            kinds.append(kind)
        else:
            logger.warning("%s layers are not sliced: %s", kind, fault)
    kinds = [kind for kind in kinds if all(kind in theirs for theirs in everybody(kinds))]
    least = least_rows(type(runner.attn_backend).__name__, work.heads, torch.device(runner.device))
    slices.set_costs(work, model, max_blocking_s, tiles, kinds, least_rows=least)
    logger.info("blocking target %g ms: %s", max_blocking_s * 1000, slices.describe())


def slicing_fault(
    scheduler: Scheduler,
    gate: Gate,
    state: SharedState,
    slices: SlicedOperators,
    work: Work,
    tiles: AttentionTiles,
    kind: Kind,
) -> str | None:
    """What goes wrong when operators of this kind are cut as short as can be; None if nothing does. Slicing is off
    afterwards."""
    if kind is Kind.ATTENTION:
        slices.set_attention(tiles, OperatorCosts(0.0, pair_s=1.0), TEST_PAIRS)
    else:
        slices.set_limits({module: TEST_ROWS for module, its in work.kinds.items() if its is kind})
    run = TestRun(scheduler, BATCHES)
    try:
        with torch.no_grad():
            whole = run.one_by_one()
            sliced, _ = run.interleaved(gate, state, is_stopped=False)
            again, _ = run.interleaved(gate, state, is_stopped=False)
            stopped, _ = run.interleaved(gate, state)
    finally:
        slices.off()
    for name, parts, sliced_parts, again_parts, stopped_parts in zip(PARTS, whole, sliced, again, stopped, strict=True):
        scale = max(float(part.abs().max()) for part in parts)
        allowed = scale * ROUNDING.get(parts[0].dtype, HALF_ROUNDING)
        found = farthest(parts, sliced_parts)
        if not found <= allowed:  # NaN is a fault
            return f"{name} are {found:.2g} off those of whole operators, of which the largest is {scale:.2g}"
        found = farthest(sliced_parts, stopped_parts)
        if not found <= TOLERANCE * farthest(sliced_parts, again_parts):
            return f"{name} of a forward pass that was stopped between slices are {found:.2g} off"
    return None
