"""A cost model from counting operations, for when nothing has been measured: the right order of magnitude, no more."""

from __future__ import annotations

import msgspec

from flowprefill_sglang.core.prefill_cost import CostModel


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a transformer computes for a token, on one device."""

    active_parameters: int
    """Parameters that one token passes through, embeddings not counted: with experts, only those chosen."""
    resident_bytes: int
    """Bytes of weights that a forward reads at least once."""
    layers: int
    attention_width: int
    """Query heads × head dimension."""


class DeviceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What a device sustains: measured, or a data sheet's figures times what is reached of them in practice."""

    flops_per_s: float
    bytes_per_s: float
    overhead_s: float
    """Of a forward with hardly any work: kernel launches, Python."""


def analytic(shape: Shape, device: DeviceFigures) -> CostModel:
    """Two operations a parameter and token; four a pair and attention channel (scores and values). Up to the knee a
    forward takes as long as reading the weights, or as launching its kernels."""
    floor_s = max(device.overhead_s, shape.resident_bytes / device.bytes_per_s)
    token_s = 2 * shape.active_parameters / device.flops_per_s
    return CostModel(
        base_s=floor_s,
        short_token_s=0.0,
        long_token_s=token_s,
        knee_tokens=round(floor_s / token_s),
        pair_s=4 * shape.layers * shape.attention_width / device.flops_per_s,
    )
