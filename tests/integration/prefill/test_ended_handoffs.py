"""Ended handoffs are taken in at once when somebody waits for what they hold, and several at a time otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from flowprefill_sglang.integration.prefill.ended_handoffs import EndedHandoffs
from flowprefill_sglang.integration.prefill.wakeup import ENDED_MAY_WAIT_S, MAY_WAIT_S, News, Taken
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_testing.gates import Clock, stops

NOW = 100.0


@dataclass
class Worker:
    """A scheduler with one handoff under way, and our state machine."""

    free_buffers: int = 5
    running: object | None = None
    waiting: list[str] = field(default_factory=list)
    _engine_paused: bool = False
    looks: int = 0

    def __post_init__(self) -> None:
        self.disagg_prefill_inflight_queue = ["a request"]
        self.req_to_metadata_buffer_idx_allocator = SimpleNamespace(available_size=lambda: self.free_buffers)

    def process_disagg_prefill_inflight_queue(self) -> list[str]:
        self.looks += 1
        return ["a request"]


Setup = tuple[EndedHandoffs, Worker, News, Gate, Clock]


@pytest.fixture
def setup() -> Setup:
    worker, news, clock = Worker(), News(), Clock()
    gate = Gate(clock)
    return EndedHandoffs(worker, worker, gate, news), worker, news, gate, clock


def taken(at: float = NOW, ended_at: float | None = None, *, has_failure: bool = False) -> Taken:
    return Taken(at, has_message=False, has_failure=has_failure, ended_at=ended_at)


def test_an_idle_worker_looks_each_time(setup: Setup) -> None:
    handoffs, worker, *_ = setup
    assert handoffs.take_in(taken()) is None
    assert handoffs.take_in(taken()) is None
    assert worker.looks == 2


def test_while_requests_wait_it_looks_now_and_then(setup: Setup) -> None:
    handoffs, worker, *_ = setup
    worker.waiting = ["another"]
    handoffs.take_in(taken())
    handoffs.take_in(taken(NOW + MAY_WAIT_S / 2))
    assert worker.looks == 1
    handoffs.take_in(taken(NOW + MAY_WAIT_S))
    assert worker.looks == 2


def test_what_was_put_off_is_not_forgotten(setup: Setup) -> None:
    handoffs, worker, _, gate, clock = setup
    worker.waiting = ["another"]
    handoffs.take_in(taken())
    handoffs.take_in(taken(NOW + 0.001, ended_at=NOW))
    assert handoffs.ended_at == NOW
    clock.now += 2 * ENDED_MAY_WAIT_S
    assert stops(gate), "the task that was started meanwhile"
    worker.running = object()
    handoffs.take_in(taken(NOW + ENDED_MAY_WAIT_S))
    assert (worker.looks, handoffs.ended_at) == (2, None)


def test_a_running_task_is_not_held_up_for_nothing(setup: Setup) -> None:
    handoffs, worker, *_ = setup
    worker.running = object()
    handoffs.take_in(taken())
    assert worker.looks == 0


def test_a_stop_for_something_else_does_not_bring_it_forward_nor_put_it_off(setup: Setup) -> None:
    handoffs, worker, _, gate, clock = setup
    worker.running = object()
    for step in range(4):
        gate.clear()  # each turn does
        clock.now = NOW + step * ENDED_MAY_WAIT_S / 4
        handoffs.take_in(taken(clock.now, ended_at=NOW if step == 0 else None))
    assert worker.looks == 0
    clock.now = NOW + ENDED_MAY_WAIT_S
    assert stops(gate)
    handoffs.take_in(taken(clock.now))
    assert worker.looks == 1


def test_a_failure_is_not_put_off(setup: Setup) -> None:
    handoffs, worker, *_ = setup
    worker.running = object()
    handoffs.take_in(taken(ended_at=NOW, has_failure=True))
    assert worker.looks == 1


def test_a_paused_engine_puts_nothing_off(setup: Setup) -> None:
    handoffs, worker, *_ = setup
    worker.running, worker._engine_paused = object(), True
    handoffs.take_in(taken(ended_at=NOW))
    assert worker.looks == 1


@pytest.mark.parametrize(("ended_at", "at"), [(NOW - 1, NOW - 1), (None, 0.0)])
def test_memory_that_somebody_waits_for_is_freed_at_once(setup: Setup, ended_at: float | None, at: float) -> None:
    handoffs, worker, news, *_ = setup
    worker.running, news.is_memory_short = object(), True
    assert handoffs.take_in(taken(ended_at=ended_at)) == at


def test_without_a_free_buffer_it_looks_each_time(setup: Setup) -> None:
    handoffs, worker, *_ = setup
    worker.running, worker.free_buffers = object(), 0
    handoffs.take_in(taken())
    assert worker.looks == 1
