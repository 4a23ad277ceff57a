"""Operators that would take longer than the blocking target run in slices, with a boundary between two of them.

Linear layers and expert layers are cut by token rows, attention by query rows (``attention_tiles``). What is cut where
depends on the batch's shape and on limits that are set once, at start-up (``core.slicing``), and not on events: an
interrupted forward runs the same slices as an uninterrupted one. An operator of a shape or kind that is not known to be
a function of its rows runs whole.

A sliced operator is a generator that yields between two slices and returns the operator's result; ``run`` puts the gate
around it. Until ``set_limits``, and outside of a task, nothing is sliced.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final
from zlib import crc32

import torch

from flowprefill_sglang.core.prefill_cost import CostModel
from flowprefill_sglang.core.slicing import OperatorCosts, operator_costs, row_limit, row_slices
from flowprefill_sglang.integration.preemption.attention_tiles import AttentionTiles, Steps
from flowprefill_sglang.integration.preemption.operator_work import Kind, Work
from flowprefill_sglang.prefill_worker.boundaries import Gate

logger = logging.getLogger(__name__)

NEVER: Final = 1 << 62
_SLICE: Final = crc32(b"slice")  # what ranks know this kind of boundary by


class SlicedOperators:
    """What is sliced, and how. One per model; owned by the scheduler's thread."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._limits: dict[torch.nn.Module, int] = {}
        self._attention: AttentionTiles | None = None
        self.is_on = False
        """Whether anything is sliced: all that it costs where nothing is."""
        self.shortest = NEVER
        """Rows up to which no linear or expert layer is cut: the one comparison that short ones cost."""
        self.slices = 0
        """Slices run since the start."""

    def set_costs(
        self, work: Work, model: CostModel, max_blocking_s: float, tiles: AttentionTiles, kinds: Sequence[Kind]
    ) -> None:
        """Slice operators of these kinds that ``model`` expects to take longer than ``max_blocking_s``."""
        layers = len(work.attention)
        costs = operator_costs(
            model, row_flops=work.total_row_flops, pair_flops=work.pair_flops, attention_layers=layers
        )
        limits = {
            module: limit
            for module, flops in work.rows.items()
            if work.kinds[module] in kinds and (limit := row_limit(flops * costs.flop_s, max_blocking_s)) is not None
        }
        self.set_limits(limits)
        self.set_attention(tiles if Kind.ATTENTION in kinds and costs.pair_s > 0 else None, costs, max_blocking_s)

    def set_limits(self, limits: dict[torch.nn.Module, int]) -> None:
        """Most rows of a slice, by layer; layers that are not in it run whole."""
        self._limits = limits
        self.shortest = min(limits.values(), default=NEVER)
        self.is_on = bool(limits) or self._attention is not None

    def set_attention(self, tiles: AttentionTiles | None, costs: OperatorCosts, max_blocking_s: float) -> None:
        """How attention is cut; None: it runs whole."""
        self._attention = tiles
        self.is_on = bool(self._limits) or tiles is not None
        if tiles is not None:
            tiles.set_costs(costs, max_blocking_s)

    def off(self) -> None:
        """Slice nothing."""
        self._attention = None
        self.set_limits({})

    def describe(self) -> str:
        """For the log."""
        if not self._limits and self._attention is None:
            return "no operator is sliced"
        rows = f"linear and expert layers above {self.shortest} rows" if self._limits else "no linear or expert layer"
        return f"{rows}, {'attention' if self._attention else 'no attention'} are sliced"

    def rows(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Steps, int] | None:
        """The slices of a linear or expert layer's call that has more than ``shortest`` rows, and how many there are;
        None: run it whole."""
        if len(args) < 2 or (rows := args[1].shape[0]) <= self.shortest:
            return None
        limit = self._limits.get(args[0], NEVER)
        if rows <= limit or args[1].dim() != 2:
            return None
        cuts = row_slices(rows, limit)
        others = [*args[2:], *kwargs.values()]
        if len(cuts) == 1 or not all(_is_sliceable(other, rows) for other in others):
            return None
        return _by_rows(function, args, kwargs, cuts), len(cuts)

    def attention(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Steps, int] | None:
        """The slices of an attention layer's call, and how many there are; None: run it whole."""
        if self._attention is None:
            return None
        return self._attention.steps(function, args, kwargs)

    def run(self, layer: object, steps: Steps, count: int) -> Any:  # what the operator returns
        """Run the slices of a layer's call, ``count`` of about the same length, with a boundary before each of them."""
        gate = self._gate
        while True:
            gate.cross(_SLICE, layer, 1 / count)
            try:
                next(steps)
            except StopIteration as end:
                return end.value
            finally:
                self.slices += 1
                gate.is_closed = False


def _is_sliceable(value: Any, rows: int) -> bool:
    """Whether an argument beside the input is the same for each row, or has one entry a row."""
    if isinstance(value, bool) or value is None or type(value).__name__ == "ForwardBatch":
        return True  # a linear layer asks the batch for its mode only
    return _is_routing(value, rows)


def _is_routing(value: Any, rows: int) -> bool:
    """Whether it is SGLang's ``TopKOutput`` with one entry a row in each tensor."""
    if type(value).__name__ not in ("StandardTopKOutput", "StandardTopKOutputPacked", "PackedTopKOutput"):
        return False
    return all(isinstance(part, torch.Tensor) and part.dim() >= 1 and part.shape[0] == rows for part in value)


def _part(value: Any, begin: int, end: int) -> Any:
    if isinstance(value, tuple):
        return type(value)(*(part[begin:end] for part in value))  # a named tuple of tensors
    return value


def _by_rows(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], cuts: Sequence[tuple[int, int]]
) -> Steps:
    module, x, *others = args
    rows = x.shape[0]
    out: torch.Tensor | None = None
    for begin, end in cuts:
        if begin:
            yield
        result = function(
            module,
            x[begin:end],
            *(_part(other, begin, end) for other in others),
            **{name: _part(value, begin, end) for name, value in kwargs.items()},
        )
        part, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
        if out is None:
            if part.shape[0] != end - begin:  # rows are spread over ranks: not a function of its rows alone
                return function(*args, **kwargs)
            # An expert layer may have worked in place.
            out = x if part.data_ptr() == x.data_ptr() else part.new_empty((rows, *part.shape[1:]))
        if out is not x:
            out[begin:end] = part
        del result, part  # a suspended forward need not hold them
    return out if rest is None else (out, *rest)
