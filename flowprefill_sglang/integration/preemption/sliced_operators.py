"""Operators that would take longer than the blocking target run in slices, with a boundary between two of them.

Linear layers and expert layers are cut by token rows, attention by query rows (``attention_tiles``). What is cut where
depends on the batch's shape and on limits that are set once, at start-up (``core.slicing``), and not on events: an
interrupted forward runs the same slices as an uninterrupted one. An operator of a shape or kind that is not known to be
a function of its rows runs whole.

Norms, activations and rotary embeddings are cut by rows too, into as many rows as the layer of most work: a row of
theirs takes less. They are no operators otherwise, so they have a boundary before each slice and none where they are
short.

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
from flowprefill_sglang.errors import InternalError
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
        self,
        work: Work,
        model: CostModel,
        max_blocking_s: float,
        tiles: AttentionTiles,
        kinds: Sequence[Kind],
        *,
        least_rows: int = 0,
    ) -> None:
        """Slice operators of these kinds that ``model`` expects to take longer than ``max_blocking_s``.
        ``least_rows``: as in ``OperatorCosts``."""
        costs = operator_costs(
            model,
            row_flops=work.total_row_flops,
            pair_flops=work.pair_flops,
            attention_layers=len(work.attention),
            least_rows=least_rows,
        )
        limits = {
            module: limit
            for module, flops in work.rows.items()
            if work.kinds[module] in kinds and (limit := row_limit(flops * costs.flop_s, max_blocking_s)) is not None
        }
        if Kind.ELEMENTWISE in kinds and work.rows:
            longest = row_limit(max(work.rows.values()) * costs.flop_s, max_blocking_s)
            if longest is not None:
                limits |= {module: longest for module, its in work.kinds.items() if its is Kind.ELEMENTWISE}
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
        rows = f"layers above {self.shortest} rows" if self._limits else "no layer by rows"
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

    def elementwise(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Steps, int] | None:
        """The slices of an element-wise layer's call, likewise."""
        if len(args) < 2 or not isinstance(args[1], torch.Tensor) or (rows := args[1].shape[0]) <= self.shortest:
            return None
        limit = self._limits.get(args[0], NEVER)
        values = [*args[1:], *kwargs.values()]
        if rows <= limit or not all(value is None or _has_rows(value, rows) for value in values):
            return None
        if getattr(args[0], "_quant_linear", None) is not None:
            return None  # it quantises too, and returns what is not one entry a row
        cuts = row_slices(rows, limit)
        return (_elementwise(function, args, kwargs, cuts), len(cuts)) if len(cuts) > 1 else None

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


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 1 and value.shape[0] == rows


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


def _elementwise(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], cuts: Sequence[tuple[int, int]]
) -> Steps:
    """Each argument is a tensor of one entry a row, or None; so is each result, which may be an argument's memory."""
    module, *inputs = args
    rows = inputs[0].shape[0]
    whole = [value for value in (*inputs, *kwargs.values()) if value is not None]
    outs: list[torch.Tensor] = []
    is_tuple = False
    for begin, end in cuts:
        if begin:
            yield
        found = function(
            module,
            *(None if value is None else value[begin:end] for value in inputs),
            **{name: None if value is None else value[begin:end] for name, value in kwargs.items()},
        )
        is_tuple = isinstance(found, tuple)
        parts = found if is_tuple else (found,)
        if not outs:
            if any(part.shape[0] != end - begin for part in parts):
                raise InternalError(f"{type(module).__name__} does not return one entry a row")
            outs = [_place(part, whole, rows) for part in parts]
        for part, out in zip(parts, outs, strict=True):
            if part.data_ptr() != out[begin:end].data_ptr():
                out[begin:end] = part
        del found, parts, part  # a suspended forward need not hold them
    return tuple(outs) if is_tuple else outs[0]


def _place(part: torch.Tensor, inputs: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
    """Where a result goes whose first rows are ``part``: to the input that was changed in place, or anew."""
    for value in inputs:
        if value.data_ptr() == part.data_ptr() and value.shape[1:] == part.shape[1:] and value.dtype == part.dtype:
            return value
    return part.new_empty((rows, *part.shape[1:]))
