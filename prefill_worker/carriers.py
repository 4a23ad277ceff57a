"""Greenlets that carry one task after another.

A greenlet of its own for each task would cost a short forward pass one per cent: its frames need room in one piece
(``frame_room``), which the system maps, fills page by page and unmaps again, some 70 µs on a 2.6 GHz EPYC. One that is
kept has its room, and a switch takes less than two.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from greenlet import getcurrent, greenlet

from flowprefill_sglang.prefill_worker.frame_room import with_frame_room

MAX_IDLE: Final = 8
"""Kept for the tasks to come; more are under way at once only while so many are suspended."""


class Carriers(threading.local):
    """Each thread's own, as greenlets are. A carrier is *idle*, in here, or with the task that took it."""

    def __init__(self) -> None:
        self._idle: list[greenlet] = []

    def take(self) -> greenlet:
        """One that runs the function it is switched to with, and switches back to its parent when that has returned.
        What the function raises ends the carrier and reaches the parent."""
        return self._idle.pop() if self._idle else greenlet(_carry)

    def give_back(self, carrier: greenlet) -> None:
        """Keep a carrier whose function has returned. One that has ended is dropped."""
        if carrier.dead:
            return
        carrier.gr_context = None
        if len(self._idle) < MAX_IDLE:
            self._idle.append(carrier)
        else:
            carrier.throw()


carriers: Final = Carriers()


def _carry(function: Callable[[], None]) -> None:
    def one_after_another() -> None:
        nonlocal function
        while True:
            function()
            function = _nothing  # an idle carrier keeps no task alive
            parent = getcurrent().parent
            assert parent is not None
            function = parent.switch()

    with_frame_room(one_after_another)


def _nothing() -> None: ...
