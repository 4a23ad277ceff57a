"""Server-sent events, as far as token streams need them; sans-IO: bytes in, ``data`` payloads out."""

from __future__ import annotations


class SseDecoder:
    """Collects the ``data`` of events from chunks of any size. Comments and other fields are ignored."""

    def __init__(self, max_event_bytes: int = 16 * 2**20) -> None:
        self._max_event_bytes = max_event_bytes
        self._unfinished_line = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of the events that this chunk completes, in order. Raises ValueError for an oversized event."""
        events = []
        lines = (self._unfinished_line + chunk).split(b"\n")
        self._unfinished_line = lines.pop()
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        if len(self._unfinished_line) + sum(map(len, self._data)) > self._max_event_bytes:
            raise ValueError(f"an event of the stream is larger than {self._max_event_bytes} bytes")
        return events
