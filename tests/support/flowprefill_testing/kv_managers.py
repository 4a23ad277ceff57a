"""SGLang's real manager, sender, receiver and bootstrap classes over small pools, without a server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def sglang_context(bootstrap_port: int) -> Iterator[Any]:  # SGLang's ServerArgs
    """SGLang's process-wide configuration as the managers read it: one rank, no parallelism."""
    sys.argv = sys.argv[:1]
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.runtime_context import get_context, get_parallel

    ranks = dict.fromkeys(("attn_tp_rank", "attn_cp_rank", "attn_dcp_rank", "attn_dp_rank", "tp_rank", "pp_rank"), 0)
    with (
        get_context().override_server_args(
            host="127.0.0.1", port=1, disaggregation_bootstrap_port=bootstrap_port, device="cpu"
        ) as server_args,
        get_parallel().override(**ranks, pp_group=None),
    ):
        yield server_args


class RankMemory:
    """A rank's KV pool and metadata, and the ``KVArgs`` that describe them."""

    def __init__(
        self, *, page_bytes: list[int], pages: int, aux_bytes: list[int], requests: int, page_tokens: int
    ) -> None:
        from sglang.srt.disaggregation.base import KVArgs

        self.page_bytes = page_bytes
        self.kv = [np.zeros((pages, size), dtype=np.uint8) for size in page_bytes]
        self.aux = [np.zeros((requests, size), dtype=np.uint8) for size in aux_bytes]
        args = KVArgs()
        args.engine_rank = args.pp_rank = args.gpu_id = args.prefill_start_layer = 0
        args.system_dp_rank = 0
        args.kv_cache_dtype_str = "float32"
        args.kv_layout = None
        args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens = _describe(self.kv)
        args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = _describe(self.aux)
        args.kv_layer_ids = []
        args.state_types = []
        args.state_data_ptrs = args.state_data_lens = args.state_item_lens = args.state_layer_ids = []
        args.state_dim_per_tensor = args.state_slice_outer_counts = args.state_conv_shard_groups = []
        args.swa_kv_cache_layout = args.prefill_end_layer = args.mla_compression_ratios = args.rust_http_port = None
        args.is_hybrid_mla_backend = False
        args.ib_device = ""
        args.kv_head_num = args.total_kv_head_num = 1
        args.page_size = page_tokens
        self.args = args


def _describe(arrays: list[np.ndarray]) -> tuple[list[int], list[int], list[int]]:
    return [a.ctypes.data for a in arrays], [a.nbytes for a in arrays], [a.shape[1] for a in arrays]
