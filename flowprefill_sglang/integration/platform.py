"""The embedded default: SGLang on any CPU with PyTorch alone.

SGLang 0.5.23 knows two CPU paths: its own CPU engine, which needs ``sgl_kernel`` built for the machine, and out-of-tree
platforms (entry point group ``sglang.srt.platforms``). This module is the second. It steps aside when an accelerator is
present, when the user asked for SGLang's own CPU engine (``SGLANG_USE_CPU_ENGINE=1``) and when another platform was
chosen by name (SGLang then never loads this module).

SGLang loads the platform in every process, before it imports torchvision or transformers.
"""

from __future__ import annotations

import os

import torch

_torchvision_schemas: list[torch.library.Library] = []  # keeps the registration alive; owned by this module


def has_accelerator() -> bool:
    """Whether SGLang would run on something better than a CPU here (CUDA or ROCm, XPU, NPU, MUSA, MPS)."""
    return bool(
        torch.cuda.is_available()
        or torch.xpu.is_available()
        or torch.backends.mps.is_available()
        or (hasattr(torch, "npu") and torch.npu.is_available())
        or getattr(torch.version, "musa", None) is not None
    )


def activate() -> str | None:
    """Entry point of ``sglang.srt.platforms``: the platform's dotted class name, or None to step aside."""
    if has_accelerator() or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    define_torchvision_schemas()
    return f"{__name__.rpartition('.')[0]}.cpu_platform.TorchCpuPlatform"


def define_torchvision_schemas() -> None:
    """Let the package index's torchvision, a CUDA build, import beside a CPU build of PyTorch.

    torchvision 0.28 registers fake kernels for ``torchvision::nms`` while it is imported and fails if the operator's
    schema is missing, as it is when its CUDA library cannot be loaded. Defining the schemas is enough: the text models
    that run on this platform never call them. A torchvision that works has defined them already, and is left alone.
    """
    if _torchvision_schemas or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_schemas.append(library)
