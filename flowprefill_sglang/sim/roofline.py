"""A cost model from first principles: a model's shape and a GPU's figures, no measurement.

A forward pass of N new tokens reads every weight once and multiplies it with N tokens; whichever takes longer decides
(the roofline), which gives the cost model's knee. Causal attention costs its FLOPs, a TP all-reduce its bytes over the
ring, and every operator a fixed launch. The result has the very form of a fitted model (``core.prefill_cost``), so
the scheduler under simulation cannot tell the two apart.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from flowprefill_sglang.core.prefill_cost import CostModel
from flowprefill_sglang.sim.machine import Machine, Operator, dense_operators

Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(gt=0, le=1)]


class ModelShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A decoder-only transformer with gated feed-forward blocks, dense or of experts."""

    name: str
    layers: Count
    hidden_size: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    intermediate_size: Count
    """Of the feed-forward block; of one expert where there are several."""
    vocab_size: Count
    dtype_bytes: Positive = 2.0
    """Of weights, activations and KV alike."""
    experts: Count = 1
    experts_per_token: Count = 1

    def __post_init__(self) -> None:
        if self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} is more than experts {self.experts}")

    @property
    def kv_bytes_per_token(self) -> float:
        """Keys and values of all layers."""
        return 2 * self.kv_heads * self.head_dim * self.layers * self.dtype_bytes


class GpuFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One GPU, its peers and its way to the decode side. Efficiencies are the shares of the peak that are reached."""

    name: str
    peak_flops: Positive
    """Dense, for the model's dtype."""
    efficiency: Share
    attention_efficiency: Share
    memory_bytes_s: Positive
    memory_efficiency: Share
    operator_overhead_s: NotNegative
    """Launch and gaps, for each operator of each layer."""
    forward_overhead_s: NotNegative
    """Scheduling, preparing the batch, sampling: once a forward."""
    all_reduce_bytes_s: Positive
    """Each way between the GPUs of one TP group."""
    all_reduce_latency_s: NotNegative
    kv_link_bytes_s: Positive
    """To the decode side, one GPU's own link."""
    kv_link_latency_s: NotNegative


class Roofline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model on the GPUs of one TP group: what an analytic cost-model file holds."""

    model: ModelShape
    gpu: GpuFigures
    tp_size: Count = 1

    @property
    def name(self) -> str:
        return f"{self.model.name}, TP{self.tp_size}, {self.gpu.name}"

    def machine(self) -> Machine:
        """The worker that this describes."""
        model, gpu, tp = self.model, self.gpu, self.tp_size
        qkv = model.hidden_size * (model.heads + 2 * model.kv_heads) * model.head_dim
        output = model.heads * model.head_dim * model.hidden_size
        expert = model.hidden_size * model.intermediate_size
        active = qkv + output + 3 * expert * model.experts_per_token
        read = (qkv + output + 3 * expert * model.experts) * model.layers + model.hidden_size * model.vocab_size
        flops, bytes_s = gpu.peak_flops * gpu.efficiency * tp, gpu.memory_bytes_s * gpu.memory_efficiency * tp
        product_s = 2 * active * model.layers / flops
        weights_s = read * model.dtype_bytes / bytes_s
        exchange_s, exchanges_s = self._all_reduce()
        operators = self._operators(qkv, output, expert)
        overhead_s = gpu.forward_overhead_s + gpu.operator_overhead_s * len(operators) * model.layers
        pair_flops = 4 * model.heads * model.head_dim * model.layers
        cost = CostModel(
            base_s=overhead_s + exchanges_s + weights_s,
            request_s=2 * model.hidden_size * model.vocab_size / flops,
            short_token_s=exchange_s,
            long_token_s=exchange_s + product_s,
            knee_tokens=round(weights_s / product_s),
            pair_s=pair_flops / (gpu.peak_flops * gpu.attention_efficiency * tp),
            cached_token_s=model.kv_bytes_per_token / bytes_s,
        )
        return Machine(
            name=self.name,
            cost=cost,
            layers=model.layers,
            operators=operators,
            handoff_base_s=gpu.kv_link_latency_s,
            handoff_token_s=model.kv_bytes_per_token / (gpu.kv_link_bytes_s * tp),
        )

    def _all_reduce(self) -> tuple[float, float]:
        """Seconds for each token and for each forward: two all-reduces a layer, over a ring."""
        model, tp = self.model, self.tp_size
        if tp == 1:
            return 0.0, 0.0
        sent_bytes = 2 * (tp - 1) / tp * model.hidden_size * model.dtype_bytes
        calls = 2 * model.layers
        return calls * sent_bytes / self.gpu.all_reduce_bytes_s, calls * self.gpu.all_reduce_latency_s

    def _operators(self, qkv: float, output: float, expert: float) -> tuple[Operator, ...]:
        dense = dense_operators(qkv, output, 2 * expert, expert)
        if self.model.experts == 1:
            return dense
        block = 3 * expert * self.model.experts_per_token
        total = qkv + output + block
        return (
            Operator(name="qkv_proj", token_share=qkv / total),
            Operator(name="attention", pair_share=1.0),
            Operator(name="o_proj", token_share=output / total),
            Operator(name="moe", token_share=block / total),
        )
