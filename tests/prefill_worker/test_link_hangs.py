"""A process of the engine that does not answer, behind a link whose own loop goes on."""

import asyncio
import time

import pytest

from flowprefill_sglang.prefill_worker.link import EngineHangs
from flowprefill_sglang.prefill_worker.signs_of_life import Part
from flowprefill_sglang.wire.messages import Dispatch, Goodbye, Heartbeat
from flowprefill_testing.link_ends import linked


class FastClock:
    """Seconds that pass a hundred times as fast."""

    def __init__(self) -> None:
        self._began_at = time.monotonic()

    def __call__(self) -> float:
        return self._began_at + 100.0 * (time.monotonic() - self._began_at)


@pytest.mark.parametrize("part", Part)
def test_a_process_that_hangs_ends_the_worker_and_the_router_is_told(part: Part) -> None:
    async def scenario() -> None:
        async with linked(clock=FastClock()) as (router, engine, task):
            engine.hung = part
            engine.controlled = part is not Part.SCHEDULER  # which excuses that one alone
            await router.send(Dispatch(rid="a", path="/generate"), b"hold")
            await router.receive(Heartbeat, lambda beat: beat.load.silent_s > 3.0)
            goodbye, _ = await router.receive(Goodbye)
            assert f"its {part} process has not answered for 6" in goodbye.reason
            with pytest.raises(EngineHangs, match="--unresponsive-secs"):
                await task
            assert engine.questions[part] == 1, "and no more while it has not answered"

    asyncio.run(scenario())


def test_a_scheduler_that_answers_or_has_a_control_request_is_no_hang() -> None:
    async def scenario() -> None:
        clock = FastClock()
        async with linked(clock=clock) as (router, engine, task):
            await router.send(Dispatch(rid="a", path="/generate"), b"hold")
            while min(engine.questions.values()) < 3:
                await router.receive(Heartbeat)
            engine.hung, engine.controlled = Part.SCHEDULER, True
            until = clock() + 150.0
            while clock() < until:
                beat, _ = await router.receive(Heartbeat)
                assert beat.load.silent_s == 0.0
            assert not task.done()

    asyncio.run(scenario())
