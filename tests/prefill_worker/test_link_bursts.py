"""Many requests at once, for an engine that blocks the worker's event loop with each."""

import asyncio

from flowprefill_sglang.wire.framing import decode_from_worker
from flowprefill_sglang.wire.messages import Answer, Dispatch, Heartbeat
from flowprefill_testing.link_ends import BEAT_S, linked

BURST = 12


def test_a_worker_beats_between_the_requests_of_a_burst() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, _):
            engine.blocks_s = 1.2 * BEAT_S  # as tokenizing a long prompt does
            for number in range(BURST):
                await router.send(Dispatch(rid=str(number), path="/generate"), b"long")
            beats = answers = 0
            async with asyncio.timeout(30):
                while answers < BURST:
                    _, *frames = await router.socket.recv_multipart()
                    message, _ = decode_from_worker(frames)
                    beats += isinstance(message, Heartbeat)
                    answers += isinstance(message, Answer)
            assert beats >= BURST - 2

    asyncio.run(scenario())
