"""Stand-ins for the router's workers: real sockets on both sides, no model behind them.

A prefill stand-in speaks the real protocol over a DEALER socket; a decode stand-in is an HTTP server with the endpoints
that the router asks for. What they do with a request is a function that a test may replace.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import zmq
import zmq.asyncio
from aiohttp import web

from flowprefill_sglang.router.config import RouterConfig
from flowprefill_sglang.router.server import Router, loop_factory
from flowprefill_sglang.wire.framing import decode_to_worker, encode
from flowprefill_sglang.wire.messages import (
    PROTOCOL_VERSION,
    Abort,
    Answer,
    Dispatch,
    Goodbye,
    Heartbeat,
    Hello,
    HelloAgain,
    Limits,
    Load,
    Refused,
    ToWorker,
    Welcome,
)

MODEL = "echo-model"
TEST_TIMEOUT_S = 30.0


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test in an event loop of its own, of the router's kind, with a time limit."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def limited() -> None:
            async with asyncio.timeout(TEST_TIMEOUT_S):
                await test(*args, **kwargs)

        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(limited())

    return run


async def until(condition: Callable[[], Any], *, timeout_s: float = 10.0) -> Any:
    """The condition's first true value. Fails the test after ``timeout_s``."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while not (value := condition()):
        assert loop.time() < deadline, "the condition did not become true"
        await asyncio.sleep(0.005)
    return value


def hello(name: str = "p0", **changes: Any) -> Hello:
    """A worker's introduction."""
    fields: dict[str, Any] = {
        "protocol": PROTOCOL_VERSION,
        "name": name,
        "incarnation": f"{name}-first",
        "version": "test",
        "model": MODEL,
        "http_url": "http://127.0.0.1:1",
        "bootstrap_host": "10.1.2.3",
        "bootstrap_port": 8998,
        "transfer_backend": "zmq",
        "limits": Limits(max_context_tokens=1000, max_kv_tokens=4000, page_tokens=16, max_running_requests=64),
    }
    return Hello(**(fields | changes))


def good_prefill_answer(body: dict[str, Any]) -> bytes:
    """What SGLang's prefill side answers to one prompt."""
    meta = {
        "id": body["rid"],
        "prompt_tokens": 7,
        "completion_tokens": 1,
        "finish_reason": {"type": "length", "length": 1},
    }
    return json.dumps({"text": "", "output_ids": [1], "meta_info": meta}).encode()


PrefillBehaviour = Callable[[Dispatch, dict[str, Any]], tuple[int, bytes] | None]


class PrefillStandIn:
    """One prefill worker. ``behave`` gives status and body of the answer, or None to say nothing."""

    def __init__(self, endpoint: str, behave: PrefillBehaviour | None = None, **hello_changes: Any) -> None:
        self.hello = hello(**hello_changes)
        self.behave = behave or (lambda dispatch, body: (200, good_prefill_answer(body)))
        self.received: list[ToWorker] = []
        self.bodies: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.answers_aborts = True
        self._endpoint = endpoint
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> PrefillStandIn:
        self._socket.connect(self._endpoint)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._listen()), loop.create_task(self._beat())]
        await self.say(self.hello)
        return self

    async def say(self, message: Any, *payload: bytes) -> None:
        await self._socket.send_multipart(encode(message, *payload))

    async def answer(self, rid: str, status: int, body: bytes, content_type: str = "application/json") -> None:
        await self.say(Answer(rid=rid, status=status, content_type=content_type), body)

    def heard(self, kind: type) -> list[Any]:
        return [message for message in self.received if isinstance(message, kind)]

    async def joined(self) -> PrefillStandIn:
        await until(lambda: self.heard(Welcome) or self.heard(Refused))
        return self

    async def die(self) -> None:
        """Stop without a word."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    async def leave(self) -> None:
        await self.say(Goodbye(reason="the test is over"))
        await self.die()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            await self.say(Heartbeat(load=Load(in_flight=1)))

    async def _listen(self) -> None:
        while True:
            message, payload = decode_to_worker(await self._socket.recv_multipart())
            self.received.append(message)
            match message:
                case HelloAgain():
                    await self.say(self.hello)
                case Dispatch():
                    self.bodies.append(json.loads(bytes(payload[0])))
                    if (result := self.behave(message, self.bodies[-1])) is not None:
                        await self.answer(message.rid, *result)
                case Abort():
                    self.aborted.append(message.rid)
                    if self.answers_aborts:
                        await self.answer(message.rid, 499, b'{"error": {"message": "aborted"}}')


DecodeBehaviour = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


async def echo(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """Answer with the request's own body; as a stream, with one event for each letter of its text."""
    if not body.get("stream"):
        return web.json_response({"text": "echo", "body": body, "meta_info": {"id": body["rid"], "prompt_tokens": 7}})
    response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    for letter in body.get("text") or body.get("prompt") or "xyz":
        await response.write(b"data: " + json.dumps({"text": letter}).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


class DecodeStandIn:
    """One decode instance. ``behave`` answers a request."""

    def __init__(self, behave: DecodeBehaviour = echo, *, model: str = MODEL, mode: str = "decode") -> None:
        self.behave = behave
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.aborted: list[str] = []
        self.cut: list[Any] = []
        """The rids of requests whose connection was closed before they were answered."""
        self.asked: list[str] = []
        self.hangs = False
        """Whether its scheduler does, so that its health checks are not answered."""
        self.url = ""
        self._model = model
        self._mode = mode
        self._runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> DecodeStandIn:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def die(self) -> None:
        """Close every connection, and the port."""
        assert self._runner is not None
        server = self._runner.server
        if server is not None:
            for handler in list(server.connections):
                handler.force_close()
                if handler.transport is not None:
                    handler.transport.abort()
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        match request.path:
            case "/health" | "/health_generate":
                return await never(request, {}) if self.hangs else web.Response()
            case "/model_info":
                return web.json_response({"model_path": "/echo", "disaggregation_mode": self._mode})
            case "/server_info":
                return web.json_response({"disaggregation_transfer_backend": "zmq", "version": "stand-in"})
            case "/v1/models":
                card = {
                    "id": self._model,
                    "object": "model",
                    "root": self._model,
                    "parent": None,
                    "max_model_len": 1000,
                }
                return web.json_response({"object": "list", "data": [card]})
            case "/abort_request":
                self.aborted.append((await request.json())["rid"])
                return web.Response()
            case "/flush_cache":
                return web.Response(text="Cache flushed.")
        body = await request.json()
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        try:
            return await self.behave(request, body)
        except (asyncio.CancelledError, ConnectionResetError):
            self.cut.append(body.get("rid"))
            raise


async def never(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """Say nothing, for ever."""
    await asyncio.Event().wait()
    raise AssertionError


@dataclass
class TestBench:
    """A router with its stand-ins and a client."""

    __test__ = False  # not a test class, whatever its name

    router: Router
    client: aiohttp.ClientSession
    prefills: list[PrefillStandIn] = field(default_factory=list)
    decodes: list[DecodeStandIn] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.router.url

    @property
    def prefill(self) -> PrefillStandIn:
        return self.prefills[0]

    @property
    def decode(self) -> DecodeStandIn:
        return self.decodes[0]

    async def generate(self, **body: Any) -> tuple[int, Any]:
        async with self.client.post(f"{self.url}/generate", json={"text": "abc", **body}) as answer:
            return answer.status, await answer.json()

    def outcomes(self) -> dict[str, int]:
        assert self.router.dispatcher is not None
        return {str(outcome): count for outcome, count in self.router.dispatcher.metrics.outcomes.items()}

    def is_idle_at_router(self) -> bool:
        """No request is running or queued, whatever workers may still hold."""
        core = self.router.dispatcher
        assert core is not None
        return not core.running and core.admission.inside == core.admission.waiting == 0

    def is_idle(self) -> bool:
        """Nothing is running, queued or owed by a worker."""
        core = self.router.dispatcher
        assert core is not None
        return (
            self.is_idle_at_router()
            and not any(worker.assigned or worker.outstanding_tokens for worker in core.links.registry.workers.values())
            and not any(one.in_flight or one.outstanding_tokens for one in core.decodes.registry.instances.values())
            and not core.links.waiting_answers
        )


@asynccontextmanager
async def bench(
    *,
    prefills: int = 1,
    decodes: int = 1,
    prefill: PrefillBehaviour | None = None,
    decode: DecodeBehaviour = echo,
    check_idle: bool = True,
    **config: Any,
) -> AsyncIterator[TestBench]:
    """A running router with stand-ins that are ready. At the end nothing may be left over."""
    instances = [await DecodeStandIn(decode).start() for _ in range(decodes)]
    settings: dict[str, Any] = {
        "port": 0,
        "worker_bind": "tcp://127.0.0.1:*",
        "decode": tuple(one.url for one in instances),
        "heartbeat_interval_secs": 0.1,
        "heartbeat_dead_secs": 0.5,
        "health_check_interval_secs": 0.2,
        "shutdown_drain_secs": 0.0,
    }
    router = Router(RouterConfig(**(settings | config)))
    await router.start()
    headers = {"authorization": f"Bearer {config['api_key']}"} if "api_key" in config else {}
    async with aiohttp.ClientSession(headers=headers) as client:
        one = TestBench(router, client, decodes=instances)
        try:
            for index in range(prefills):
                worker = await PrefillStandIn(router.worker_endpoint, prefill, name=f"p{index}").start()
                one.prefills.append(await worker.joined())
            core = router.dispatcher
            assert core is not None
            await until(lambda: len(core.decodes.registry.ready()) == decodes)
            yield one
            if check_idle:
                await until(one.is_idle)
        finally:
            for worker in one.prefills:
                await worker.die()
            await router.stop()
            for instance in instances:
                await instance.die()
