"""A preemption is recorded once the device has ended what the stopped task had launched, and all in its order."""

from __future__ import annotations

import msgspec

from flowprefill_sglang.observe.events import Event, TaskPreempted, TaskResumed
from flowprefill_sglang.prefill_worker.drained_events import DrainedEvents
from flowprefill_sglang.prefill_worker.run_ahead import Cost, InStep, RunAheadLimiter
from flowprefill_testing.fake_device import FakeDevice

PREEMPTED = TaskPreempted(at=1.0, task=1, rids=["a"], victim_class="file", by_class="text", blocking_s=0.25)
RESUMED = TaskResumed(at=2.0, task=1, rids=["a"], suspended_s=0.5)


def limiter_of(device: FakeDevice) -> RunAheadLimiter:
    return RunAheadLimiter(device, {"op": Cost(0.0, 1.0)}, max_blocking_s=2e-3, clock=device.clock, sleep=device.sleep)


def test_blocking_lasts_until_the_devices_end() -> None:
    device = FakeDevice()
    limiter, recorded = limiter_of(device), list[Event]()
    events = DrainedEvents(recorded.append, limiter)
    limiter.runs(Cost(0.0, 1.0))
    limiter.launched("op", 1.0)
    device.launch(1.0)
    limiter.stopped(has_ended=False)
    events(PREEMPTED)
    events(RESUMED)
    assert recorded == []
    device.now += 0.75
    events.settle()
    assert recorded == []
    device.now += 0.25
    events.settle()
    assert recorded == [msgspec.structs.replace(PREEMPTED, blocking_s=1.25), RESUMED]
    events(RESUMED)
    assert len(recorded) == 3, "nothing is held any more"


def test_each_preemption_waits_for_its_own_stop() -> None:
    device = FakeDevice()
    limiter, recorded = limiter_of(device), list[Event]()
    events = DrainedEvents(recorded.append, limiter)
    limiter.drain()  # a first mark, from which later ones count
    for _ in range(2):
        limiter.runs(Cost(0.0, 1.0))
        limiter.launched("op", 1.0)
        device.launch(1.0)
        limiter.stopped(has_ended=False)
        events(PREEMPTED)
        device.now += 0.5
    device.now += 1.0
    events.settle()
    blocked_s = [event.blocking_s for event in recorded if isinstance(event, TaskPreempted)]
    assert blocked_s == [0.25 + 1.0, 0.25 + 1.5]


def test_where_the_host_computes_itself_events_pass() -> None:
    recorded: list[Event] = []
    events = DrainedEvents(recorded.append, InStep())
    events(PREEMPTED)
    assert recorded == [PREEMPTED]
