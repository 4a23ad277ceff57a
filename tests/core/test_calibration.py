"""What is measured for a cost model, and within which time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from flowprefill_sglang.core.calibration import WARM_UP_RUNS, Batch, Limits, calibrate, grid, held_out, measure
from flowprefill_sglang.core.prefill_cost import CostModel, Extent

LIMITS = Limits(max_new_tokens=8192, max_request_tokens=16_383, max_batch_tokens=40_000, budget_s=1.5)
DEVICES = {
    "a tiny model on a core": CostModel(
        base_s=7e-3, request_s=6e-4, short_token_s=0, long_token_s=3e-5, pair_s=2.5e-8, cached_pair_s=2.4e-8
    ),
    "a large one on a GPU": CostModel(
        base_s=2e-2, short_token_s=1e-6, long_token_s=4e-5, knee_tokens=400, pair_s=1.2e-9
    ),
    "a slow machine": CostModel(base_s=0.2, short_token_s=1e-3, long_token_s=1e-3, pair_s=1e-6),
}


class Device:
    """Takes as long as a cost model says, longer for the first forwards, and records what it was asked."""

    def __init__(self, model: CostModel, noise: float = 0.0) -> None:
        self.model = model
        self.ran: list[Batch] = []
        self.spent_s = 0.0
        self._noise = noise
        self._rng = random.Random(1)

    def __call__(self, batch: Sequence[Extent]) -> float:
        seconds = self.model.seconds(batch) * (1 + abs(self._rng.gauss(0, self._noise)))
        if len(self.ran) < WARM_UP_RUNS:
            seconds *= 300
        else:
            self.spent_s += seconds
        self.ran.append(tuple(batch))
        return seconds


@pytest.mark.parametrize("name", DEVICES)
def test_a_short_calibration_predicts(name: str) -> None:
    device = Device(DEVICES[name], noise=0.05)
    model = calibrate(device, LIMITS)
    for new, cached in ((20, 0), (100, 0), (700, 0), (100, 300)):
        batch = (Extent(new, cached),)
        assert model.seconds(batch) == pytest.approx(device.model.seconds(batch), rel=0.3), batch


@pytest.mark.parametrize("name", [name for name in DEVICES if name != "a slow machine"])
@pytest.mark.parametrize("length_factor", [1.5, 4.0])
def test_it_keeps_to_its_time(name: str, length_factor: float) -> None:
    device = Device(DEVICES[name])
    calibrate(device, replace(LIMITS, length_factor=length_factor))
    assert 0.5 * LIMITS.budget_s < device.spent_s <= LIMITS.budget_s


def test_a_slow_machine_is_asked_no_more_than_needed() -> None:
    device = Device(DEVICES["a slow machine"])
    calibrate(device, replace(LIMITS, budget_s=0.5))
    assert len(device.ran) == WARM_UP_RUNS + 3


NARROW = Limits(
    max_new_tokens=300, max_request_tokens=250, max_batch_tokens=400, max_requests=5, budget_s=1e9, length_factor=2.0
)


def test_nothing_beyond_the_limits_is_run() -> None:
    device = Device(DEVICES["a tiny model on a core"])
    measure(device, NARROW)
    assert {len(batch) for batch in device.ran} == {1, 2, 4}
    assert any(extent.cached_tokens for batch in device.ran for extent in batch)
    assert all(NARROW.allow(batch) for batch in device.ran)


@pytest.mark.parametrize(
    "batch",
    [
        (Extent(301),),
        (Extent(151), Extent(150)),
        (Extent(1, 250),),
        (Extent(50, 200), Extent(151)),
        (Extent(1),) * 6,
    ],
)
def test_what_the_limits_do_not_allow(batch: Batch) -> None:
    assert not NARROW.allow(batch)


def test_the_shortest_run_counts_and_warm_up_does_not() -> None:
    seconds = iter([9.0, 8.0, 1.0, 0.5, 0.5])  # the first two are warm-up
    limits = Limits(max_new_tokens=16, max_request_tokens=16, max_batch_tokens=16, budget_s=2.0)
    (measured,) = measure(lambda batch: next(seconds), limits)
    assert measured.seconds == (1.0, 0.5, 0.5)
    assert measured.sample.seconds == 0.5


def test_progress_is_told() -> None:
    told: list[float] = []
    device = Device(DEVICES["a tiny model on a core"])
    measure(device, LIMITS, on_run=told.append)
    assert len(told) == len(device.ran)
    assert sum(told[WARM_UP_RUNS:]) == pytest.approx(device.spent_s)


def test_held_out_batches_are_none_of_the_grid() -> None:
    others = held_out(LIMITS, 60, random.Random(0))
    assert len(others) > 40
    assert not set(others) & {*grid(LIMITS)}
    assert all(NARROW.allow(batch) for batch in held_out(NARROW, 60, random.Random(0)))
    assert {len(batch) > 1 for batch in others} == {True, False}
    assert {any(extent.cached_tokens for extent in batch) for batch in others} == {True, False}


def test_limits_that_leave_nothing() -> None:
    with pytest.raises(ValueError, match="no prompt can be measured"):
        calibrate(Device(DEVICES["a slow machine"]), replace(LIMITS, max_new_tokens=8))


def test_a_machine_that_nothing_describes_gets_a_model_of_the_right_order() -> None:
    """Times between a millisecond and ten seconds whatever is run: for some of these no costs above 0 fit best."""
    limits = replace(LIMITS, max_new_tokens=1023)
    for seed in range(60):
        rng = random.Random(seed)
        model = calibrate(lambda batch, rng=rng: 10 ** rng.uniform(-3, 1), limits)
        assert 0 < model.seconds((Extent(256),)) < 60
