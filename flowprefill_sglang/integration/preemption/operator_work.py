"""What the operators of a model compute: the one count that slices and shares of a prediction are made from.

A layer of SGLang's is counted by its own account of its sizes, which quantised weights do not change, anything else by
the number of its weights. Embeddings and the projection of the last rows onto the vocabulary are no operators.
"""

from __future__ import annotations

import functools
import pkgutil
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import torch


class Kind(StrEnum):
    """Operators that can be sliced, each in its own way."""

    LINEAR = "linear"
    EXPERTS = "experts"
    ATTENTION = "attention"
    ELEMENTWISE = "element-wise"
    """Norms, activations, rotary embedding: no operators where they run whole."""


ELEMENTWISE_CLASSES: Final = (
    "sglang.srt.layers.layernorm.RMSNorm",
    "sglang.srt.layers.layernorm.GemmaRMSNorm",
    "sglang.srt.layers.activation.SiluAndMul",
    "sglang.srt.layers.activation.GeluAndMul",
    "sglang.srt.layers.rotary_embedding.RotaryEmbedding",
)
"""Each computes a row of its outputs from the same row of its inputs, on every device; with all of their subclasses."""


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations of a model's operators that can be sliced."""

    rows: dict[torch.nn.Module, float]
    """Of each linear and expert layer, for one row."""
    kinds: dict[torch.nn.Module, Kind]
    """Of these, and of the element-wise layers, whose operations are not counted."""
    attention: list[torch.nn.Module]
    pair_flops: float
    """Of one attention layer, for one pair of a query and a key."""
    heads: int
    """Query heads of an attention layer, the fewest that one has; at least 1."""

    @property
    def all_kinds(self) -> list[Kind]:
        """Those that the model has, in one order everywhere: ranks must try them alike."""
        has = {*self.kinds.values(), *([Kind.ATTENTION] if self.attention else [])}
        return [kind for kind in Kind if kind in has]

    @property
    def total_row_flops(self) -> float:
        """Of all of them, for one row."""
        return sum(self.rows.values())


def work_of(model: torch.nn.Module) -> Work:
    """What the layers of a loaded model compute, of this rank."""
    rows: dict[torch.nn.Module, float] = {}
    kinds: dict[torch.nn.Module, Kind] = {}
    attention = []
    pair_flops, heads = 0.0, []
    for module in model.modules():
        kind = _kind(module)
        if kind is Kind.ATTENTION:
            sizes: Any = module
            attention.append(module)
            heads.append(max(1, int(sizes.tp_q_head_num)))
            pair_flops = max(pair_flops, 2.0 * sizes.tp_q_head_num * (sizes.qk_head_dim + sizes.v_head_dim))
        elif kind is Kind.ELEMENTWISE:
            kinds[module] = kind
        elif kind is not None:
            rows[module], kinds[module] = _own_row_flops(module), kind
    return Work(rows, kinds, attention, pair_flops, min(heads, default=1))


def row_flops(operator: torch.nn.Module) -> float:
    """Floating-point operations of an operator, all inside of it included, for one row; attention is not in it."""
    return sum(_own_row_flops(module) for module in operator.modules())


def _kind(module: torch.nn.Module) -> Kind | None:
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.radix_attention import RadixAttention

    for cls, kind in ((LinearBase, Kind.LINEAR), (FusedMoE, Kind.EXPERTS), (RadixAttention, Kind.ATTENTION)):
        if isinstance(module, cls):
            return kind
    return Kind.ELEMENTWISE if isinstance(module, _elementwise_classes()) else None


@functools.cache
def _elementwise_classes() -> tuple[type, ...]:
    return tuple(map(pkgutil.resolve_name, ELEMENTWISE_CLASSES))


def _own_row_flops(module: torch.nn.Module) -> float:
    """Without the modules inside of it."""
    kind = _kind(module)
    sizes: Any = module
    if kind is Kind.LINEAR:
        inputs = getattr(module, "input_size_per_partition", None) or sizes.input_size
        outputs = getattr(module, "output_size_per_partition", None) or sizes.output_size
        return float(2 * inputs * outputs)
    if kind is Kind.EXPERTS:  # those that one token is sent to
        matrices = 3 if sizes.moe_runner_config.is_gated else 2
        return float(2 * matrices * sizes.top_k * sizes.hidden_size * sizes.intermediate_size_per_partition)
    return 2.0 * sum(parameter.numel() for parameter in module.parameters(recurse=False))
