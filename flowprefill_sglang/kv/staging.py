"""Buffers that a sender gathers into, each used again only when ZeroMQ has let go of the frame made of it."""

from __future__ import annotations

import torch
import zmq


class StagingBuffer:
    """One buffer. Owned by the thread that sends."""

    def __init__(self, size_bytes: int, *, pin: bool) -> None:
        self._memory = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pin)
        self._tracker: zmq.MessageTracker | None = None

    @property
    def is_free(self) -> bool:
        """Whether ZeroMQ no longer reads from the buffer."""
        return self._tracker is None or self._tracker.done

    def block(self, size_bytes: int) -> torch.Tensor:
        """The first ``size_bytes`` bytes, to gather into."""
        return self._memory[:size_bytes]

    def lend(self, tracker: zmq.MessageTracker | None) -> None:
        """ZeroMQ reads from the buffer until the tracker is done."""
        self._tracker = tracker


class StagingPool:
    """A fixed number of buffers, each allocated when it is first needed: a quiet server holds one or two."""

    def __init__(self, *, buffers: int, size_bytes: int, pin: bool) -> None:
        self._limit = buffers
        self._size_bytes = size_bytes
        self._pin = pin
        self._buffers: list[StagingBuffer] = []

    def try_take(self) -> StagingBuffer | None:
        """A free buffer, or None while ZeroMQ reads from all of them."""
        for buffer in self._buffers:
            if buffer.is_free:
                return buffer
        if len(self._buffers) == self._limit:
            return None
        self._buffers.append(StagingBuffer(self._size_bytes, pin=self._pin))
        return self._buffers[-1]
