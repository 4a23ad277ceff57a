"""Both ends of a worker's link: a router driven by the test, and an engine made of plain Python."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import zmq
import zmq.asyncio

from flowprefill_sglang.prefill_worker.config import WorkerConfig
from flowprefill_sglang.prefill_worker.event_feed import EventFeed
from flowprefill_sglang.prefill_worker.link import Link
from flowprefill_sglang.prefill_worker.signs_of_life import Part
from flowprefill_sglang.wire.framing import decode_from_worker, encode
from flowprefill_sglang.wire.messages import PROTOCOL_VERSION, Drain, Heartbeat, Hello, Limits, Welcome

WAIT = b'{"rid": "a", "text": "wait"}'
HELLO = Hello(
    protocol=PROTOCOL_VERSION,
    name="w0",
    incarnation="i",
    version="1",
    model="m",
    http_url="http://h:1",
    bootstrap_host="h",
    bootstrap_port=2,
    transfer_backend="zmq",
    limits=Limits(max_context_tokens=1, max_kv_tokens=1, page_tokens=1, max_running_requests=1),
)
BEAT_S = 0.05
WELCOME = Welcome(protocol=PROTOCOL_VERSION, router="test", heartbeat_interval_s=BEAT_S, dead_after_s=30.0)


class PlainEngine:
    """Echoes bodies; one with ``wait`` is answered once disconnected, with ``hold`` once released; ``crash`` raises."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.released = asyncio.Event()
        self.cancelled = 0
        self.stopping = False
        self.received_at: dict[str, float] = {}
        self.blocks_s = 0.0
        """For how long each request keeps the event loop from anything else."""
        self.questions = dict.fromkeys(Part, 0)
        self.hung: Part | None = None
        self.controlled = False

    async def request(self, dispatch, received_at, body, disconnected):
        self.received_at[dispatch.rid] = received_at
        time.sleep(self.blocks_s)  # noqa: ASYNC251 - that is what it is for
        if b"hold" in bytes(body):
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if b"wait" in bytes(body):
            await disconnected.wait()
            return 400, "application/json", b"aborted inside"
        if bytes(body) == b"crash":
            raise ValueError("the engine broke")
        return 200, "text/plain", dispatch.path.encode() + b" " + bytes(body)

    def abort(self, rids):
        self.aborted += rids

    def is_stopping(self):
        return self.stopping

    async def sign_of_life(self, part):
        self.questions[part] += 1
        if self.hung is part:
            await asyncio.Event().wait()

    def is_under_control(self):
        return self.controlled

    async def hello(self, config):
        return msgspec.structs.replace(HELLO, name=config.name)


class Router:
    """The router's end of the wire, driven by the test."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.peer = b""

    async def receive(self, kind: type, also: Callable = lambda message: True):
        """The next message of ``kind``; others (heartbeats, progress) are passed over."""
        async with asyncio.timeout(10):
            while True:
                self.peer, *frames = await self.socket.recv_multipart()
                message, payload = decode_from_worker(frames)
                if isinstance(message, kind) and also(message):
                    return message, payload

    async def until_gone(self, peer: bytes) -> None:
        """Wait until the connection of a former greeting is closed."""
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        async with asyncio.timeout(10):
            while await self._reaches(peer):  # noqa: ASYNC110 - a closed connection raises no event here
                await asyncio.sleep(0.01)

    async def _reaches(self, peer: bytes) -> bool:
        try:
            await self.socket.send_multipart([peer, *encode(Drain())])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    async def send(self, message, *payload) -> None:
        await self.socket.send_multipart([self.peer, *encode(message, *payload)])


@asynccontextmanager
async def linked(
    *, join: bool = True, feed: EventFeed | None = None, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[tuple[Router, PlainEngine, asyncio.Task]]:
    context = zmq.asyncio.Context()
    router, engine = Router(context), PlainEngine()
    config = WorkerConfig(router=f"tcp://127.0.0.1:{router.port}", name="w0", hello_retry_s=0.05, refused_retry_s=0.05)
    task = asyncio.create_task(Link(config, engine, feed, clock).run())
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
