"""Denormal numbers are taken for zero in SGLang's scheduler processes on a CPU.

SGLang 0.5.23's torch_native attention computes as many redundant queries as a prompt has cached tokens, from memory
that nobody has written (``torch.empty``), and throws the results away. When that memory holds denormals, which CPUs
handle in microcode, a forward pass takes up to thirty times as long: 16 new and 1,024 cached tokens took between 31 and
1,008 ms here, and with denormals flushed 31 to 39. Results do not change but for values below 1e-38.
"""

from __future__ import annotations

from typing import Any

import torch

from flowprefill_sglang.integration.hooks import Hook, HookKind


def hooks() -> list[Hook]:
    """What ``integration.plugin`` registers where no accelerator was found."""
    return [
        Hook(
            target="sglang.srt.managers.scheduler.configure_scheduler_process",
            kind=HookKind.BEFORE,
            function=flush_denormals,
            why="a forward pass with a cached prefix takes up to thirty times as long, at random",
        )
    ]


def flush_denormals(*_: Any, **__: Any) -> None:  # the arguments of the hooked function
    """Set the mode for this thread and those it starts later. Processors without it are left as they are."""
    torch.set_flush_denormal(True)
