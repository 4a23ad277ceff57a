"""Answers of the router's own, as ASGI messages: errors in OpenAI's shape, small JSON documents."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec
from starlette.types import Send

from flowprefill_sglang.errors import FlowPrefillError

JSON: Final = (b"content-type", b"application/json")
HeaderPairs = Sequence[tuple[bytes, bytes]]

_DETAIL_BYTES: Final = 500
_TYPES: Final = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}


class Refusal(FlowPrefillError):
    """An error with headers of its own, such as ``Retry-After``."""

    def __init__(self, message: str, *, status: int, code: str, headers: HeaderPairs = ()) -> None:
        super().__init__(message, status=status, code=code)
        self.headers = headers


def dropped(message: str, *, status: int, reason: str, retry_after_s: int | None = None) -> Refusal:
    """A request that was shed; ``reason`` is ``saturated``, ``expired`` or ``no-endpoints``."""
    headers = [(b"x-flowprefill-dropped-reason", reason.encode())]
    if retry_after_s is not None:
        headers.append((b"retry-after", str(retry_after_s).encode()))
    return Refusal(message, status=status, code=reason.replace("-", "_"), headers=headers)


def error_document(error: FlowPrefillError) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}``, as OpenAI's and SGLang's clients read it."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}


def error_event(error: FlowPrefillError) -> bytes:
    """The end of an event stream that failed after it had begun."""
    return b"data: " + msgspec.json.encode(error_document(error)) + b"\n\ndata: [DONE]\n\n"


async def send_error(send: Send, error: FlowPrefillError) -> None:
    """Answer with an error."""
    extra = error.headers if isinstance(error, Refusal) else ()
    await send_whole(send, error.status, [JSON, *extra], msgspec.json.encode(error_document(error)))


async def send_json(send: Send, document: Any, status: int = HTTPStatus.OK) -> None:
    """Answer with a JSON document."""
    await send_whole(send, status, [JSON], msgspec.json.encode(document))


async def send_whole(send: Send, status: int, headers: HeaderPairs, body: bytes) -> None:
    """Answer with a complete body."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


def said(body: bytes) -> str:
    """What a worker said, for the client's error message."""
    text = body[:_DETAIL_BYTES].decode("utf-8", "replace").strip()
    return f": {text}" if text else ""
