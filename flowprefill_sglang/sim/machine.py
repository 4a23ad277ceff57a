"""What a simulated prefill worker computes with: how long forwards take, and where they can be interrupted."""

from __future__ import annotations

from dataclasses import dataclass

from flowprefill_sglang.core.prefill_cost import CostModel, Extent


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One operator of a layer, by its part of what a layer costs; the parts of all operators add up to 1 each."""

    name: str
    token_share: float = 0.0
    """Of the cost that grows with tokens: matrix products."""
    pair_share: float = 0.0
    """Of the cost that grows with pairs of tokens: attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One prefill worker's hardware with its model. All layers cost the same."""

    name: str
    cost: CostModel
    layers: int
    operators: tuple[Operator, ...]
    """Of one layer, in order."""
    handoff_base_s: float = 0.0
    handoff_token_s: float = 0.0
    """From the end of a prefill to the first token at the decode side: a fixed part, and one for each token of KV."""
    preempt_s: float = 0.0
    """Device time lost when a forward is stopped for another, until that begins or goes on: SGLang makes its batch. Of
    what lies between a forward's end and the next, nothing is saved: that is part of each forward's cost."""
    host_before_s: float = 0.0
    host_after_s: float = 0.0
    """Of one core that does everything else for all workers (HTTP, tokenization, routing, decoding), in order: before a
    worker knows of a request, and from the end of its prefill to its first token. 0: no time, as with cores enough."""

    def alone_s(self, tokens: int) -> float:
        """Seconds of the forward of one whole prompt, nothing else in the batch."""
        return self.cost.seconds((Extent(tokens),))

    def handoff_s(self, tokens: int) -> float:
        """Seconds until the KV of so many tokens has reached the decode side. Links are never congested here."""
        return self.handoff_base_s + self.handoff_token_s * tokens


def dense_operators(qkv: float, output: float, up: float, down: float) -> tuple[Operator, ...]:
    """A dense decoder layer's operators, as the product's boundaries see it; arguments: relative sizes of its matrix
    products."""
    total = qkv + output + up + down
    return (
        Operator(name="qkv_proj", token_share=qkv / total),
        Operator(name="attention", pair_share=1.0),
        Operator(name="o_proj", token_share=output / total),
        Operator(name="gate_up_proj", token_share=up / total),
        Operator(name="down_proj", token_share=down / total),
    )


LLAMA_LIKE = dense_operators(qkv=6_144, output=4_096, up=28_672, down=14_336)
"""Llama-3-8B's, for a fitted cost model, which does not say what it was fitted to."""
