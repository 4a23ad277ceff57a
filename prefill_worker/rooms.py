"""Which KV handoffs have come as far on every rank of a tensor-parallel worker."""

from __future__ import annotations

import threading


class RoomReports:
    """Collects reports of rooms' statuses from several ranks. From any thread."""

    def __init__(self, ranks: int, capacity: int) -> None:
        """``capacity``: rooms of which some ranks have reported, and not all. When there are more, all are forgotten:
        the other ranks of a room that a request never came for may never report."""
        self._all = (1 << ranks) - 1
        self._capacity = capacity
        self._reported: dict[tuple[int, int], int] = {}  # (room, status): ranks, a bit each
        self._lock = threading.Lock()

    def is_last(self, rank: int, room: int, status: int) -> bool:
        """Note that ``rank`` reports this status; True when it is the last one to do so. A repeated report counts
        once."""
        if self._all == 1:
            return True
        with self._lock:
            key = room, status
            ranks = self._reported.get(key, 0) | 1 << rank
            if ranks == self._all:
                self._reported.pop(key, None)
                return True
            if len(self._reported) >= self._capacity:
                self._reported.clear()
            self._reported[key] = ranks
            return False

    def forget(self, room: int) -> None:
        """The room has failed on some rank: no other report of it means anything."""
        with self._lock:
            for key in [key for key in self._reported if key[0] == room]:
                del self._reported[key]
