"""Every error that FlowPrefill raises on purpose, in one tree.

::

    FlowPrefillError
    ├── InternalError    our bug                    500
    ├── PeerFault        a peer broke or misbehaved 502
    ├── OutOfCapacity    nobody can take it now     503 (429 when a queue is full)
    ├── TooLate          a time limit has passed    504 (408 when the limit was the client's)
    ├── BadInput         the caller must change it  400 (404, 413, 422 where HTTP has a better word)
    └── StartupError     this process cannot run here; its message says what to do; never sent to a client

``status`` is the HTTP status that a router answers with, ``code`` a stable word for programs (the ``code`` of OpenAI's
error body).
"""

from __future__ import annotations


class FlowPrefillError(Exception):
    """Base of the tree. ``str(error)`` is one sentence that a person can act on."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        if status is not None:
            self.status = status
        if code is not None:
            self.code = code


class InternalError(FlowPrefillError):
    """Our bug: a state that should not exist."""


class PeerFault(FlowPrefillError):
    """A worker, a decode instance or a router died, broke the protocol or answered nonsense."""

    status = 502
    code = "peer_fault"


class OutOfCapacity(FlowPrefillError):
    """No worker, queue place or memory is left for this request."""

    status = 503
    code = "no_capacity"


class TooLate(FlowPrefillError):
    """A deadline or a timeout has passed."""

    status = 504
    code = "expired"


class BadInput(FlowPrefillError):
    """The request itself is wrong; sending it again unchanged cannot help."""

    status = 400
    code = "invalid_request"


class StartupError(FlowPrefillError):
    """This process cannot start as configured."""

    code = "cannot_start"
