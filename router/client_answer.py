"""The answer that one client gets: a whole one, a stream, or an error in whatever form is still possible."""

from __future__ import annotations

from typing import Final

from starlette.types import Send

from flowprefill_sglang.errors import FlowPrefillError
from flowprefill_sglang.router.answers import HeaderPairs, error_event, send_error, send_whole

_PASSED_ON: Final = frozenset({b"content-type", b"cache-control", b"retry-after", b"x-request-id"})


def passed_on(headers: HeaderPairs) -> HeaderPairs:
    """Those of a worker's headers that the client gets."""
    return [pair for pair in headers if pair[0] in _PASSED_ON]


class ClientAnswer:
    """One client's answer over ASGI. Every method waits while the client is slow to take what was sent."""

    def __init__(self, send: Send) -> None:
        self.status = 0
        """HTTP status of the answer, 0 as long as there is none."""
        self._send = send
        self._tail = b""

    @property
    def has_begun(self) -> bool:
        return self.status != 0

    async def whole(self, status: int, headers: HeaderPairs, body: bytes) -> None:
        """The complete answer."""
        self.status = status
        await send_whole(self._send, status, headers, body)

    async def stream(self, status: int, headers: HeaderPairs, data: bytes, *, is_last: bool = False) -> None:
        """The next piece of a stream; status and headers count with the first."""
        if not self.has_begun:
            self.status = status
            await self._send({"type": "http.response.start", "status": status, "headers": headers})
        if data or is_last:
            self._tail = (self._tail + data)[-2:]
            await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def end_stream(self, status: int, headers: HeaderPairs, data: bytes) -> None:
        """The last piece of a stream."""
        await self.stream(status, headers, data, is_last=True)

    async def fail(self, error: FlowPrefillError) -> None:
        """An error: as the answer, or as the last event of a stream."""
        if not self.has_begun:
            self.status = error.status
            await send_error(self._send, error)
            return
        gap = b"" if self._tail in (b"", b"\n\n") else b"\n\n"  # ends an event that was cut short
        await self._send({"type": "http.response.body", "body": gap + error_event(error)})
