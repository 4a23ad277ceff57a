"""The link against a real ZeroMQ ROUTER socket and an engine made of plain Python."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import zmq
import zmq.asyncio

from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.prefill_worker.config import WorkerConfig
from flowprefill_sglang.prefill_worker.link import Link
from flowprefill_sglang.wire.framing import decode_from_worker, encode
from flowprefill_sglang.wire.messages import (
    PROTOCOL_VERSION,
    Abort,
    Answer,
    Dispatch,
    Drain,
    Goodbye,
    Heartbeat,
    Hello,
    HelloAgain,
    Limits,
    Refused,
    Welcome,
)

WELCOME = Welcome(protocol=PROTOCOL_VERSION, router="test", heartbeat_interval_s=0.05, dead_after_s=30.0)


class PlainEngine:
    """Echoes bodies; a body ``wait`` is answered once aborted or disconnected, ``crash`` raises."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.stopped = asyncio.Event()
        self.stopping = False

    async def request(self, path, headers, body, disconnected):
        if bytes(body) == b"wait":
            await disconnected.wait()
            return 400, "application/json", b"aborted inside"
        if bytes(body) == b"crash":
            raise ValueError("the engine broke")
        return 200, "text/plain", path.encode() + b" " + bytes(body)

    def abort(self, rid):
        self.aborted.append(rid)

    def is_stopping(self):
        return self.stopping

    def stop(self):
        self.stopped.set()

    async def hello(self, config):
        limits = Limits(max_context_tokens=1, max_kv_tokens=1, page_tokens=1, max_running_requests=1)
        return Hello(
            protocol=PROTOCOL_VERSION,
            name=config.name,
            incarnation="i",
            version="1",
            model="m",
            http_url="http://h:1",
            bootstrap_host="h",
            bootstrap_port=2,
            transfer_backend="zmq",
            limits=limits,
        )


class Router:
    """The router's end of the wire, driven by the test."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.peer = b""

    async def receive(self, kind: type, also: Callable = lambda message: True):
        """The next message of ``kind``; others (heartbeats, progress) are passed over."""
        while True:
            self.peer, *frames = await asyncio.wait_for(self.socket.recv_multipart(), 10)
            message, payload = decode_from_worker(frames)
            if isinstance(message, kind) and also(message):
                return message, payload

    async def send(self, message, *payload) -> None:
        await self.socket.send_multipart([self.peer, *encode(message, *payload)])


@asynccontextmanager
async def linked(*, join: bool = True) -> AsyncIterator[tuple[Router, PlainEngine, asyncio.Task]]:
    context = zmq.asyncio.Context()
    router, engine = Router(context), PlainEngine()
    config = WorkerConfig(router=f"tcp://127.0.0.1:{router.port}", name="w0", hello_retry_s=0.05)
    task = asyncio.create_task(Link(config, engine).run())
    try:
        hello, _ = await router.receive(Hello)
        assert hello.name == "w0"
        if join:
            await router.send(WELCOME)
            await router.receive(Heartbeat)
        yield router, engine, task
    finally:
        task.cancel()
        await asyncio.wait([task])
        context.destroy(linger=0)


def test_dispatch_is_answered_with_what_the_engine_said() -> None:
    async def scenario() -> None:
        async with linked() as (router, _, _):
            await router.send(Dispatch(rid="a", path="/generate"), b"hi")
            answer, (body,) = await router.receive(Answer)
            assert (answer.rid, answer.status, answer.content_type) == ("a", 200, "text/plain")
            assert body == b"/generate hi"

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


def test_abort_reaches_the_engine_and_is_answered_499() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, _):
            await router.send(Dispatch(rid="a", path="/generate"), b"wait")
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            await router.send(Abort(rid="a"))
            answer, _ = await router.receive(Answer)
            assert (answer.rid, answer.status) == ("a", 499)
            assert engine.aborted[0] == "a"

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


def test_a_router_that_forgot_us_is_greeted_on_a_new_connection() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, _):
            await router.send(Dispatch(rid="a", path="/generate"), b"wait")
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            former = router.peer
            await router.send(HelloAgain())
            await router.receive(Hello)
            assert router.peer != former
            assert engine.aborted[0] == "a"
            await router.send(WELCOME)
            beat, _ = await router.receive(Heartbeat)
            assert beat.load.in_flight == 0

    asyncio.run(scenario())


def test_drained_worker_says_goodbye_and_stops() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, task):
            await router.send(Drain())
            await router.receive(Goodbye)
            await asyncio.wait_for(engine.stopped.wait(), 10)
            await asyncio.wait_for(task, 10)

    asyncio.run(scenario())


def test_a_worker_told_to_stop_drains_by_itself() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, _):
            engine.stopping = True
            goodbye, _ = await router.receive(Goodbye)
            assert goodbye.reason == "drained"

    asyncio.run(scenario())


def test_refused_worker_stops() -> None:
    async def scenario() -> None:
        async with linked(join=False) as (router, engine, task):
            await router.send(Refused(reason="no", protocol=99))
            await asyncio.wait_for(engine.stopped.wait(), 10)
            with pytest.raises(PeerFault, match="refused this worker: no"):
                await asyncio.wait_for(task, 10)

    asyncio.run(scenario())


def test_cancelled_worker_says_goodbye() -> None:
    async def scenario() -> None:
        async with linked() as (router, engine, task):
            await router.send(Dispatch(rid="a", path="/generate"), b"wait")
            await router.receive(Heartbeat, lambda beat: beat.load.in_flight == 1)
            task.cancel()
            await router.receive(Goodbye)
            assert engine.aborted == ["a"]

    asyncio.run(scenario())
