"""LoRA without an accelerator: plain memory, and the backend that can run. Answers are in ``cluster/test_lora``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowprefill_sglang.integration.cpu_lora import in_plain_memory
from flowprefill_sglang.integration.platform import has_accelerator
from flowprefill_testing.sglang_process import facts_of


@pytest.fixture(autouse=True)
def _no_accelerator() -> None:
    if has_accelerator():
        pytest.skip("nothing is changed where there is an accelerator")


def made(value: int, *, more: int = 0) -> list[torch.Tensor]:
    """In the ways in which SGLang makes its tensors."""
    ones = torch.ones(2, dtype=torch.int32)
    return [
        torch.tensor([value, more], dtype=torch.int32, pin_memory=True, device="cpu"),
        torch.zeros((2,), dtype=torch.int32, pin_memory=True),
        ones.pin_memory(),
    ]


def test_what_asks_for_pinned_memory_gets_plain_memory() -> None:
    with pytest.raises(RuntimeError, match="pin"):
        made(3)
    assert [tensor.tolist() for tensor in in_plain_memory(made, 3, more=4)] == [[3, 4], [0, 0], [1, 1]]
    with pytest.raises(RuntimeError, match="pin"):
        made(3)


@pytest.fixture(scope="module")
def resolved() -> dict[str, Any]:
    pytest.importorskip("sglang", reason="the seam needs SGLang")
    return facts_of("""
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.srt.arg_groups import lora_hook
        from sglang.srt.arg_groups.overrides import resolving_view
        from sglang.srt.server_args import ServerArgs

        def backend(**given):
            server_args = ServerArgs(model_path="dummy", **given)
            try:
                lora_hook.check_lora_server_args(server_args)
            except ValueError as error:
                return f"ValueError: {error}"
            return resolving_view(server_args).lora_backend

        adapters = {"lora_paths": ["a=/a"]}
        facts["default"] = backend(**adapters)
        facts["given"] = backend(**adapters, lora_backend="torch_native")
        facts["other"] = backend(**adapters, lora_backend="triton")
        facts["without"] = backend()
        facts["sglangs"] = ServerArgs(model_path="dummy").lora_backend
    """)


def test_the_default_backend_is_the_one_that_can_run(resolved: dict[str, Any]) -> None:
    assert (resolved["default"], resolved["given"]) == ("torch_native", "torch_native")


def test_another_backend_is_refused_by_name(resolved: dict[str, Any]) -> None:
    assert (
        resolved["other"]
        == "ValueError: --lora-backend triton needs an accelerator and there is none; use torch_native"
    )


def test_a_server_without_adapters_is_left_alone(resolved: dict[str, Any]) -> None:
    assert resolved["without"] == resolved["sglangs"] == "csgmv"
