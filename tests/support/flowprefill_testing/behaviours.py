"""How a stand-in behaves in the router's tests, beyond answering at once."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from flowprefill_sglang.wire.messages import Dispatch

STREAM = "text/event-stream"


def silent(dispatch: Dispatch, body: dict[str, Any]) -> None:
    """A prefill side that never answers by itself."""


async def begin_stream(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """Two events, then nothing."""
    response = web.StreamResponse(headers={"content-type": STREAM})
    await response.prepare(request)
    await response.write(b'data: {"text": "a"}\n\ndata: {"te')
    await asyncio.Event().wait()
    raise AssertionError


async def whole_stream(request: web.Request, *parts: bytes) -> web.StreamResponse:
    """Its bytes in these parts, and the end."""
    response = web.StreamResponse(headers={"content-type": STREAM})
    await response.prepare(request)
    for part in parts:
        await response.write(part)
    await response.write_eof()
    return response


def say(text: str) -> Any:
    async def behave(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"text": text})

    return behave
