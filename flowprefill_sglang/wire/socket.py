"""A ZeroMQ socket driven by the event loop's readiness callbacks.

Run by one event loop, which owns the socket. Woken by the file descriptor that ZeroMQ gives out, which is
edge-triggered: it says "look again" once, so after every send and every receive the socket's own event mask decides.
``zmq.asyncio`` offers the same with a future and a turn of the loop for each message; here one wake-up hands over all
messages that are there, which under load is most of the cost (a lone round trip gains little).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import zmq

from flowprefill_sglang.wire.framing import Buffer

MESSAGES_PER_TURN: Final = 128
"""Read at most so many before the loop gets its turn, so that a flood of messages cannot starve HTTP."""


class EventSocket:
    """Calls ``on_frames`` with each multipart message; sends without ever blocking.

    Takes the socket over: ``close`` closes it. Must be made and used on the event loop's thread.
    """

    def __init__(self, socket: zmq.Socket[bytes], on_frames: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._on_frames = on_frames
        self._loop = asyncio.get_running_loop()
        self._descriptor: int = socket.fileno()
        self._scheduled = False
        self._closed = False
        self._loop.add_reader(self._descriptor, self._drain)
        self._schedule()

    def try_send(self, frames: Sequence[Buffer]) -> bool:
        """Queue one message. False when nobody is there to take it: the peer is gone, or its queue is full."""
        try:
            self._socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=False)
        except (zmq.Again, zmq.ZMQError):  # EHOSTUNREACH is a plain ZMQError
            return False
        finally:
            self._schedule()
        return True

    def close(self, linger_s: float = 0.0) -> None:
        """Stop listening; unsent messages get ``linger_s`` to leave. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._descriptor)
        self._socket.close(linger=int(linger_s * 1000))

    def _schedule(self) -> None:
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._drain_scheduled)

    def _drain_scheduled(self) -> None:
        self._scheduled = False
        self._drain()

    def _drain(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            if self._closed:
                return
            try:
                frames = self._socket.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_frames(frames)
        self._schedule()
