"""The merge of two attention states in Triton. What it computes: ``attention_state.merge_reference``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _merge(out_a, lse_a, out_b, lse_b, out, lse, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a row and head: ``out*[states, width]``, ``lse*[states]``, all contiguous."""
    state = tl.program_id(0)
    a = tl.load(lse_a + state)
    b = tl.load(lse_b + state)
    top = tl.maximum(a, b)
    floor = tl.where(top == -float("inf"), 0.0, top)  # two rows that saw no key
    weight_a = tl.exp(a - floor)
    weight_b = tl.exp(b - floor)
    total = weight_a + weight_b
    tl.store(lse + state, tl.where(total > 0, floor + tl.log(tl.where(total > 0, total, 1.0)), -float("inf")))
    total = tl.where(total > 0, total, 1.0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = state.to(tl.int64) * width + columns
    x = tl.load(out_a + place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(out_b + place, mask=inside, other=0.0).to(tl.float32)
    merged = x * (weight_a / total) + y * (weight_b / total)
    tl.store(out + place, merged.to(out.dtype.element_ty), mask=inside)


def merge(
    a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """States of contiguous tensors ``[rows, heads, width]`` and float32 ``[rows, heads]`` into one."""
    out, lse = torch.empty_like(a[0]), torch.empty_like(a[1])
    width = out.shape[-1]
    if lse.numel():
        _merge[(lse.numel(),)](a[0], a[1], b[0], b[1], out, lse, width, BLOCK=triton.next_power_of_2(width))
    return out, lse
