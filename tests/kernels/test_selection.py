"""Which implementation of a kernel is used."""

from __future__ import annotations

import logging
from importlib.machinery import ModuleSpec

import pytest
import torch

from flowprefill_sglang.kernels import selection
from flowprefill_sglang.kernels.selection import Kernel, Name, choose


@pytest.fixture(autouse=True)
def _forget() -> None:
    choose.cache_clear()


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(selection, "find_spec", lambda name: ModuleSpec(name, None) if name in names else None)


@pytest.mark.parametrize(
    ("kernel", "dtype", "width", "there", "expected"),
    [
        (Kernel.MERGE, torch.bfloat16, 128, ("flashinfer", "triton"), Name.FLASHINFER),
        (Kernel.MERGE, torch.bfloat16, 96, ("flashinfer", "triton"), Name.TRITON),
        (Kernel.MERGE, torch.float32, 128, ("flashinfer", "triton"), Name.TRITON),
        (Kernel.MERGE, torch.bfloat16, 128, ("triton",), Name.TRITON),
        (Kernel.MERGE, torch.bfloat16, 128, (), Name.TORCH),
        (Kernel.ROWS, torch.uint8, 64, ("flashinfer", "triton"), Name.TRITON),
    ],
)
def test_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    kernel: Kernel,
    dtype: torch.dtype,
    width: int,
    there: tuple[str, ...],
    expected: Name,
) -> None:
    installed(monkeypatch, *there)
    assert choose(kernel, "cuda", dtype, width).name is expected


def test_on_a_cpu_it_is_pytorch_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed(monkeypatch, "flashinfer", "triton")
    with caplog.at_level(logging.INFO, selection.__name__):
        for _ in range(3):
            assert choose(Kernel.MERGE, "cpu", torch.float32, 64).name is Name.TORCH
    assert [record.message for record in caplog.records] == [
        "attention-state merge of torch.float32 on cpu: torch (Triton and FlashInfer need an NVIDIA or AMD GPU)"
    ]
