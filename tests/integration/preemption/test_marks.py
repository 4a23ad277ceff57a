"""Whatever marks a device's queue behaves alike: the fake one of the unit tests, and CUDA's where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flowprefill_sglang.integration.preemption.cuda_marks import CudaMarks
from flowprefill_testing.fake_device import FakeDevice

WORK_S = 0.05
CYCLES = 100_000_000
"""Some 0.05 s of a GPU's clock."""

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["fake", pytest.param("cuda", marks=needs_gpu)])
def device(request: pytest.FixtureRequest) -> tuple[Any, Callable[[], None]]:
    """Marks, and a function that launches some work and returns at once."""
    if request.param == "fake":
        fake = FakeDevice()
        return fake, lambda: fake.launch(WORK_S)
    torch.cuda._sleep(1)  # compiles and loads what it needs
    torch.cuda.synchronize()
    return CudaMarks(torch.device("cuda", torch.cuda.current_device())), lambda: torch.cuda._sleep(CYCLES)


def test_a_mark_is_reached_when_what_is_before_it_has_ended(device: Any) -> None:
    marks, launch = device
    launch()
    mark = marks.record()
    assert not marks.is_reached(mark)
    marks.wait(mark)
    assert marks.is_reached(mark)


def test_a_mark_does_not_wait_for_what_is_behind_it(device: Any) -> None:
    marks, launch = device
    first = marks.record()
    launch()
    second = marks.record()
    marks.wait(first)
    assert not marks.is_reached(second)
    marks.wait(second)
    assert marks.is_reached(first)


def test_the_time_between_two_marks_is_that_of_the_work(device: Any) -> None:
    marks, launch = device
    launch()
    recorded = [marks.record()]
    for launches in (1, 3):
        for _ in range(launches):
            launch()
        recorded.append(marks.record())
    marks.wait(recorded[-1])
    one_s, three_s = (marks.elapsed_s(recorded[i], recorded[i + 1]) for i in range(2))
    assert 0.001 < one_s < 1.0
    assert three_s == pytest.approx(3 * one_s, rel=0.2)


def test_events_are_of_cuda_devices_only() -> None:
    with pytest.raises(ValueError, match="cpu"):
        CudaMarks(torch.device("cpu"))
