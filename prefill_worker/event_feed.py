"""The HTTP process's side of the scheduler's events: a memory of the last ones, and whoever wants the new ones.

Owned by the server's event loop; woken by the scheduler's messages. ``reporter`` is the other end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import zmq

from flowprefill_sglang.observe.events import Event
from flowprefill_sglang.observe.recording import Recording
from flowprefill_sglang.prefill_worker.reporter import Batch
from flowprefill_sglang.wire.socket import EventSocket

logger = logging.getLogger(__name__)

CAPACITY_BYTES: Final = 32 * 1024 * 1024
"""Memory for old events, kept as they came: an event takes about 100 bytes, so this holds some 200,000 of them, minutes
of a busy worker."""
_OVERHEAD_BYTES: Final = 150
"""What a batch takes beside its bytes: the objects around them."""

Listener = Callable[[Batch], None]


@dataclass(frozen=True, slots=True)
class _Kept:
    newest_at: float
    encoded: bytes


class EventRing:
    """The latest batches, as many as fit in ``capacity_bytes``."""

    def __init__(self, capacity_bytes: int = CAPACITY_BYTES) -> None:
        self._capacity_bytes = capacity_bytes
        self._batches: deque[_Kept] = deque()
        self.held_bytes = 0

    def add(self, encoded: bytes, newest_at: float) -> None:
        """Keep one batch; the oldest make room for it."""
        self._batches.append(_Kept(newest_at, encoded))
        self.held_bytes += len(encoded) + _OVERHEAD_BYTES
        while self.held_bytes > self._capacity_bytes:
            self.held_bytes -= len(self._batches.popleft().encoded) + _OVERHEAD_BYTES

    def since(self, at: float) -> list[bytes]:
        """Batches with events at ``at`` or later, oldest first. Batches come in the order of time."""
        found: list[bytes] = []
        for batch in reversed(self._batches):
            if batch.newest_at < at:
                break
            found.append(batch.encoded)
        found.reverse()
        return found


class EventFeed:
    """Receives events from ``open`` until ``close``, both on the event loop."""

    def __init__(self, endpoint: str, ring: EventRing | None = None) -> None:
        self._endpoint = endpoint
        self._ring = ring or EventRing()
        self._decoder = msgspec.msgpack.Decoder(Batch)
        self._listeners: list[Listener] = []
        self._lost = 0
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None

    def open(self) -> None:
        """Listen. Raises zmq.ZMQError when the address cannot be bound."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = context.socket(zmq.PULL)
        socket.setsockopt(zmq.LINGER, 0)
        try:
            socket.bind(self._endpoint)
        except zmq.ZMQError:
            context.destroy(linger=0)
            raise
        self._context = context
        self._socket = EventSocket(socket, self._received)

    def close(self) -> None:
        """Listen no more. May be called twice."""
        if self._context is not None:
            self._socket.close()
            self._context.destroy(linger=0)
            self._context = None

    def listen(self, listener: Listener) -> None:
        """Call ``listener`` with each batch, on the event loop."""
        self._listeners.append(listener)

    async def recording(self, worker: str, *, seconds: float, monotonic_now: float, unix_now: float) -> Recording:
        """The events of the last ``seconds``, decoded in a thread: there may be hundreds of thousands."""
        batches = self._ring.since(monotonic_now - seconds)
        events = await asyncio.to_thread(self._decoded, batches, monotonic_now - seconds)
        return Recording(worker=worker, monotonic_now=monotonic_now, unix_now=unix_now, events=events, lost=self._lost)

    def _received(self, frames: list[bytes]) -> None:
        try:
            batch = self._decoder.decode(frames[0])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            logger.warning("dropped events of the scheduler process: %s", error)
            return
        self._lost = batch.lost
        if batch.events:
            self._ring.add(frames[0], max(event.at for event in batch.events))
        for listener in self._listeners:
            listener(batch)

    @staticmethod
    def _decoded(batches: Sequence[bytes], since: float) -> list[Event]:
        decoder = msgspec.msgpack.Decoder(Batch)  # one a thread
        return [event for batch in batches for event in decoder.decode(batch).events if event.at >= since]
