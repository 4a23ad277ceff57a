"""Aborts on their way from the router into the engine, and answers that nobody waits for any more."""

import asyncio

from flowprefill_sglang.wire.messages import Abort, Answer, Dispatch, Heartbeat, Hello, HelloAgain
from flowprefill_testing.link_ends import WAIT, WELCOME, linked


def test_abort_reaches_the_engine_and_is_answered_499() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, _):
            await router.send(Dispatch(rid="a", path="/generate"), WAIT)
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            await router.send(Abort(rid="a"))
            answer, _ = await router.receive(Answer)
            assert (answer.rid, answer.status) == ("a", 499)
            assert engine.aborted[0] == "a"

    asyncio.run(scenario())


def test_a_batch_of_a_clients_own_names_is_aborted_by_these_names_only() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, _):
            body = b'{"rid": ["mine", "yours"], "text": ["wait", "wait"]}'
            await router.send(Dispatch(rid="a", path="/generate"), body)
            await router.send(Dispatch(rid="ab", path="/generate"), b'{"rid": "ab", "text": "wait"}')
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 2)
            await router.send(Abort(rid="a"))
            answer, _ = await router.receive(Answer)
            assert (answer.rid, answer.status) == ("a", 499)
            assert set(engine.aborted) == {"mine", "yours"}

    asyncio.run(scenario())


def test_an_abort_is_said_again_until_the_engine_has_let_go() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, _):
            await router.send(Dispatch(rid="a", path="/generate"), b'{"rid": "a", "text": "hold"}')
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            await router.send(Abort(rid="a"))
            await router.receive(Heartbeat, lambda beat: len(engine.aborted) > 1)
            engine.released.set()
            assert (await router.receive(Answer))[0].status == 499

    asyncio.run(scenario())


def test_a_dropped_request_does_not_answer_for_a_new_one_of_its_name() -> None:
    """The router restarted while the engine still held the first ``a``, and a client asks for another one."""

    async def scenario() -> None:
        async with linked() as (router, engine, _):
            await router.send(Dispatch(rid="a", path="/generate"), b'{"rid": "a", "text": "hold, the former"}')
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            await router.send(HelloAgain())
            await router.receive(Hello)
            await router.send(WELCOME)
            await router.receive(Heartbeat)
            await router.send(Dispatch(rid="a", path="/generate"), b'{"rid": "a", "text": "hold, the latter"}')
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            engine.released.set()
            answer, (body,) = await router.receive(Answer)
            assert (answer.rid, answer.status) == ("a", 200)
            assert b"the latter" in bytes(body)
            beat, _ = await router.receive(Heartbeat)
            assert beat.load.in_flight == 0

    asyncio.run(scenario())
