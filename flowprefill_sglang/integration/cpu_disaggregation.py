"""What SGLang 0.5.23's prefill/decode disaggregation needs on a machine without an accelerator.

Its transfer code asks for pinned memory and CUDA events in three places and prefers a host memory pool for retracted
requests, which its CPU path does not have. ``integration.plugin`` installs this module where no accelerator was found.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.integration.hooks import Hook, HookKind, sglang_version


def hooks() -> list[Hook]:
    """What ``integration.plugin`` registers."""
    return [
        Hook(
            target="sglang.srt.disaggregation.utils.get_kv_class",
            kind=HookKind.AFTER,
            function=use_plain_indices,
            why="mooncake's sender asks for pinned memory and a CUDA event",
        ),
        Hook(
            target="sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin.maybe_send_cached_prefix_chunk",
            kind=HookKind.AROUND,
            function=send_cached_prefix_without_event,
            why="the second request with the same prefix asks for a CUDA event under overlap scheduling",
        ),
        Hook(
            target="sglang.srt.arg_groups.pd_disaggregation_hook.handle_pd_disaggregation",
            kind=HookKind.AFTER,
            function=choose_cpu_options,
            why="a decode server reserves a host memory pool that needs an accelerator",
        ),
    ]


def use_plain_indices(result: Any, transfer_backend: Enum, class_type: Enum) -> None:  # result: a class, or None
    """After ``get_kv_class``: have the scheduler hand page numbers to the sender as a NumPy array.

    Done on the class, whichever backend it belongs to, when SGLang asks for it: mooncake's module cannot be imported
    where mooncake is not installed.
    """
    if class_type.value == "sender" and getattr(result, "supports_host_tensor_indices", False):
        result.supports_host_tensor_indices = False


def send_cached_prefix_without_event(original: Callable[..., None], scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Around ``maybe_send_cached_prefix_chunk``: skip the CUDA event that it records under overlap scheduling.

    The event stands for the previous forward's writes. A CPU forward has ended when the scheduler goes on.
    """
    is_overlapping = scheduler.enable_overlap
    scheduler.enable_overlap = False
    try:
        original(scheduler, *args, **kwargs)
    finally:
        scheduler.enable_overlap = is_overlapping


def choose_cpu_options(result: None, server_args: Any) -> None:  # SGLang's ServerArgs
    """After ``handle_pd_disaggregation``: default to retraction backups in CPU tensors, refuse what needs a GPU.

    SGLang would choose the host pool, which is made of pinned memory. A hook and not a platform's default: SGLang's own
    CPU engine needs it as much as our platform does, and later rules read the setting before platforms set theirs.

    Raises ValueError, as SGLang's own argument checks do.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    view = resolving_view(server_args)
    if view.disaggregation_mode == "null":
        return
    if view.disaggregation_enable_kv_checksum:
        raise ValueError(
            "--disaggregation-enable-kv-checksum computes on a GPU and there is none; "
            "the zmq transfer backend checks every message by itself"
        )
    if view.disaggregation_decode_retraction_backup is None:
        declare_resolution(server_args, "flowprefill_cpu", disaggregation_decode_retraction_backup="cpu_tensor")


def check() -> None:
    """Raises StartupError unless the names that the hooks rely on exist in SGLang."""
    from sglang.srt.server_args import ServerArgs

    fields = getattr(ServerArgs, "__annotations__", {})
    for name in ("disaggregation_enable_kv_checksum", "disaggregation_decode_retraction_backup"):
        if not hasattr(ServerArgs, name) and name not in fields:
            raise StartupError(f"SGLang {sglang_version()} has no ServerArgs.{name}; install sglang==0.5.23")
