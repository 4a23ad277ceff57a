"""How much memory a suspended forward can hold beside its KV.

A forward that stops at a boundary keeps what its Python frames still name: the residual, the input of the layer, and
either the tensors of attention or those of the feed-forward part. What operators use inside of themselves is free again
at a boundary, but for the output of one that runs in slices. The bound is the larger of the two parts;
``tests/exactness`` compares it with what real forwards hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

INDEX_BYTES: Final = 64
"""Per new token beside activations: token id, position, KV slot, and what backends derive from them, 8 bytes each."""
CACHED_INDEX_BYTES: Final = 16
"""Per token of a cached prefix: its KV slot in the attention backend's index, and once more for a second pool."""
LAYER_WIDTHS: Final = 4
"""Tensors as wide as the model: residual, the layer's input, its normalised form or a sum of the two, and the output of
a linear or expert layer that is stopped between two of its slices."""


@dataclass(frozen=True, slots=True)
class ActivationBound:
    """Upper bound, in bytes per rank, of what a forward holds at any boundary."""

    new_token_bytes: int
    """For each token that it computes."""

    def bytes(self, new_tokens: int, cached_tokens: int = 0) -> int:
        """Of a forward over ``new_tokens`` behind a cached prefix of ``cached_tokens``."""
        return new_tokens * self.new_token_bytes + cached_tokens * CACHED_INDEX_BYTES


def activation_bound(
    model_config: Any,  # SGLang's ModelConfig
    *,
    dtype: torch.dtype | None = None,
    tp_size: int = 1,
) -> ActivationBound:
    """The bound for a model; ``dtype``: of its activations, where it is not that of the configuration."""
    item_bytes = (dtype or model_config.dtype).itemsize
    width = (
        LAYER_WIDTHS * model_config.hidden_size + max(_attention(model_config), _feed_forward(model_config)) // tp_size
    )
    return ActivationBound(int(width * item_bytes) + INDEX_BYTES)


def _attention(config: Any) -> int:
    """The projections, the same again after norms and rotary embedding, and the output of attention."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim, v_head_dim = config.head_dim, config.v_head_dim
    projected = heads * head_dim + kv_heads * (head_dim + v_head_dim)
    return int(2 * projected + heads * v_head_dim)


def _feed_forward(config: Any) -> int:
    """Gate and up projection and their product, of the widest feed-forward part; an expert layer is one operator, so of
    it only its input, its routing and its shared experts are held."""
    text = config.hf_text_config
    dense = getattr(text, "intermediate_size", None) or 4 * config.hidden_size
    experts = next(
        (n for name in ("num_experts", "n_routed_experts", "num_local_experts") if (n := getattr(text, name, 0))), 0
    )
    shared = getattr(text, "shared_expert_intermediate_size", 0) or (
        (getattr(text, "n_shared_experts", 0) or 0) * (getattr(text, "moe_intermediate_size", 0) or 0)
    )
    return int(max(3 * dense, 3 * shared + config.hidden_size + 4 * experts))
