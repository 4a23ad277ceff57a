"""The platform class that ``integration.platform`` names to SGLang; imported by SGLang only when it is chosen."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Any, Final

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

KV_POOL_TOKENS: Final = 65_536
"""Default size of the KV pool. SGLang would take a fraction of the machine's free memory per server, and several
servers share one machine here; ``--max-total-tokens`` changes it."""


CORES_VARIABLE: Final = "SGLANG_CPU_OMP_THREADS_BIND"
"""SGLang's: the cores of each rank, separated by ``|``."""


def share_cores(ranks: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let a server have more ranks than the machine has NUMA nodes, which SGLang refuses unless it is told which cores
    each rank may use. What it is told binds threads only where ``sgl_kernel`` is installed; how many threads a rank has
    is PyTorch's ``OMP_NUM_THREADS``."""
    if ranks == 1 or CORES_VARIABLE in environment:
        return
    from sglang.srt.utils.common import get_cpu_ids_by_node  # which asks for the platform when it is imported

    if ranks <= len(get_cpu_ids_by_node()):
        return
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks] for rank in range(ranks)]
    environment[CORES_VARIABLE] = "|".join(
        ",".join(map(str, share or [cores[rank % len(cores)]])) for rank, share in enumerate(shares)
    )


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """SGLang on a CPU with PyTorch's own operators: no ``sgl_kernel``, no CUDA, no graphs."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def apply_server_args_defaults(self, server_args: Any) -> None:  # SGLang's settings, or a view of them
        """Settings that a CPU needs unless the user gave others.

        Overlap scheduling hides launch latency behind an asynchronous device, which a CPU is not, and its PD paths use
        CUDA events. ``--dtype auto`` is float32: SGLang would run a float32 model in float16, which CPUs compute
        several times slower, and whose rounding makes greedy output depend on how requests were batched and chunked. A
        scheduler that has nothing at all to do waits for a message instead of spinning: its core is somebody else's
        core here. What disaggregation needs beside this is in ``cpu_disaggregation``.
        """
        server_args.sleep_on_idle = True
        if server_args.mem_fraction_static is None:
            # Not used, since the pool's size is set below, but refused by SGLang when its own guess, which falls with
            # the size of a prefill chunk, is negative.
            server_args.mem_fraction_static = 0.8
        if server_args.dtype == "auto":
            server_args.dtype = "float32"
        server_args.disable_overlap_schedule = True
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = KV_POOL_TOKENS
        share_cores(server_args.tp_size * server_args.pp_size * server_args.dp_size)

    def get_device(self, device_id: int = 0) -> str:
        """The name, as ``DeviceMixin`` declares it; SGLang 0.5.23's CPU mixin returns a ``torch.device``, on which the
        resolution of ``--device`` then fails."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        """The attention backend that needs nothing but PyTorch."""
        return "torch_native"

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        """Pinned memory needs an accelerator to pin for."""
        return False

    def get_dispatch_key_name(self) -> str:
        """Select each layer's ``forward_native``."""
        return "native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        """No inductor: compiling on a laptop costs more than it gives."""
        return "eager"
