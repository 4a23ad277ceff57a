"""The HTTP side: requests to be dispatched take a short way, everything else is an ordinary Starlette application.

The short way is a raw ASGI callable without middleware, routing or request objects: it reads the body under its limit,
parses it once, and hands it to the dispatcher.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Sequence
from typing import Final

from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from flowprefill_sglang.errors import BadInput, FlowPrefillError
from flowprefill_sglang.router.answers import Refusal, send_error
from flowprefill_sglang.router.control import control_app
from flowprefill_sglang.router.dispatcher import Dispatcher

DISPATCHED: Final = frozenset({"/generate", "/v1/completions", "/v1/chat/completions"})
OPEN: Final = frozenset({"/health", "/liveness", "/readiness", "/metrics"})
"""Answered without a key: probes and scrapers have none, and SGLang's own server leaves these paths open too."""


class RouterApp:
    """The router's ASGI application; makes no lifespan of its own, its owner opens and closes the dispatcher."""

    def __init__(self, dispatcher: Dispatcher, more: Sequence[Route] = ()) -> None:
        """``more``: further routes that are not dispatched."""
        self._dispatcher = dispatcher
        self._max_body_bytes = dispatcher.config.max_body_bytes
        key = dispatcher.config.api_key
        self._expected = f"Bearer {key}".encode() if key else None
        self._control: ASGIApp = control_app(dispatcher, more)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a websocket: uvicorn refuses it when the application ends without an answer
            return
        path = scope["path"]
        try:
            if self._expected is not None and path not in OPEN:
                self._check_key(scope)
            if path not in DISPATCHED:
                await self._control(scope, receive, send)
                return
            if scope["method"] not in ("POST", "PUT"):
                raise Refusal(
                    f"{path} takes POST", status=405, code="method_not_allowed", headers=[(b"allow", b"POST")]
                )
            body = await self._read_body(scope, receive)
            if body is None:
                self._dispatcher.left()
                return
            received_at = time.monotonic()
            await self._dispatcher.serve(path, body, scope["headers"], receive, send, received_at=received_at)
        except FlowPrefillError as error:
            if path in DISPATCHED:
                self._dispatcher.refused(error)
            await send_error(send, error)

    def _check_key(self, scope: Scope) -> None:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if self._expected is None or not hmac.compare_digest(given, self._expected):
            message = "an API key is required: Authorization: Bearer KEY" if not given else "the API key is wrong"
            headers = [(b"www-authenticate", b"Bearer")]
            raise Refusal(message, status=401, code="invalid_api_key", headers=headers)

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None when the client left. Raises BadInput (413) as soon as it is known to be too long."""
        for name, value in scope["headers"]:
            if name == b"content-length" and int(value) > self._max_body_bytes:  # the server has checked that it is one
                raise self._too_long()
        message = await receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            body: bytes = message["body"]
            if len(body) > self._max_body_bytes:
                raise self._too_long()
            return body
        chunks, length = [], 0
        while message["type"] == "http.request":
            chunks.append(message["body"])
            length += len(message["body"])
            if length > self._max_body_bytes:
                raise self._too_long()
            if not message.get("more_body"):
                return b"".join(chunks)
            message = await receive()
        return None

    def _too_long(self) -> BadInput:
        message = f"the body is longer than {self._max_body_bytes} bytes (--max-body-bytes)"
        return BadInput(message, status=413, code="body_too_large")
