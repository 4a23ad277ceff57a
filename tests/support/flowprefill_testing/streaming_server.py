"""A server that answers ``/v1/models`` and streams ``/generate`` and chats, for tests of what sends load."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aiohttp import web

MODELS = {"data": [{"id": "tiny", "max_model_len": 1_000}]}


class StreamingServer:
    """Answers ``/v1/models`` with ``models`` and ``/generate`` with tokens, or with ``error`` if there is one.

    It takes ``seconds_per_token`` for each token of a prompt, one prompt at a time, like a prefill worker.
    """

    def __init__(self, models: Any = MODELS, error: str | None = None, seconds_per_token: float = 0.0) -> None:
        self.models, self.error, self.seconds_per_token = models, error, seconds_per_token
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.turn = asyncio.Lock()
        self.working = self.most_working = 0

    async def list_models(self, request: web.Request) -> web.Response:
        return web.Response(text=json.dumps(self.models), content_type="application/json")

    async def generate(self, request: web.Request) -> web.StreamResponse:
        if self.error is not None:
            return web.Response(status=502, text=self.error)
        self.working += 1
        self.most_working = max(self.working, self.most_working)
        body = await request.json()
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        if self.seconds_per_token:
            async with self.turn:
                await asyncio.sleep(self.seconds_per_token * len(body.get("text") or body["input_ids"]))
        tokens = body["sampling_params"]["max_new_tokens"]
        response = web.StreamResponse()
        await response.prepare(request)
        for count in (1, tokens):
            event = {"text": "x" * count, "meta_info": {"completion_tokens": count}}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.working -= 1
        await response.write(b"data: [DONE]\n\n")
        return response

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        response = web.StreamResponse()
        await response.prepare(request)
        usage = {"completion_tokens": body["max_tokens"]}
        for event in (
            {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
            {"choices": [{"delta": {"content": "x" * body["max_tokens"]}, "finish_reason": "length"}]},
            {"choices": [], "usage": usage},
        ):
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@contextmanager
def served_in_background(server: StreamingServer) -> Iterator[str]:
    """For tests of commands, which run an event loop of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    context = served(server)
    try:
        yield asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(10)
    finally:
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@asynccontextmanager
async def served(server: StreamingServer) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.chat)
    app.router.add_get("/v1/models", server.list_models)
    app.router.add_post("/generate", server.generate)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
