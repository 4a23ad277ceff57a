"""How many requests are in the cluster, and who waits: first come, first served.

Run by the router's event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Final

from flowprefill_sglang.router.answers import dropped

RETRY_AFTER_S: Final = 1


class Admission:
    """At most ``limit`` requests inside, at most ``queue_size`` waiting, nobody longer than ``timeout_s``."""

    def __init__(self, *, limit: int, queue_size: int, timeout_s: float) -> None:
        self._limit = limit
        self._queue_size = queue_size
        self._timeout_s = timeout_s
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.inside = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def try_enter(self) -> bool:
        """Take a place if one is free. True: call ``leave`` later."""
        if self.inside >= self._limit:
            return False
        self.inside += 1
        return True

    def queue_up(self) -> asyncio.Future[None]:
        """A place in the queue, for ``wait``; cancel it to give it up. Raises Refusal (429) when the queue is full."""
        if self.waiting >= self._queue_size:
            message = f"{self.inside} requests are running and {self.waiting} waiting; try again later"
            raise dropped(message, status=429, reason="saturated", retry_after_s=RETRY_AFTER_S)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        return place

    async def wait(self, place: asyncio.Future[None]) -> bool:
        """Wait for the place's turn. True: call ``leave`` later. False: it was cancelled.

        Raises Refusal (429) when the wait was too long."""
        try:
            await asyncio.wait((place,), timeout=self._timeout_s)
        except asyncio.CancelledError:
            self._give_up(place)
            raise
        if place.done() and not place.cancelled():
            return True
        cancelled = place.cancelled()
        self._give_up(place)
        if cancelled:
            return False
        message = f"no place came free within {self._timeout_s:g} s; try again later"
        raise dropped(message, status=429, reason="saturated", retry_after_s=RETRY_AFTER_S)

    def _give_up(self, place: asyncio.Future[None]) -> None:
        if place.done() and not place.cancelled():
            self.leave()  # its turn came in the same moment
        else:
            place.cancel()
            with suppress(ValueError):  # it was passed over already
                self._waiting.remove(place)

    def leave(self) -> None:
        """Give the place to whoever waits longest."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.inside -= 1
