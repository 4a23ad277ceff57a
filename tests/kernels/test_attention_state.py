"""Attention in parts, against float64 and against PyTorch's own attention of all rows at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from flowprefill_sglang.kernels.attention_state import (
    CPU_KEY_BLOCK,
    attend_reference,
    attend_rows,
    attend_segment,
    merge_reference,
    merge_states,
)

SCALE = 0.2
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def make(
    rows: int, keys: int, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2, width: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 7 + keys)
    shapes = ((rows, heads, width), (keys, kv_heads, width), (keys, kv_heads, width))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    heads_first = (x.movedim(0, 1)[None] for x in (q, k, v))
    whole = scaled_dot_product_attention(*heads_first, is_causal=True, scale=SCALE, enable_gqa=True)
    return whole[0].movedim(0, 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [300, 1100])
@pytest.mark.parametrize("step", [64, 192, 256, 1088])
def test_row_tiles_equal_the_whole_bit_for_bit(tokens: int, step: int, dtype: torch.dtype) -> None:
    q, k, v = make(tokens, tokens, dtype)
    whole = causal(q, k, v)
    out = torch.empty_like(q)
    for begin in range(0, tokens, step):
        end = min(tokens, begin + step)
        seen = min(tokens, -(-end // CPU_KEY_BLOCK) * CPU_KEY_BLOCK)
        attend_rows(q[begin:end], k[:seen], v[:seen], out[begin:end], scale=SCALE, first_key=begin)
        assert torch.equal(out[begin:end], whole[begin:end]), (begin, end)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cuts", [(0,), (0, 100), (0, 64, 512)])
def test_key_segments_merged_are_near_float64(cuts: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, first = 64, 700
    q, k, v = make(rows, first + rows, dtype)
    truth, truth_lse = attend_reference(q.double(), k.double(), v.double(), scale=SCALE, first_key=first)
    state = attend_segment(q, k[first:], v[first:], scale=SCALE, is_diagonal=True)
    for begin, end in zip(cuts, [*cuts[1:], first], strict=True):
        segment = attend_segment(q, k[begin:end], v[begin:end], scale=SCALE, is_diagonal=False)
        state = merge_states(state, segment)
    assert state[0].dtype == dtype
    assert (state[0].double() - truth).abs().max() < TOLERANCE[dtype]
    assert (state[1].double() - truth_lse).abs().max() < 10 * TOLERANCE[torch.float32]


def test_the_formula_is_what_pytorch_computes() -> None:
    q, k, v = make(50, 50, torch.float64)
    out, lse = attend_reference(q, k, v, scale=SCALE, first_key=0)
    torch.testing.assert_close(out, causal(q, k, v))
    scores = torch.einsum("rhd,khd->rhk", q, k.repeat_interleave(2, 1)) * SCALE
    torch.testing.assert_close(lse[49], torch.logsumexp(scores[49], -1))


def test_rows_that_saw_nothing_change_nothing() -> None:
    q, k, v = make(5, 9, torch.float32)
    some = attend_reference(q, k, v, scale=SCALE)
    nothing = attend_reference(q, k, v, scale=SCALE, first_key=-10)
    assert not nothing[0].any()
    assert torch.isneginf(nothing[1]).all()
    for merged in (merge_reference(some, nothing), merge_reference(nothing, some)):
        torch.testing.assert_close(merged, some)
    assert not merge_reference(nothing, nothing)[0].any()


def test_float64_is_computed_by_the_formula() -> None:
    q, k, v = make(8, 8, torch.float64)
    torch.testing.assert_close(
        attend_segment(q, k, v, scale=SCALE, is_diagonal=True), attend_reference(q, k, v, scale=SCALE, first_key=0)
    )
