"""What the backend refuses of a prefill server, from what the server says of itself."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs sglang")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang's own, while it is imported
    from flowprefill_sglang.kv.refusals import peer_mismatch


def info(**changes: Any) -> Any:  # what is read of SGLang's PrefillServerInfo
    like_ours = {"attn_tp_size": 2, "attn_cp_size": 1, "pp_size": 1}
    whole = {"enable_kv_cache_sharding": False, "enable_dsa_cache_layer_split": False}
    return SimpleNamespace(**like_ours | whole | changes)


def test_a_server_like_ours_is_taken() -> None:
    assert peer_mismatch(info(), attn_tp_size=2) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attn_tp_size": 4}, "attention tensor parallelism is 4 there and 2 here"),
        ({"attn_cp_size": 2}, "context parallelism is 2 there and 1 here"),
        ({"pp_size": 2}, "pipeline parallelism is 2 there and 1 here"),
        ({"enable_kv_cache_sharding": True}, "its KV cache is sharded between ranks"),
        ({"enable_dsa_cache_layer_split": True}, "its KV cache is sharded between ranks"),
        ({"attn_tp_size": 4, "pp_size": 2}, "parallelism is 4 there and 2 here, pipeline parallelism is 2 there"),
    ],
)
def test_what_differs_is_said_with_what_to_do(changes: dict[str, Any], expected: str) -> None:
    reason = peer_mismatch(info(**changes), attn_tp_size=2)
    assert reason is not None
    assert expected in reason
    assert "--disaggregation-transfer-backend mooncake or nixl" in reason
