"""LoRA adapters on a machine without an accelerator.

SGLang 0.5.23 can compute LoRA with PyTorch's own operators (``--lora-backend torch_native``), but it prepares adapters
and batches in pinned memory, which there is none of without an accelerator, and its default backend needs Triton. Here
the memory is plain and the default is the backend that can run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from flowprefill_sglang.integration.hooks import Hook, HookKind

SGLANGS_DEFAULT: Final = "csgmv"
ON_CPU: Final = "torch_native"

_MANAGER: Final = "sglang.srt.lora.lora_manager.LoRAManager"
_PINNING: Final = ("__init__", "load_lora_adapter", "load_lora_adapter_from_tensors", "prepare_lora_batch")
"""Of the manager: what makes tensors for adapters and for a batch's metadata."""


def hooks() -> list[Hook]:
    """What ``integration.plugin`` registers where no accelerator was found."""
    return [
        Hook(
            target="sglang.srt.arg_groups.lora_hook.check_lora_server_args",
            kind=HookKind.AFTER,
            function=choose_backend,
            why="LoRA layers would be computed by Triton's kernels",
        ),
        *(
            Hook(
                target=f"{_MANAGER}.{name}",
                kind=HookKind.AROUND,
                function=in_plain_memory,
                why="LoRA adapters are prepared in pinned memory, which needs an accelerator",
            )
            for name in _PINNING
        ),
    ]


def choose_backend(result: None, server_args: Any) -> None:  # SGLang's ServerArgs
    """After ``check_lora_server_args``: PyTorch's operators instead of SGLang's default backend.

    Raises ValueError, as SGLang's own argument checks do, for another one.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    view = resolving_view(server_args)
    if not view.enable_lora or view.lora_backend == ON_CPU:
        return
    if view.lora_backend != SGLANGS_DEFAULT:
        raise ValueError(f"--lora-backend {view.lora_backend} needs an accelerator and there is none; use {ON_CPU}")
    declare_resolution(server_args, "flowprefill_cpu", lora_backend=ON_CPU)


def in_plain_memory(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # SGLang's arguments and result
    """Around a method of the manager: whoever asks for pinned memory gets plain memory."""
    with _PlainMemory():
        return original(*args, **kwargs)


class _PlainMemory(TorchFunctionMode):
    """Takes no part in what tensors hold: pinning only makes copies to a device faster."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # any function of PyTorch, and what it takes and returns
        if func is torch.Tensor.pin_memory:
            return args[0]
        given = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return func(*args, **given)
