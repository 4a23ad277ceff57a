"""A server that answers ``/v1/models`` and streams ``/generate``, for tests of what sends load."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

MODELS = {"data": [{"id": "tiny", "max_model_len": 1_000}]}


class StreamingServer:
    """Answers ``/v1/models`` with ``models`` and ``/generate`` with tokens, or with ``error`` if there is one."""

    def __init__(self, models: Any = MODELS, error: str | None = None) -> None:
        self.models, self.error = models, error
        self.bodies: list[dict[str, Any]] = []
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
        tokens = body["sampling_params"]["max_new_tokens"]
        response = web.StreamResponse()
        await response.prepare(request)
        for count in (1, tokens):
            event = {"text": "x" * count, "meta_info": {"completion_tokens": count}}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.working -= 1
        await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def served(server: StreamingServer) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/v1/models", server.list_models)
    app.router.add_post("/generate", server.generate)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
