"""The link against a real ZeroMQ ROUTER socket: requests in, answers out."""

import asyncio

import pytest

from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.prefill_worker.config import WorkerConfig
from flowprefill_sglang.prefill_worker.link import Link, names
from flowprefill_sglang.wire.framing import encode
from flowprefill_sglang.wire.messages import Abort, Answer, Dispatch
from flowprefill_testing.link_ends import PlainEngine, Router, linked


def test_dispatch_is_answered_with_what_the_engine_said() -> None:
    async def scenario() -> None:
        async with linked() as (router, _, _):
            await router.send(Dispatch(rid="a", path="/generate"), b"hi")
            answer, (body,) = await router.receive(Answer)
            assert (answer.rid, answer.status, answer.content_type) == ("a", 200, "text/plain")
            assert body == b"/generate hi"

    asyncio.run(scenario())


def test_a_requests_age_is_counted_back_from_its_receipt() -> None:
    async def scenario() -> None:
        async with linked(clock=lambda: 1000.0) as (router, engine, _):
            await router.send(Dispatch(rid="a", path="/generate", age_s=0.25), b"hi")
            await router.receive(Answer)
            await router.send(Dispatch(rid="b", path="/generate", age_s=-5.0), b"hi")
            await router.receive(Answer)
            assert engine.received_at == {"a": 999.75, "b": 1000.0}, "nobody can have received it in the future"

    asyncio.run(scenario())


def test_many_requests_at_once_are_each_answered_once() -> None:
    async def scenario() -> None:
        async with linked() as (router, _, _):
            for number in range(200):
                await router.send(Dispatch(rid=str(number), path="/generate"), str(number).encode())
            answers = dict([await _rid_and_body(router) for _ in range(200)])
            assert answers == {str(n): f"/generate {n}".encode() for n in range(200)}

    async def _rid_and_body(router: Router) -> tuple[str, bytes]:
        answer, (body,) = await router.receive(Answer)
        return answer.rid, body

    asyncio.run(scenario())


def test_a_path_outside_the_list_never_reaches_the_engine() -> None:
    async def scenario() -> None:
        async with linked() as (router, _, _):
            await router.send(Dispatch(rid="a", path="/update_weights_from_disk"), b"{}")
            answer, _ = await router.receive(Answer)
            assert answer.status == 404

    asyncio.run(scenario())


def test_an_engine_that_raises_fails_only_that_request() -> None:
    async def scenario() -> None:
        async with linked() as (router, _, _):
            await router.send(Dispatch(rid="a", path="/generate"), b"crash")
            answer, (body,) = await router.receive(Answer)
            assert answer.status == 500
            assert b"the engine broke" in bytes(body)
            await router.send(Dispatch(rid="b", path="/generate"), b"hi")
            assert (await router.receive(Answer))[0].status == 200

    asyncio.run(scenario())


def test_nonsense_from_the_router_is_dropped() -> None:
    async def scenario() -> None:
        async with linked() as (router, _, task):
            for frames in ([b"\xff\xff"], [b""], [b"x" * 100_000], [*encode(Abort(rid="a")), b"extra"]):
                await router.socket.send_multipart([router.peer, *frames])
            await router.send(Dispatch(rid="a", path="/generate"), b"hi")
            assert (await router.receive(Answer))[0].status == 200
            assert not task.done()

    asyncio.run(scenario())


def test_an_engine_that_cannot_say_what_it_is_ends_the_link() -> None:
    class Mute(PlainEngine):
        async def hello(self, config):
            raise PeerFault("SGLang answered 500 to GET /server_info")

    async def scenario() -> None:
        with pytest.raises(PeerFault, match="server_info"):
            await Link(WorkerConfig(router="tcp://127.0.0.1:1", name="w"), Mute()).run()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"text": "x", "rid": "a"}', ["a"]),
        (b'{"rid": ["a", "b"]}', ["a", "b"]),
        (b'{"text": "x"}', []),
        (b'{"rid": null}', []),
        (b"[1]", []),
        (b"\xff", []),
        (b"", []),
    ],
)
def test_names_of_a_body(body: bytes, expected: list[str]) -> None:
    assert names(body) == expected
