"""The Triton kernels, in Triton's interpreter and a process of their own, against their references."""

from __future__ import annotations

import pytest

from flowprefill_testing.triton_interpreter import output_of

pytest.importorskip("triton", reason="comes with SGLang")

PROGRAM = """
    import torch
    from flowprefill_sglang.kernels.attention_state import attend_reference, merge_reference, merge_states
    from flowprefill_sglang.kernels.kv_pages import gather_rows, scatter_rows
    from flowprefill_sglang.kernels.selection import Name

    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        for rows, heads, width in ((1, 1, 16), (7, 3, 24), (5, 2, 128)):
            states = [
                (torch.randn(rows, heads, width).to(dtype), 5 * torch.randn(rows, heads)) for _ in range(2)
            ]
            states[0][1][0] = -torch.inf  # rows that have seen no key, on one side and on both
            merged, expected = merge_states(*states, Name.TRITON), merge_reference(*states)
            torch.testing.assert_close(merged, expected, atol=tolerance, rtol=tolerance)
            states[1][1][0] = -torch.inf
            states[0][0][0] = states[1][0][0] = 0
            out, lse = merge_states(*states, Name.TRITON)
            assert torch.isneginf(lse[0]).all() and not out[0].any(), (out[0], lse[0])

    for page_bytes in (1, 6, 20, 64, 5000):
        pool = torch.randint(0, 256, (13, page_bytes), dtype=torch.uint8)
        rows = torch.tensor([12, 0, 7, 3])
        block = gather_rows(pool, rows, Name.TRITON)
        assert torch.equal(block, gather_rows(pool, rows, Name.TORCH))
        ours, theirs = torch.zeros_like(pool), torch.zeros_like(pool)
        scatter_rows(ours, rows, block, Name.TRITON)
        scatter_rows(theirs, rows, block, Name.TORCH)
        assert torch.equal(ours, theirs)
        assert torch.equal(ours[rows], pool[rows])
    print("all equal")
"""


def test_triton_kernels_equal_their_references() -> None:
    assert output_of(PROGRAM) == "all equal"
