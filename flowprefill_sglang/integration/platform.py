"""The embedded default: SGLang on any CPU with PyTorch alone.

SGLang 0.5.23 knows two CPU paths: its own CPU engine, which needs ``sgl_kernel`` built for the machine, and out-of-tree
platforms (entry point group ``sglang.srt.platforms``). This module is the second. It steps aside when an accelerator is
present, when the user asked for SGLang's own CPU engine (``SGLANG_USE_CPU_ENGINE=1``) and when another platform was
chosen by name (SGLang then never loads this module).

SGLang loads the platform in every process, before it imports torchvision or transformers.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

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
    if has_accelerator():
        return None
    define_torchvision_schemas()  # SGLang's own CPU engine imports torchvision too
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    return f"{__name__.rpartition('.')[0]}.cpu_platform.TorchCpuPlatform"


def define_torchvision_schemas() -> None:
    """Let the package index's torchvision, a CUDA build, import beside a CPU build of PyTorch.

    torchvision 0.28 registers fake kernels for ``torchvision::nms`` while it is imported and fails if the operator's
    schema is missing, as it is when its CUDA library cannot be loaded. Defining the schemas is enough: the text models
    that run on this platform never call them. Any other torchvision has defined them already, or will when it is
    imported, and a second definition is an error: it is left alone.
    """
    if _torchvision_schemas or hasattr(torch.ops.torchvision, "nms"):
        return
    if torch.version.cuda is not None or not _torchvision_is_a_cuda_build():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_schemas.append(library)


def _torchvision_is_a_cuda_build() -> bool:
    """Told by the local part of its version, e.g. ``0.28.0+cu130``, which wheel metadata on the index leaves out."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    version_file = Path(spec.submodule_search_locations[0]) / "version.py"
    return version_file.is_file() and re.search(r"__version__ = '[^']*\+cu", version_file.read_text()) is not None
