"""Events from a reporter to a feed over a real socket, as between SGLang's processes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq

from flowprefill_sglang.observe.events import Event, RoundDone, TaskStarted, Trigger
from flowprefill_sglang.prefill_worker import reporter
from flowprefill_sglang.prefill_worker.event_feed import EventFeed, EventRing
from flowprefill_sglang.prefill_worker.reporter import Batch, SchedulerReporter
from flowprefill_testing.stand_ins import in_loop, until


def started(task: int, at: float = 1.0) -> TaskStarted:
    return TaskStarted(
        at=at, task=task, rids=[f"r{task}"], new_tokens=1, cached_tokens=0, predicted_s=0.1, deadline_at=math.inf
    )


def round_done(at: float) -> RoundDone:
    return RoundDone(at=at, trigger=Trigger.ARRIVAL, duration_s=1e-5, waiting=0, suspended=0)


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/events"


class Seen:
    def __init__(self) -> None:
        self.batches: list[Sequence[Event]] = []

    def __call__(self, batch: Batch) -> None:
        self.batches.append(batch.events)


@asynccontextmanager
async def feeding(endpoint: str, **options: EventRing) -> AsyncIterator[tuple[EventFeed, Seen]]:
    feed, seen = EventFeed(endpoint, **options), Seen()
    feed.listen(seen)
    feed.open()
    try:
        yield feed, seen
    finally:
        feed.close()


@in_loop
async def test_a_rounds_events_arrive_together_and_in_order(endpoint: str) -> None:
    async with feeding(endpoint) as (_, seen):
        sender = SchedulerReporter(endpoint)
        for number in range(100):
            sender.record(started(number))
            sender.record(round_done(1.0))
            sender.flush()
            sender.flush()  # nothing new: nothing is sent
        await until(lambda: len(seen.batches) == 100)
        assert seen.batches == [[started(number), round_done(1.0)] for number in range(100)]
        sender.close()
        sender.close()


@in_loop
async def test_events_from_before_the_feed_opened_are_not_lost(endpoint: str) -> None:
    sender = SchedulerReporter(endpoint)
    sender.record(started(1))
    sender.flush()
    async with feeding(endpoint) as (_, seen):
        await until(lambda: seen.batches)
        assert seen.batches == [[started(1)]]
    sender.close()


@in_loop
async def test_without_a_reader_nothing_waits_and_what_is_lost_is_counted(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "MAX_PENDING_BATCHES", 10)
    sender = SchedulerReporter(endpoint)
    for number in range(1000):
        sender.record(started(number))
        sender.record(started(number))
        sender.flush()
    assert 0 < sender.lost < 2000
    async with feeding(endpoint) as (feed, seen):
        await until(lambda: seen.batches)
        sent_before = len(seen.batches)
        sender.record(started(1000))
        sender.flush()
        await until(lambda: len(seen.batches) > sent_before and seen.batches[-1] == [started(1000)])
        taken = await feed.recording("w", seconds=math.inf, monotonic_now=2.0, unix_now=0.0)
        assert len(taken.events) + taken.lost == 2001
    sender.close()


@in_loop
async def test_a_recording_holds_what_was_asked_for(endpoint: str) -> None:
    async with feeding(endpoint) as (feed, seen):
        sender = SchedulerReporter(endpoint)
        for at in range(10):
            sender.record(round_done(at))
            sender.record(round_done(at + 0.5))
            sender.flush()
        await until(lambda: len(seen.batches) == 10)
        taken = await feed.recording("w", seconds=2.0, monotonic_now=9.5, unix_now=1e9)
        assert [event.at for event in taken.events] == [7.5, 8.0, 8.5, 9.0, 9.5]
        assert (taken.worker, taken.monotonic_now, taken.unix_now, taken.lost) == ("w", 9.5, 1e9, 0)
        sender.close()


@in_loop
async def test_memory_is_bounded_and_the_oldest_events_go(endpoint: str) -> None:
    ring = EventRing(capacity_bytes=20_000)
    async with feeding(endpoint, ring=ring) as (feed, seen):
        sender = SchedulerReporter(endpoint)
        for at in range(1000):
            sender.record(round_done(at))
            sender.flush()
        await until(lambda: len(seen.batches) == 1000)
        assert 15_000 < ring.held_bytes <= 20_000
        taken = await feed.recording("w", seconds=math.inf, monotonic_now=1000.0, unix_now=0.0)
        assert [event.at for event in taken.events] == list(range(1000 - len(taken.events), 1000))
        assert 50 < len(taken.events) < 200
        sender.close()


@in_loop
async def test_nonsense_on_the_socket_is_dropped(endpoint: str) -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    async with feeding(endpoint) as (_, seen):
        with zmq.Context() as context, context.socket(zmq.PUSH) as rogue:
            rogue.connect(endpoint)
            for frames in ([b""], [b"\xff\xff"], [b"\x92\x91\x01\x00"], [b"\x92\x90\x00", b"more"]):
                rogue.send_multipart(frames)
            sender = SchedulerReporter(endpoint)
            sender.record(started(1))
            sender.flush()
            await until(lambda: [started(1)] in seen.batches)
            sender.close()
    assert not failures


@in_loop
async def test_a_feed_that_cannot_listen_says_so_and_lets_go(tmp_path: Path) -> None:
    feed = EventFeed(f"ipc://{tmp_path}/missing/events")
    with pytest.raises(zmq.ZMQError):
        feed.open()
    feed.close()


def test_without_anybody_who_wants_events_none_are_kept() -> None:
    sender = reporter.from_environment({})
    for number in range(10):
        sender.record(started(number))
    sender.flush()
    assert sender.lost == 0
    assert not sender._pending


def test_recording_an_event_is_cheap(endpoint: str) -> None:
    """It happens between two operators. The bound is ten times what it takes on a quiet core; it is there for a change
    of kind (a system call, a look-up that grows), not for noise."""
    sender = SchedulerReporter(endpoint)
    event = started(1)
    best_s = math.inf
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(100):
            sender.record(event)
        best_s = min(best_s, (time.perf_counter() - begin) / 100)
        sender.flush()
    sender.close()
    assert best_s < 10e-6
