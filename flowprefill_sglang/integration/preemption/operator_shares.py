"""What each operator of a model is of a forward pass: how predictions of whole passes become predictions of operators.

The cost model (``core.prefill_cost``) knows attention, which grows with pairs of tokens, and the rest. Attention is
shared equally by the attention operators, which do the same work in every layer. The rest is shared by the operations
of the linear and expert layers, which are most of it (``operator_work``). What is mispredicted by it, windows of
attention for example, is corrected online as far as both kinds go (``prefill_worker.run_ahead``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from flowprefill_sglang.integration.preemption.operator_boundaries import boundary_owners
from flowprefill_sglang.integration.preemption.operator_work import row_flops
from flowprefill_sglang.prefill_worker.run_ahead import Cost

WHOLE: Final = Cost(1.0, 1.0)
"""The replay of a graph is one operator, and the only one of its forward pass."""


def operator_shares(model: torch.nn.Module, graph_runner: object = None) -> Mapping[object, Cost]:
    """Of each operator of a model with boundaries, its share of a forward pass' attention and of the rest; each adds up
    to 1. ``graph_runner``: SGLang's runner of prefill graphs, where there is one."""
    owners = list(boundary_owners(model))
    attention = {owner: _attention_operators(owner) for owner in owners}
    rest = {owner: row_flops(owner) for owner in owners}
    all_attention, all_rest = sum(attention.values()), sum(rest.values())
    shares: dict[object, Cost] = {
        owner: Cost(
            attention[owner] / all_attention if all_attention else 1 / len(owners),
            rest[owner] / all_rest if all_rest else 1 / len(owners),
        )
        for owner in owners
    }
    if graph_runner is not None:
        shares[graph_runner] = WHOLE
    return shares


def _attention_operators(module: torch.nn.Module) -> int:
    """Of SGLang, inside of a module or itself; a whole decoder layer without any counts as one."""
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.layers.radix_linear_attention import RadixLinearAttention

    found = sum(isinstance(inner, RadixAttention | RadixLinearAttention) for inner in module.modules())
    return found or int(_is_whole_layer(module))


def _is_whole_layer(module: torch.nn.Module) -> bool:
    """Whether the boundary is on this one object and not on its class (``ensure_boundaries``)."""
    return "forward" in vars(module)
