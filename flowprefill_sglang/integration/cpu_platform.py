"""The platform class that ``integration.platform`` names to SGLang; imported by SGLang only when it is chosen."""

from __future__ import annotations

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """SGLang on a CPU with PyTorch's own operators: no ``sgl_kernel``, no CUDA, no graphs."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

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
