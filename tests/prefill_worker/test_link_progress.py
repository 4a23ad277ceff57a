"""What the engine's scheduler does is told to the router, by the names of dispatches."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from flowprefill_sglang.observe.events import (
    Event,
    Outcome,
    RequestArrived,
    RequestEnded,
    TaskPreempted,
    TaskResumed,
    TaskStarted,
)
from flowprefill_sglang.prefill_worker.event_feed import EventFeed
from flowprefill_sglang.prefill_worker.reporter import SchedulerReporter
from flowprefill_sglang.wire.messages import Dispatch, Heartbeat, Phase, Progress
from flowprefill_testing.link_ends import WAIT, Router, linked


def started(*rids: str) -> Event:
    return TaskStarted(
        at=1, task=1, rids=list(rids), new_tokens=1, cached_tokens=0, predicted_s=0.1, deadline_at=math.inf
    )


def preempted(*rids: str) -> Event:
    return TaskPreempted(at=2, task=1, rids=list(rids), victim_class="a", by_class="b", blocking_s=0.001)


def resumed(*rids: str) -> Event:
    return TaskResumed(at=3, task=1, rids=list(rids), suspended_s=1)


@asynccontextmanager
async def reported(folder: Path) -> AsyncIterator[tuple[Router, SchedulerReporter]]:
    """A link whose engine's scheduler reports."""
    endpoint = f"ipc://{folder}/events"
    feed, reporter = EventFeed(endpoint), SchedulerReporter(endpoint)
    feed.open()
    try:
        async with linked(feed=feed) as (router, _, _):
            yield router, reporter
    finally:
        reporter.close()
        feed.close()


def test_what_the_scheduler_does_is_told_to_the_router(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with reported(tmp_path) as (router, reporter):
            await router.send(Dispatch(rid="a", path="/generate"), WAIT)
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            for event in (started("a", "stranger"), preempted("a", "stranger"), resumed("a", "stranger")):
                reporter.record(event)
            reporter.flush()
            for phase in (Phase.STARTED, Phase.PREEMPTED, Phase.RESUMED):
                progress, _ = await router.receive(Progress, lambda told: told.phase != Phase.QUEUED)
                assert progress == Progress(rid="a", phase=phase)

    asyncio.run(scenario())


def test_prompts_of_a_batch_speak_for_their_dispatch_until_they_end(tmp_path: Path) -> None:
    def arrived(rid: str) -> Event:
        return RequestArrived(at=1, rid=rid, tokens=1, slo_class="", received_at=1, deadline_at=2, dispatch_rid="batch")

    def ended(rid: str) -> Event:
        return RequestEnded(at=1, rid=rid, outcome=Outcome.PREFILLED, slo_class="", first_token_s=1, is_in_time=True)

    async def scenario() -> None:
        async with reported(tmp_path) as (router, reporter):
            await router.send(Dispatch(rid="batch", path="/generate"), b'{"rid": ["b0", "b1"], "text": "wait"}')
            await router.send(Dispatch(rid="last", path="/generate"), WAIT)
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 2)
            for event in (
                *(arrived("b0"), arrived("b1"), started("b0"), preempted("b0"), started("b1")),
                *(ended("b0"), ended("b1"), preempted("b1"), started("last")),
            ):
                reporter.record(event)
            reporter.flush()
            told = []
            while not told or told[-1].rid != "last":
                told.append((await router.receive(Progress, lambda told: told.phase != Phase.QUEUED))[0])
            phases = [message.phase for message in told[:-1]]
            assert {message.rid for message in told[:-1]} == {"batch"}
            assert phases == [Phase.STARTED, Phase.PREEMPTED, Phase.RESUMED], "one that has ended is forgotten"

    asyncio.run(scenario())
