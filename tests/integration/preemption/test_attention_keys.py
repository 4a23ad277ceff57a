"""Attention of the triton backend by segments of keys: SGLang's own kernel, in Triton's interpreter and a process of
its own, against float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowprefill_sglang.integration.preemption.attention_keys import can_split, least_rows
from flowprefill_testing.triton_interpreter import output_of

PROGRAM = """
    from dataclasses import dataclass

    import torch
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    from flowprefill_sglang.core.slicing import key_segments
    from flowprefill_sglang.integration.preemption.attention_keys import TRITON_KEY_BLOCK, attend_part
    from flowprefill_sglang.kernels.attention_state import attend_reference, merge_states

    @dataclass
    class Metadata:
        kv_indptr: torch.Tensor
        kv_indices: torch.Tensor

    class Backend:
        def __init__(self, slots):
            self.forward_metadata = Metadata(torch.tensor([0, len(slots)]), slots)
            self.extend_attention_fwd = extend_attention_fwd

    HEADS, KV_HEADS, WIDTH, ROWS, CACHED, SCALE = 4, 2, 16, 40, 300, 0.2
    # Not bfloat16, of which the interpreter makes nonsense, with SGLang's whole kernel too.
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 2e-3)):
        torch.manual_seed(0)
        slots = torch.randperm(400)[:CACHED]
        k_pool, v_pool = (torch.randn(400, KV_HEADS, WIDTH).to(dtype) for _ in range(2))
        q = torch.randn(ROWS, HEADS, WIDTH).to(dtype)
        k, v = (torch.randn(ROWS, KV_HEADS, WIDTH).to(dtype) for _ in range(2))
        backend = Backend(slots)

        def call():
            out, at = torch.empty_like(q), backend.forward_metadata
            backend.extend_attention_fwd(
                q, k, v, out, k_pool, v_pool, torch.tensor([0, ROWS]), at.kv_indptr, at.kv_indices,
                None, True, None, ROWS, 1.0, 1.0, sm_scale=SCALE,
            )
            return out

        all_k, all_v = torch.cat([k_pool[slots], k]), torch.cat([v_pool[slots], v])
        truth, truth_lse = attend_reference(q.double(), all_k.double(), all_v.double(), scale=SCALE, first_key=CACHED)
        for parts in (1, 2, 3):
            lse = torch.empty(ROWS, HEADS)
            state = attend_part(call, backend, lse, None), lse
            for segment in key_segments(CACHED, parts, TRITON_KEY_BLOCK):
                lse = torch.empty(ROWS, HEADS)
                state = merge_states(state, (attend_part(call, backend, lse, segment), lse))
            assert (state[0].double() - truth).abs().max() < tolerance, (dtype, parts)
            assert (state[1].double() - truth_lse).abs().max() < 1e-4, (dtype, parts)
        assert backend.forward_metadata.kv_indices is slots
        assert (call().double() - truth).abs().max() < tolerance, "whole again"

        def fails():
            raise RuntimeError("kernel")

        try:
            attend_part(fails, backend, lse, (0, 64))
        except RuntimeError:
            assert backend.extend_attention_fwd is extend_attention_fwd
            assert backend.forward_metadata.kv_indices is slots
    print("near")
"""


def test_segments_merged_are_near_float64() -> None:
    assert output_of(PROGRAM) == "near"


class TritonAttnBackend(SimpleNamespace):
    """What is asked of SGLang's."""


def backend(**changes: Any) -> TritonAttnBackend:
    return TritonAttnBackend(
        **({"use_mla": False, "enable_deterministic": False, "dcp_size": 1, "dllm_attention": None} | changes)
    )


def layer(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"sliding_window_size": -1, "xai_temperature_len": -1} | changes))


def test_keys_of_plain_attention_can_be_cut() -> None:
    assert can_split(backend(), layer())


@pytest.mark.parametrize(
    "changes", [{"use_mla": True}, {"enable_deterministic": True}, {"dcp_size": 2}, {"dllm_attention": object()}]
)
def test_keys_of_other_kernels_are_not_cut(changes: dict[str, Any]) -> None:
    assert not can_split(backend(**changes), layer())


@pytest.mark.parametrize("changes", [{"sliding_window_size": 128}, {"xai_temperature_len": 1024}])
def test_keys_whose_places_matter_are_not_cut(changes: dict[str, Any]) -> None:
    assert not can_split(backend(), layer(**changes))


def test_other_backends_are_not_cut() -> None:
    assert not can_split(SimpleNamespace(), layer())


@pytest.mark.parametrize("name", ["TritonAttnBackend", "FlashInferAttnBackend"])
def test_each_row_counts_on_a_cpu(name: str) -> None:
    assert least_rows(name, 32, torch.device("cpu")) == 0
