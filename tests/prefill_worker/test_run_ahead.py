"""The run-ahead limiter against a device that executes asynchronously, on a clock of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.run_ahead import (
    BUDGET_SHARE,
    MARKS_PER_BUDGET,
    NAP_S,
    Cost,
    InStep,
    Ledger,
    RunAheadLimiter,
)
from flowprefill_testing.fake_device import FakeDevice

MAX_BLOCKING_S = 2e-3
BUDGET_S = BUDGET_SHARE * MAX_BLOCKING_S
SPACING_S = BUDGET_S / MARKS_PER_BUDGET
EPSILON_S = 1e-9
LAUNCH_S = 5e-6
"""What the host takes to launch an operator."""


@dataclass
class Operator:
    attention_s: float
    rest_s: float

    @property
    def predicted_s(self) -> float:
        return self.attention_s + self.rest_s


@dataclass
class Host:
    """Launches operators as SGLang does behind a gate, and looks at what is in flight."""

    operators: Sequence[Operator]
    attention_factor: float = 1.0
    """Actual over predicted time."""
    rest_factor: float = 1.0
    oversleep_s: float = 0.0
    budget_s: float | None = None
    device: FakeDevice = field(init=False)
    most_before_s: float = 0.0
    """Most that was in flight when an operator was launched, without that one."""

    def __post_init__(self) -> None:
        self.device = FakeDevice(oversleep_s=self.oversleep_s)
        self.limiter = RunAheadLimiter(
            self.device,
            {number: Cost(op.attention_s, op.rest_s) for number, op in enumerate(self.operators)},
            max_blocking_s=MAX_BLOCKING_S,
            budget_s=self.budget_s,
            clock=self.device.clock,
            sleep=self.device.sleep,
        )
        self.gate = Gate(self.device.clock)
        self.gate.device = self.limiter
        self.gate.open(lambda: None)

    def actual_s(self, number: int) -> float:
        op = self.operators[number]
        return op.attention_s * self.attention_factor + op.rest_s * self.rest_factor

    def launch(self, number: int) -> None:
        self.gate.cross()
        self.limiter.launched(number, 1.0)
        self.most_before_s = max(self.most_before_s, self.device.in_flight_s())
        self.device.now += LAUNCH_S
        self.device.launch(self.actual_s(number))

    def run(self) -> None:
        """One task that is not short: its shares are in seconds, so what it costs is 1."""
        self.limiter.runs(Cost(1.0, 1.0))
        for number in range(len(self.operators)):
            self.launch(number)

    @property
    def total_s(self) -> float:
        return sum(self.actual_s(number) for number in range(len(self.operators)))


def of_model(draw: st.DrawFn, longest_s: float, shortest_s: float) -> list[Operator]:
    """Layers of one attention operator and some linear ones, as long as they come."""
    lengths = st.floats(shortest_s, longest_s)
    attention_s, linear_s = draw(lengths), draw(st.lists(lengths, min_size=1, max_size=4))
    layer = [Operator(attention_s, 0.0), *(Operator(0.0, seconds) for seconds in linear_s)]
    return layer * draw(st.integers(5, 20))


models = st.composite(of_model)
factors = st.sampled_from([0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0])
oversleeps = st.floats(0.0, 1.5e-4)


@given(operators=models(longest_s=2e-2, shortest_s=2e-5), oversleep_s=oversleeps)
def test_no_more_than_the_budget_and_one_operator_is_in_flight(operators: list[Operator], oversleep_s: float) -> None:
    host = Host(operators, oversleep_s=oversleep_s)
    host.run()
    assert host.most_before_s <= BUDGET_S + EPSILON_S


@given(operators=models(longest_s=2e-2, shortest_s=2e-5), oversleep_s=oversleeps)
def test_the_device_never_idles_while_the_host_keeps_up(operators: list[Operator], oversleep_s: float) -> None:
    host = Host(operators, oversleep_s=oversleep_s)
    host.run()
    assert host.device.idle_s <= EPSILON_S
    done_meanwhile_s = len(operators) * LAUNCH_S  # by the device, while the host launched
    if host.total_s - done_meanwhile_s > BUDGET_S + max(op.predicted_s for op in operators):
        assert host.device.slept_s, "nothing was limited"


@given(
    operators=models(longest_s=5e-3, shortest_s=2e-5),
    attention=factors,
    rest=factors,
    oversleep_s=oversleeps,
)
@settings(max_examples=200)
def test_wrong_predictions_move_the_bound_by_as_much(
    operators: list[Operator], attention: float, rest: float, oversleep_s: float
) -> None:
    host = Host(operators, attention_factor=attention, rest_factor=rest, oversleep_s=oversleep_s)
    host.run()
    # What is measured of one kind may first be put down to the other, so the two errors can multiply.
    wrong_by = max(1.0, attention, rest) / min(1.0, attention, rest)
    longest_s = max(op.predicted_s for op in operators)
    # The device is at an unknown place between two marks, at most a stretch and its last operator apart.
    assert host.most_before_s <= wrong_by * (BUDGET_S + SPACING_S + longest_s) + EPSILON_S


@given(operators=models(longest_s=2e-4, shortest_s=5e-5), factor=st.sampled_from([0.5, 0.8, 1.25, 2.0]))
def test_wrong_predictions_of_short_operators_leave_the_device_busy(operators: list[Operator], factor: float) -> None:
    host = Host(operators, attention_factor=factor, rest_factor=factor, oversleep_s=5e-5)
    host.run()
    assert host.device.idle_s <= EPSILON_S


def test_predictions_are_corrected_by_what_the_device_takes() -> None:
    layer = [Operator(4e-4, 0.0), *[Operator(0.0, 2e-4)] * 4]
    host = Host(layer * 200, attention_factor=3.0, rest_factor=0.5)
    host.run()
    assert host.limiter.ledger.factors == pytest.approx((3.0, 0.5), rel=0.25)
    host.most_before_s = 0.0
    host.run()
    assert host.most_before_s <= 1.3 * BUDGET_S


def test_a_stretch_with_a_gap_in_it_teaches_nothing() -> None:
    host = Host([Operator(0.0, SPACING_S)] * 20)
    host.limiter.runs(Cost(1.0, 1.0))
    for number in range(20):
        host.launch(number)
        host.device.now += 1.0  # the host is elsewhere, and the device has long been idle
    assert host.limiter.ledger.factors == (1.0, 1.0)


@given(
    operators=models(longest_s=3e-3, shortest_s=2e-5),
    order=st.lists(st.integers(0, 3), min_size=20, max_size=200),
)
def test_switching_between_tasks_keeps_one_bound(operators: list[Operator], order: list[int]) -> None:
    host = Host(operators)
    at, was = [0, 0, 0, 0], None
    for task in order:
        if task != was:
            if was is not None:
                host.limiter.stopped(has_ended=False)
            host.limiter.runs(Cost(1.0, 1.0))
            was = task
        host.launch(at[task] % len(operators))
        at[task] += 1
    assert host.most_before_s <= BUDGET_S + EPSILON_S


@given(operators=models(longest_s=3e-3, shortest_s=2e-5), oversleep_s=oversleeps)
def test_the_end_of_a_stopped_task_is_known(operators: list[Operator], oversleep_s: float) -> None:
    host = Host(operators, oversleep_s=oversleep_s)
    host.limiter.drain()  # the first mark of a process has none before it to count from
    host.run()
    stopped_at = host.limiter.stopped(has_ended=False)
    ends_at = max(host.device.free_at, host.device.now)
    stop = host.limiter.last_stop
    assert stop is not None
    assert stop.stopped_at == stopped_at == host.device.now
    assert (stop.ended_at is None) == (host.device.in_flight_s() > 0)
    host.run()  # another one, which the device takes after it
    host.limiter.drain()
    assert stop.ended_at is not None
    # Seen while the next one is launched, a nap late at most.
    assert ends_at - EPSILON_S <= stop.ended_at <= ends_at + NAP_S + oversleep_s + 2 * LAUNCH_S + EPSILON_S


def test_a_task_has_ended_when_the_device_has() -> None:
    host = Host([Operator(0.0, 1e-4)] * 50)
    host.run()
    assert host.device.in_flight_s() > 0
    ended_at = host.limiter.stopped(has_ended=True)
    assert host.device.in_flight_s() == 0
    assert ended_at == host.device.now == pytest.approx(host.device.free_at)


def test_a_thread_that_is_wanted_elsewhere_waits_no_longer() -> None:
    host = Host([Operator(0.0, 0.5), Operator(0.0, 0.5)])
    host.limiter.runs(Cost(1.0, 1.0))
    stops = []
    host.gate.open(lambda: stops.append(host.device.now))
    host.launch(0)
    came_at = host.device.now + 0.01
    wake = host.device.sleep

    def sleep(seconds: float) -> None:
        wake(seconds)
        if host.device.now >= came_at:
            host.gate.raise_flag()

    host.limiter._sleep = sleep
    host.gate.cross()
    assert len(stops) == 1
    assert came_at <= stops[0] <= came_at + 2 * NAP_S
    assert host.device.in_flight_s() <= BUDGET_S + EPSILON_S, "after the stop it waits before it launches"


def test_a_short_task_is_launched_in_one_go_and_counts_for_the_next() -> None:
    host = Host([Operator(0.0, 1.0)])
    host.limiter.runs(Cost(0.0, MAX_BLOCKING_S))
    assert host.limiter.is_short
    for _ in range(3):
        host.launch(0)
    assert not host.device.slept_s
    host.limiter.runs(Cost(0.0, 1.01 * MAX_BLOCKING_S))
    assert not host.limiter.is_short
    assert host.limiter.ledger.in_flight_s(host.device.now) > 1.9 * MAX_BLOCKING_S, "of the two before"
    host.gate.cross()
    assert host.device.slept_s
    assert host.limiter.ledger.in_flight_s(host.device.now) <= BUDGET_S + EPSILON_S


@given(operators=models(longest_s=5e-3, shortest_s=2e-5))
def test_the_synchronising_variant_empties_the_device_at_every_boundary(operators: list[Operator]) -> None:
    host = Host(operators, budget_s=0.0)
    host.run()
    assert host.most_before_s == 0
    assert host.device.idle_s > 0, "which is what it costs"


def test_the_unbounded_variant_waits_for_nothing() -> None:
    host = Host([Operator(1e-3, 1e-3)] * 100, budget_s=math.inf)
    host.run()
    assert not host.device.slept_s
    assert host.device.in_flight_s() == pytest.approx(host.total_s, abs=1e-3)


def test_a_part_of_an_operator_counts_as_that_part() -> None:
    ledger: Ledger[object] = Ledger(BUDGET_S)
    limiter = RunAheadLimiter(FakeDevice(), {"op": Cost(0.5, 0.25)}, max_blocking_s=MAX_BLOCKING_S)
    limiter._ledger = ledger
    limiter.runs(Cost(8.0, 4.0))
    for _ in range(4):
        limiter.launched("op", 0.25)
    ledger.queued(0.0)
    assert ledger.in_flight_s(0.0) == pytest.approx(5.0)


def test_where_the_host_computes_itself_nothing_waits() -> None:
    now = [5.0]
    device = InStep(short_s=2e-3, clock=lambda: now[0])
    device.runs(Cost(1e-3, 1e-3))
    assert device.is_short
    device.runs(Cost(1e-3, 2e-3))
    assert not device.is_short
    device.hold(lambda: False)
    device.launched("op", 1.0)
    assert device.stopped(has_ended=False) == device.stopped(has_ended=True) == 5.0
    assert device.last_stop is None
