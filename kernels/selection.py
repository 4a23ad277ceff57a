"""Which implementation of a kernel is used, and why: decided here, and said once in the log."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from typing import Final

import torch

logger = logging.getLogger(__name__)


class Name(StrEnum):
    """An implementation."""

    TORCH = "torch"
    """The reference."""
    TRITON = "triton"
    FLASHINFER = "flashinfer"


class Kernel(StrEnum):
    """What there is more than one implementation of."""

    MERGE = "attention-state merge"
    ROWS = "KV page gather and scatter"


@dataclass(frozen=True, slots=True)
class Choice:
    """An implementation and the reason for it."""

    name: Name
    why: str


FLASHINFER_DTYPES: Final = (torch.float16, torch.bfloat16)
FLASHINFER_HEAD_SIZES: Final = (64, 128, 256)
"""What its merge kernel is compiled for without compiling anything at run time for odd sizes."""


@cache
def choose(kernel: Kernel, device_type: str, dtype: torch.dtype, width: int) -> Choice:
    """The implementation for tensors of this kind on this device; ``width`` is the length of their last dimension."""
    choice = _choose(kernel, device_type, dtype, width)
    logger.info("%s of %s on %s: %s (%s)", kernel, dtype, device_type, choice.name, choice.why)
    return choice


def _choose(kernel: Kernel, device_type: str, dtype: torch.dtype, width: int) -> Choice:
    if device_type != "cuda":
        return Choice(Name.TORCH, "Triton and FlashInfer need an NVIDIA or AMD GPU")
    if kernel is Kernel.MERGE and find_spec("flashinfer") is not None:
        if dtype in FLASHINFER_DTYPES and width in FLASHINFER_HEAD_SIZES:
            return Choice(Name.FLASHINFER, "it is installed")
        reason = f"FlashInfer has no merge for {dtype} and heads of {width}"
    else:
        reason = "FlashInfer has no such kernel" if kernel is Kernel.ROWS else "FlashInfer is not installed"
    if find_spec("triton") is not None:
        return Choice(Name.TRITON, reason)
    return Choice(Name.TORCH, f"{reason}, and Triton is not installed")
