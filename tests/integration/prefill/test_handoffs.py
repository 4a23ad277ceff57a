"""Ended handoffs: freed at once when somebody waits for what they hold, and else several together."""

from types import SimpleNamespace
from typing import Any

import pytest

from flowprefill_sglang.integration.prefill.handoffs import Handoffs
from flowprefill_sglang.integration.prefill.wakeup import MAY_WAIT_S, News
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_testing.gates import Clock, stops


class Bench:
    """A scheduler with one handoff that has ended at 99."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.gate = Gate(self.clock)
        self.news = News()
        self.news.ended_at = 99.0
        self.buffers = 1
        self.freed = 0
        self.scheduler: Any = SimpleNamespace(
            disagg_prefill_inflight_queue=[object()],
            process_disagg_prefill_inflight_queue=self._free,
            req_to_metadata_buffer_idx_allocator=SimpleNamespace(available_size=lambda: self.buffers),
        )
        self.handoffs = Handoffs(self.scheduler, self.news, self.gate)

    def _free(self) -> list[object]:
        self.freed += 1
        return [object()]

    def take_in(self, *, is_running: bool = False, is_waiting: bool = False) -> float | None:
        return self.handoffs.take_in(self.clock.now, is_running=is_running, is_waiting=is_waiting)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_nobody_is_told_when_nobody_waits_for_memory(bench: Bench) -> None:
    assert bench.take_in() is None
    assert bench.freed == 1


def test_who_waits_for_memory_is_told_when_it_became_free(bench: Bench) -> None:
    bench.news.is_memory_short = True
    assert bench.take_in(is_running=True, is_waiting=True) == 99.0


def test_between_short_tasks_they_are_taken_in_together(bench: Bench) -> None:
    bench.take_in(is_waiting=True)
    for _ in range(3):
        bench.news.ended_at = bench.clock.now
        bench.clock.now += MAY_WAIT_S / 4
        bench.take_in(is_waiting=True)
    assert bench.freed == 1
    bench.clock.now += MAY_WAIT_S / 4
    bench.take_in(is_waiting=True)
    assert bench.freed == 2


def test_a_long_task_that_begins_meanwhile_is_stopped_for_them(bench: Bench) -> None:
    bench.take_in(is_waiting=True)
    bench.news.ended_at = bench.clock.now
    bench.take_in(is_waiting=True)
    assert not stops(bench.gate)
    bench.clock.now += MAY_WAIT_S
    assert stops(bench.gate)


def test_an_idle_worker_takes_them_in_at_once(bench: Bench) -> None:
    bench.take_in(is_waiting=True)
    bench.take_in()
    assert bench.freed == 2


def test_a_request_that_needs_a_metadata_buffer_does_not_wait(bench: Bench) -> None:
    bench.take_in(is_waiting=True)
    bench.buffers = 0
    bench.take_in(is_waiting=True)
    assert bench.freed == 2


def test_a_stopped_task_takes_in_what_has_ended_and_nothing_else(bench: Bench) -> None:
    bench.take_in(is_running=True, is_waiting=True)
    assert bench.freed == 1
    bench.take_in(is_running=True, is_waiting=True)
    assert bench.freed == 1
