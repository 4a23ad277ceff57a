"""The first event of an answer's stream, which may be an error.

SGLang 0.5.23 begins a streamed answer with status 200 before it looks at the request, and reports what is wrong with it
as the stream's only event: as an ``error``, or, where a request fails later, such as in its handoff, as an answer
without text whose ``finish_reason`` is an abort with a status. The router waits for that event before it answers, so
that a client gets the status that the same request without a stream gets, and a failed handoff is tried again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

EVENT_STREAM: Final = b"text/event-stream"
EVENT_ENDS: Final = b"\n\n"


@dataclass(frozen=True, slots=True)
class StreamError:
    """What a stream that begins with an error says."""

    status: int
    document: bytes
    """JSON: ``{"error": …}``."""


def first_document(answer: bytes) -> bytes:
    """The JSON document of an answer; of a stream, the one of its first event."""
    if not answer.startswith(b"data:"):
        return answer
    return answer[5 : end if (end := answer.find(EVENT_ENDS)) >= 0 else len(answer)]


def stream_error(answer: bytes) -> StreamError | None:
    """The error that a stream begins with; None when it begins with anything else."""
    document = first_document(answer).strip()
    if document.startswith(b'{"error"'):
        try:
            status = int(msgspec.json.decode(document)["error"].get("code") or 400)
        except (msgspec.DecodeError, TypeError, ValueError, AttributeError):
            status = 400
        return StreamError(status if 400 <= status < 600 else 400, document)
    return _abort(document) if b'"abort"' in document else None


class _Reason(msgspec.Struct):
    type: str
    message: str = ""
    status_code: int | None = None


class _Facts(msgspec.Struct):
    finish_reason: _Reason


class _Event(msgspec.Struct):
    meta_info: _Facts
    index: int | None = None
    """Of a prompt in a batch, whose other prompts may go on."""


_event: Final = msgspec.json.Decoder(_Event)


def _abort(document: bytes) -> StreamError | None:
    try:
        event = _event.decode(document)
    except msgspec.DecodeError:  # another event, with that word in its text, or the beginning of one
        return None
    reason, status = event.meta_info.finish_reason, event.meta_info.finish_reason.status_code
    if reason.type != "abort" or event.index is not None or status is None or not 400 <= status < 600:
        return None
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": reason.message, "type": kind, "code": status}
    return StreamError(status, msgspec.json.encode({"error": error}))
