"""Where a forward pass under way can be interrupted: the preemption granularity, as a model.

A forward of L equal layers of m operators each can stop at the entry of an operator (``operator``), of a layer
(``layer``), or not at all (``whole``; between the chunks of a prompt the worker is asked anyway). An operator's time is
its share of the layer's cost: matrix products by their size, attention by all that grows with pairs of tokens, and the
overhead in equal parts.
"""

from __future__ import annotations

from bisect import bisect_left
from enum import StrEnum
from itertools import accumulate
from math import inf

from flowprefill_sglang.sim.machine import Machine

_ROUNDING_S = 1e-9
"""Sums of many parts are off by less, and no operator is this short."""


class Granularity(StrEnum):
    """How finely a running forward can be interrupted."""

    OPERATOR = "operator"
    LAYER = "layer"
    WHOLE = "whole"


def next_boundary_s(
    machine: Machine, parts: tuple[float, float, float], executed_s: float, granularity: Granularity
) -> float:
    """How much of a forward is executed at the first boundary not before ``executed_s``; infinite when it ends first.

    ``parts``: of the forward's seconds, as ``CostModel.parts`` has them.
    """
    if granularity is Granularity.WHOLE:
        return inf
    total_s = sum(parts)
    layer_s = total_s / machine.layers
    layer = int((executed_s + _ROUNDING_S) / layer_s)
    entries = [0.0]
    if granularity is Granularity.OPERATOR:
        overhead_s, tokens_s, pairs_s = (part / machine.layers for part in parts)
        each_s = overhead_s / len(machine.operators)
        lengths = (each_s + tokens_s * one.token_share + pairs_s * one.pair_share for one in machine.operators[:-1])
        entries = list(accumulate(lengths, initial=0.0))
    index = bisect_left(entries, executed_s - layer * layer_s - _ROUNDING_S)
    boundary_s = layer * layer_s + entries[index] if index < len(entries) else (layer + 1) * layer_s
    return boundary_s if boundary_s < total_s - _ROUNDING_S else inf
