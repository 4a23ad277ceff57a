"""Attention in parts: query rows against a segment of the keys, and the merge of two segments' results.

The *state* of query rows that have seen a set of keys is their output (the softmax-weighted mean of the values) and the
logarithm of the sum of the exponentials of their scores (LSE, natural logarithm). The states of two disjoint sets of
keys give that of the union exactly, up to rounding: this is how FlashAttention combines its blocks. ``*_reference`` is
the source of truth; ``merge_states`` runs what ``selection`` has chosen.

Shapes: ``q[rows, heads, d]``, ``k[keys, kv_heads, d]``, ``v[keys, kv_heads, dv]``, output ``[rows, heads, dv]``, LSE
``[rows, heads]`` in float32. ``heads`` is a multiple of ``kv_heads``.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn.functional import scaled_dot_product_attention

from flowprefill_sglang.kernels.selection import Kernel, Name, choose

State = tuple[torch.Tensor, torch.Tensor]

CPU_KEY_BLOCK: Final = 512
"""PyTorch's CPU attention takes the keys in blocks of so many (``kvSplitSize`` in FlashAttentionKernel.cpp). A call
whose keys end elsewhere than at such a block's end, or at the last key, rounds differently."""
CPU_ROW_BLOCK: Final = 512
"""Rows of one call of it, at most: masked keys are computed too, half of all where a call has no keys before its rows.
With fewer rows its blocks of queries become small, which costs as much."""
LOG2_E: Final = 1.4426950408889634


def attend_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, first_key: int | None = None
) -> State:
    """Attention by its formula, in the inputs' own precision (float64 for a truth).

    ``first_key``: row ``r`` sees the keys up to and including ``first_key + r``; None: all keys. A row that sees none
    has output 0 and LSE -inf.
    """
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("rhd,khd->hrk", q, k.repeat_interleave(group, 1)) * scale
    if first_key is not None:
        rows, keys = torch.arange(q.shape[0], device=q.device), torch.arange(k.shape[0], device=q.device)
        scores = scores.masked_fill(keys > first_key + rows[:, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None])
    out = torch.einsum("hrk,khd->rhd", weights, v.repeat_interleave(group, 1))
    return out, lse.transpose(0, 1)


def merge_reference(a: State, b: State) -> State:
    """The state of rows that have seen the keys of both."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    floor = lse.clamp_min(torch.finfo(lse.dtype).min)  # two rows that saw nothing: not -inf minus -inf
    weight_a, weight_b = torch.exp(lse_a - floor)[..., None], torch.exp(lse_b - floor)[..., None]
    precise = torch.promote_types(out_a.dtype, lse.dtype)
    return (out_a.to(precise) * weight_a + out_b.to(precise) * weight_b).to(out_a.dtype), lse


def merge_states(a: State, b: State, name: Name | None = None) -> State:
    """``merge_reference`` by the implementation chosen for these tensors, or by the one that is named.

    Inputs are contiguous. Raises ImportError for a named one that is not installed.
    """
    out = a[0]
    if name is None:
        name = choose(Kernel.MERGE, out.device.type, out.dtype, out.shape[-1]).name
    if name is Name.TORCH:
        return merge_reference(a, b)
    if name is Name.TRITON:
        from flowprefill_sglang.kernels.attention_state_triton import merge

        return merge(a, b)
    from flashinfer.cascade import merge_state

    merged, lse = merge_state(out, a[1] * LOG2_E, b[0], b[1] * LOG2_E)  # its logarithms are to the base 2
    return merged, lse / LOG2_E


def attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, *, scale: float, first_key: int
) -> None:
    """Write to ``out`` the output of query rows of which row ``r`` sees the keys up to ``first_key + r``.

    On a CPU equal to the same rows of one causal call over all rows, bit for bit, if ``k`` ends at a multiple of
    ``CPU_KEY_BLOCK`` or at the last key of that call; keys that no row sees are masked.
    """
    for begin in range(0, q.shape[0], CPU_ROW_BLOCK):
        end = min(q.shape[0], begin + CPU_ROW_BLOCK)
        seen = min(k.shape[0], -(-(first_key + end) // CPU_KEY_BLOCK) * CPU_KEY_BLOCK)
        _attend_block(q[begin:end], k[:seen], v[:seen], out[begin:end], scale, first_key + begin)


def _attend_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, scale: float, first_key: int
) -> None:
    (rows, heads), (keys, kv_heads) = q.shape[:2], k.shape[:2]
    group = heads // kv_heads
    # With the last row first, a row hides one key more than the one before it, so that all of them are windows into one
    # line, which stays in the cache. A mask of its own for each row would be read from memory by every head.
    line = q.new_zeros(keys + rows - 1)
    line[first_key + rows :] = -torch.inf
    # Groups of heads that share keys are batches: PyTorch would copy the keys for each head of a group.
    k, v = (x.movedim(0, 1)[:, None].expand(kv_heads, group, keys, x.shape[-1]) for x in (k, v))
    grouped = q.unflatten(1, (kv_heads, group)).movedim(0, 2).flip(2)
    mask = line.as_strided((rows, keys), (1, 1))
    if q.device.type != "cpu":
        mask = mask.contiguous()  # kernels of a GPU want aligned rows
    found = scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    out.copy_(found.flip(2).movedim(2, 0).flatten(1, 2))


def attend_segment(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, is_diagonal: bool) -> State:
    """The state of query rows that have seen one segment of keys.

    ``is_diagonal``: there are as many keys as rows, and row ``r`` sees the first ``r + 1``; otherwise it sees all.
    Runs PyTorch's fused attention, which has an LSE to give, where it takes these tensors, else the formula.
    """
    if q.shape[-1] != v.shape[-1] or q.dtype == torch.float64 or q.device.type not in _FUSED:
        return attend_reference(q, k, v, scale=scale, first_key=0 if is_diagonal else None)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    heads_first = [x.movedim(0, 1)[None] for x in (q, k, v)]
    out, lse = _FUSED[q.device.type](*heads_first, 0.0, is_diagonal, scale=scale)[:2]
    return out.squeeze(0).movedim(0, 1).contiguous(), lse.reshape(lse.shape[-2:]).movedim(0, 1).float().contiguous()


_FUSED: Final = {
    "cpu": torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    "cuda": torch.ops.aten._scaled_dot_product_flash_attention,
}
