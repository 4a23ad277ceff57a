"""What the ``zmq`` KV transfer backend does not do, each with a sentence that says what to do instead."""

from __future__ import annotations

from sglang.srt.disaggregation.base.conn import KVArgs
from sglang.srt.disaggregation.common.conn import PrefillServerInfo
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs

from flowprefill_sglang.errors import StartupError


def refuse_what_is_not_supported(args: KVArgs, server_args: ServerArgs) -> None:
    """Raises StartupError with one sentence. SGLang itself refuses what asks for mooncake or nixl by name."""
    parallel = get_parallel()
    states = ", ".join(str(state.value) for state in args.state_types)
    unsupported = {
        "pipeline parallelism (--pp-size)": parallel.pp_size > 1,
        "context parallelism": parallel.attn_cp_size > 1 or parallel.attn_dcp_size > 1,
        "a KV cache that is sharded between ranks": parallel.enable_kv_cache_sharding,
        f"models with state beside the KV cache ({states})": bool(states),
        "a KV pool without per-layer buffers": not args.kv_data_ptrs,
        "--enable-pd-role-switch": server_args.enable_pd_role_switch,
    }
    found = [what for what, is_present in unsupported.items() if is_present]
    if found:
        raise StartupError(
            f"the zmq KV transfer backend does not support {' and '.join(found)}; "
            f"use --disaggregation-transfer-backend mooncake or nixl"
        )


def peer_mismatch(info: PrefillServerInfo, *, attn_tp_size: int) -> str | None:
    """Why this decode rank cannot take KV from a prefill server that describes itself so; None when it can."""
    different = [
        f"{what} is {theirs} there and {ours} here"
        for what, theirs, ours in (
            ("attention tensor parallelism", info.attn_tp_size, attn_tp_size),
            ("context parallelism", info.attn_cp_size, 1),
            ("pipeline parallelism", info.pp_size, 1),
        )
        if theirs != ours
    ]
    if info.enable_kv_cache_sharding or info.enable_dsa_cache_layer_split:
        different.append("its KV cache is sharded between ranks")
    if not different:
        return None
    return (
        f"cannot be used with the zmq transfer backend: {', '.join(different)}; "
        f"start both sides alike, or with --disaggregation-transfer-backend mooncake or nixl"
    )
