from __future__ import annotations

from flowprefill_sglang.prefill_worker.boundaries import Gate


class Stops:
    """Counts how often a task was asked to stop."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def test_nothing_stops_while_no_task_runs() -> None:
    gate = Gate()
    gate.raise_flag()
    gate.cross()
    assert gate.boundaries == 0


def test_a_raised_flag_stops_the_running_task() -> None:
    gate, stops = Gate(), Stops()
    gate.open(stops)
    gate.cross()
    assert stops.count == 0
    gate.raise_flag()
    gate.cross()
    gate.clear()
    gate.cross()
    assert (stops.count, gate.boundaries) == (1, 3)


def test_what_can_wait_stops_the_running_task_once_it_has_waited() -> None:
    now = [100.0]
    gate, stops = Gate(lambda: now[0]), Stops()
    gate.open(stops)
    gate.raise_within(9.0)
    gate.raise_within(2.0)
    now[0] = 101.0
    gate.raise_within(2.0)  # the earliest decides
    gate.cross()
    assert stops.count == 0
    now[0] = 102.0
    gate.cross()
    assert stops.count == 1
    gate.clear()
    gate.cross()
    assert stops.count == 1


def test_an_instrument_can_stop_the_running_task() -> None:
    gate, stops = Gate(), Stops()
    asked: list[bool] = [False, True]
    gate.open(stops)
    gate.watch(lambda: asked.pop(0))
    gate.cross()
    gate.cross()
    assert stops.count == 1
    gate.watch(None)
    gate.cross()
    assert stops.count == 1


def test_no_boundary_while_closed_for_an_operator() -> None:
    gate, stops = Gate(), Stops()
    gate.open(stops)
    gate.raise_flag()
    gate.is_closed = True
    gate.cross()
    gate.is_closed = False
    gate.cross()
    assert (stops.count, gate.boundaries) == (1, 1)


def test_nothing_stops_after_the_task_has_left() -> None:
    gate, stops = Gate(), Stops()
    gate.open(stops)
    gate.close()
    gate.raise_flag()
    gate.cross()
    assert stops.count == 0
