from __future__ import annotations

from collections.abc import Callable

from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.run_ahead import InStep


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


class Launches(InStep):
    """A device; keeps what it was told to expect."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[object] = []

    def hold(self, is_wanted: Callable[[], bool]) -> None:
        self.told.append("hold")

    def launched(self, operator: object, part: float) -> None:
        self.told.append((operator, part))


def test_the_gate_is_closed_for_an_operator_of_which_the_device_knows() -> None:
    gate, device = Gate(), Launches()
    gate.device = device
    gate.open(lambda: device.told.append("suspended"))
    gate.raise_flag()
    gate.cross(0, "linear", 0.5)
    assert gate.is_closed
    gate.cross(0, "inside of it")
    assert device.told == ["hold", "suspended", "hold", ("linear", 0.5)]
    gate.clear()
    gate.is_closed = False
    gate.cross()
    assert not gate.is_closed, "nothing was launched"


def test_nothing_stops_after_the_task_has_left() -> None:
    gate, stops = Gate(), Stops()
    gate.open(stops)
    gate.close()
    gate.raise_flag()
    gate.cross()
    assert stops.count == 0


class Decided:
    """A lease whose decisions are given; keeps what it was told."""

    def __init__(self, *stops: bool) -> None:
        self._stops = list(stops)
        self.told: list[object] = []

    def begin(self) -> None:
        self.told.append("begin")

    def cross(self, wants_stop: bool, kind: int) -> bool:
        self.told.append((wants_stop, kind))
        return self._stops.pop(0)

    def cannot_stop(self) -> None:
        self.told.append("cannot stop")

    def end(self) -> None:
        self.told.append("end")


def test_with_other_ranks_the_lease_decides() -> None:
    lease, stops = Decided(False, True), Stops()
    gate = Gate(lease=lease)
    gate.cross(kind=9)  # before any task, and of no interest to it
    gate.open(stops)
    gate.raise_flag()
    gate.cross(kind=5)
    assert stops.count == 0, "it has not been granted"
    gate.clear()
    gate.cross(kind=6)
    assert stops.count == 1
    gate.cannot_stop()
    gate.close()
    gate.close()  # of a task that is discarded, without a stretch
    assert lease.told == ["begin", (True, 5), (False, 6), "cannot stop", "end"]
