"""The first event of an answer's stream, which may be an error.

SGLang 0.5.23 begins a streamed answer with status 200 before it looks at the request, and reports what is wrong with it
as the stream's only event. The router waits for that event before it answers, so that a client gets the status that
the same request without a stream gets.
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
    if not document.startswith(b'{"error"'):
        return None
    try:
        status = int(msgspec.json.decode(document)["error"].get("code") or 400)
    except (msgspec.DecodeError, TypeError, ValueError, AttributeError):
        status = 400
    return StreamError(status if 400 <= status < 600 else 400, document)
