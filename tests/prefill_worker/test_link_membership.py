"""How a worker joins its router, and how it leaves: greeted again, drained, refused, cancelled."""

import asyncio

import pytest
import zmq.asyncio

from flowprefill_sglang.prefill_worker.config import WorkerConfig
from flowprefill_sglang.prefill_worker.link import Link
from flowprefill_sglang.wire.framing import decode_from_worker
from flowprefill_sglang.wire.messages import Answer, Dispatch, Drain, Goodbye, Heartbeat, Hello, HelloAgain, Refused
from flowprefill_testing.link_ends import WAIT, WELCOME, PlainEngine, Router, linked


def test_a_router_that_forgot_us_is_greeted_on_a_new_connection() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, _):
            await router.send(Dispatch(rid="a", path="/generate"), WAIT)
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            former = router.peer
            await router.send(HelloAgain())
            await router.receive(Hello)
            assert router.peer != former
            await router.until_gone(former)
            assert engine.aborted[0] == "a"
            await router.send(WELCOME)
            beat, _ = await router.receive(Heartbeat)
            assert beat.load.in_flight == 0

    asyncio.run(scenario())


def test_greetings_do_not_pile_up_while_there_is_no_router() -> None:
    class Counting(PlainEngine):
        turns = 0

        def is_stopping(self):
            self.turns += 1
            return False

    async def scenario() -> None:
        with zmq.asyncio.Context() as context:
            probe = Router(context)
            probe.socket.unbind(f"tcp://127.0.0.1:{probe.port}")
            engine = Counting()
            config = WorkerConfig(router=f"tcp://127.0.0.1:{probe.port}", name="w0", hello_retry_s=0.02)
            task = asyncio.create_task(Link(config, engine).run())
            async with asyncio.timeout(10):
                while engine.turns < 60:  # noqa: ASYNC110 - turns raise no event
                    await asyncio.sleep(0.01)
            probe.socket.bind(config.router)
            await probe.receive(Hello)
            await probe.send(WELCOME)
            greetings = 1
            async with asyncio.timeout(10):
                while True:
                    _, *frames = await probe.socket.recv_multipart()
                    if isinstance(decode_from_worker(frames)[0], Heartbeat):
                        break
                    greetings += 1
            assert greetings < 50, "only those since the connection was made"
            task.cancel()
            await asyncio.wait([task])
            probe.socket.close(linger=0)

    asyncio.run(scenario())


def test_drained_worker_says_goodbye_and_stops() -> None:
    async def scenario() -> None:
        async with linked() as (router, _, task):
            await router.send(Drain())
            await router.receive(Goodbye)
            await asyncio.wait_for(task, 10)

    asyncio.run(scenario())


def test_a_worker_told_to_stop_drains_by_itself() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, _):
            engine.stopping = True
            goodbye, _ = await router.receive(Goodbye)
            assert goodbye.reason == "drained"

    asyncio.run(scenario())


def test_a_refused_worker_says_why_once_and_joins_a_router_that_was_upgraded(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with linked(join=False) as (router, _, task):
            for _ in range(3):
                await router.send(Refused(reason="upgrade router", protocol=0))
                await router.receive(Hello)
            assert not task.done()
            await router.send(WELCOME)
            await router.receive(Heartbeat)
            await router.send(Dispatch(rid="a", path="/generate"), b"hi")
            assert (await router.receive(Answer))[0].status == 200

    asyncio.run(scenario())
    assert [record.levelname for record in caplog.records if "upgrade router" in record.message] == ["ERROR"]


def test_cancelled_worker_says_goodbye() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, task):
            await router.send(Dispatch(rid="a", path="/generate"), WAIT)
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            await router.send(Dispatch(rid="b", path="/generate"), b'{"rid": "b", "text": "hold"}')
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 2)
            task.cancel()
            await router.receive(Goodbye)
            await asyncio.wait([task])
            assert engine.aborted == ["a", "b"]
            await asyncio.sleep(0)  # the turn in which the cancellation arrives
            assert engine.cancelled == 1, "what the engine does not let go of is cancelled with the link"

    asyncio.run(scenario())
