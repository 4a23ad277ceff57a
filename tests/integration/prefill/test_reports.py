"""Events of short tasks travel together, and nobody hears late of a long one."""

from types import SimpleNamespace
from typing import Any

import pytest

from flowprefill_sglang.integration.prefill import reports
from flowprefill_sglang.integration.prefill.reports import Reports
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.run_ahead import InStep
from flowprefill_testing.gates import Clock, stops

SHORT: Any = SimpleNamespace(predicted_s=reports.EVERY_S / 2)
LONG: Any = SimpleNamespace(predicted_s=reports.EVERY_S * 100)


class Reporter:
    def __init__(self) -> None:
        self.sent = 0
        self.has_unsent = True

    def record(self, event: Any) -> None:
        raise AssertionError("nothing happens here")

    def flush(self) -> None:
        self.sent += 1
        self.has_unsent = False


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(clock: Clock) -> Gate:
    return Gate(clock)


@pytest.fixture
def reporter() -> Reporter:
    return Reporter()


@pytest.fixture
def sending(reporter: Any, gate: Gate) -> Reports:
    sending = Reports(reporter, gate, InStep())
    sending.send_if_due(100.0, None)
    assert reporter.sent == 1
    reporter.has_unsent = True
    return sending


def test_events_of_short_tasks_travel_together(sending: Reports, reporter: Reporter) -> None:
    sending.send_if_due(100.001, SHORT, has_started=True)
    assert reporter.sent == 1
    sending.send_if_due(100.001 + reports.EVERY_S, SHORT, has_started=True)
    assert reporter.sent == 2


def test_a_long_task_is_reported_before_it_runs(sending: Reports, reporter: Reporter) -> None:
    sending.send_if_due(100.001, LONG, has_started=True)
    assert reporter.sent == 2


def test_a_long_task_stops_for_what_happened_since(
    sending: Reports, reporter: Reporter, gate: Gate, clock: Clock
) -> None:
    sending.send_if_due(100.001, LONG)
    assert reporter.sent == 1
    assert not stops(gate)
    clock.now += 2 * reports.WITHIN_S
    assert stops(gate)


def test_it_does_not_stop_where_nothing_is_unsent(
    sending: Reports, reporter: Reporter, gate: Gate, clock: Clock
) -> None:
    reporter.has_unsent = False
    sending.send_if_due(100.001, LONG)
    clock.now += 2 * reports.WITHIN_S
    assert not stops(gate)
