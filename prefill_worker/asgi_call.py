"""Calling an ASGI application in the same process: no socket, no second HTTP parser, the same handlers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from flowprefill_sglang.wire.framing import Buffer

AsgiMessage = MutableMapping[str, Any]  # the ASGI specification's own open type
AsgiApp = Callable[
    [AsgiMessage, Callable[[], Awaitable[AsgiMessage]], Callable[[AsgiMessage], Awaitable[None]]], Awaitable[None]
]


async def call(
    app: AsgiApp,
    method: str,
    path: str,
    headers: Iterable[tuple[str, str]],
    body: Buffer,
    disconnected: asyncio.Event,
) -> tuple[int, str, bytes]:
    """One HTTP request to ``app``: ``(status, content type, body)``, a streamed body joined.

    Setting ``disconnected`` is what a closed connection is to the application. ``headers`` are names in lower case and
    values; ``content-type`` and ``content-length`` are set here. Raises whatever the application raises.
    """
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            *((name.encode("latin-1"), value.encode("latin-1")) for name, value in headers),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ],
        "client": ("flowprefill-router", 0),
        "server": None,
        "state": {},
    }
    body_was_read = False
    status, content_type = 500, "application/json"
    parts: list[bytes] = []
    complete = asyncio.Event()

    async def receive() -> AsgiMessage:
        nonlocal body_was_read
        if not body_was_read:
            body_was_read = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(message: AsgiMessage) -> None:
        nonlocal status, content_type
        if message["type"] == "http.response.start":
            status = message["status"]
            for name, value in message.get("headers", ()):
                if name.lower() == b"content-type":
                    content_type = value.decode("latin-1")
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                complete.set()

    await _until_answered(asyncio.ensure_future(app(scope, receive, send)), complete)
    return status, content_type, b"".join(parts)


_lingering: set[asyncio.Future[None]] = set()
"""Calls whose answer is complete, held until their background tasks are done."""


async def _until_answered(running: asyncio.Future[None], complete: asyncio.Event) -> None:
    """Wait for the answer, not for what the application does after it: SGLang sleeps for two seconds behind every
    stream (``tokenizer_manager.py: create_abort_task``, 0.5.23)."""
    answered = asyncio.ensure_future(complete.wait())
    try:
        await asyncio.wait((running, answered), return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        running.cancel()
        raise
    finally:
        answered.cancel()
    if running.done():
        running.result()
        return
    _lingering.add(running)
    running.add_done_callback(_lingering.discard)
