"""A cost model from counting operations."""

from __future__ import annotations

import pytest

from flowprefill_sglang.core.cost_guess import DeviceFigures, Shape, analytic
from flowprefill_sglang.core.prefill_cost import Extent

LLAMA_8B = Shape(active_parameters=7_500_000_000, resident_bytes=16_000_000_000, layers=32, attention_width=4096)
GPU = DeviceFigures(flops_per_s=400e12, bytes_per_s=2.5e12, overhead_s=2e-3)


def test_a_short_prompt_takes_as_long_as_reading_the_weights() -> None:
    model = analytic(LLAMA_8B, GPU)
    assert model.seconds((Extent(1),)) == pytest.approx(16e9 / 2.5e12, rel=1e-3)


def test_a_long_prompt_takes_its_operations() -> None:
    seconds = analytic(LLAMA_8B, GPU).seconds((Extent(30_000),))
    operations = 2 * 7.5e9 * 30_000 + 4 * 32 * 4096 * 30_000**2 / 2
    assert seconds == pytest.approx(operations / 400e12, rel=1e-3)


def test_overhead_is_a_floor_too() -> None:
    tiny = Shape(active_parameters=1_000_000, resident_bytes=4_000_000, layers=4, attention_width=128)
    assert analytic(tiny, GPU).seconds((Extent(1),)) == pytest.approx(2e-3, rel=1e-3)
