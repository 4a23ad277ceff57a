"""What wakes the prefill loop: SGLang's sockets, and state changes of KV handoffs on other threads.

``KvEvents`` is filled by a hook on ``CommonKVManager.update_status``, which every transfer backend calls from its own
threads: when a decode instance is ready for a request's KV (the last thing an arrival waits for), when a handoff has
ended, and when one failed. ``Wakeup`` is the loop's own bed: it sleeps on the sockets and on an eventfd, and gets up
for either. While a task runs nobody sleeps; then the raised gate stops the task at its next boundary.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import zmq
from sglang.srt.disaggregation.base.conn import KVPoll

from flowprefill_sglang.integration.hooks import Hook, HookKind
from flowprefill_sglang.prefill_worker.boundaries import Gate

MAX_READY_ROOMS = 4096
"""Rooms whose decode instance is ready and whose request has not come, of which the moment is remembered. A request
that SGLang refuses never comes; the moment serves the measurement of blocking times alone."""

END_MAY_WAIT_S = 0.02
"""How long a handoff that ended well may wait for the running task's end before it stops that task. Nobody waits for
what it holds unless memory is short; a stop costs up to a tenth of a millisecond, and one takes in several handoffs."""


class Wakeup:
    """Owned by the scheduler's thread; ``now_please`` may be called from any."""

    def __init__(self, sockets: Iterable[zmq.Socket[bytes]], gate: Gate) -> None:
        self._gate = gate
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._eventfd, zmq.POLLIN)
        for socket in sockets:
            self._poller.register(socket, zmq.POLLIN)

    def now_please(self) -> None:
        """Stop the running task at its next boundary, or get the loop up if it sleeps."""
        self._gate.raise_flag()
        self.if_asleep()

    def if_asleep(self) -> None:
        """Get the loop up if it sleeps, or keep it from going to sleep."""
        os.eventfd_write(self._eventfd, 1)

    def clear(self) -> None:
        """Forget what has been asked so far; called before looking at what there is to do, never after."""
        self._gate.clear()
        with suppress(BlockingIOError):
            os.eventfd_read(self._eventfd)

    def wait(self, timeout_s: float) -> None:
        """Sleep until something happens, at most ``timeout_s``."""
        self._poller.poll(int(timeout_s * 1000))

    def close(self) -> None:
        """Nobody may ask any more."""
        os.close(self._eventfd)


class Doorbell:
    """Notices that a message has come to a ZeroMQ socket while its owner is busy, on a thread of its own.

    The owner looks at ``is_rung``, which is free, and at the socket only when it was rung: to ask ZeroMQ at every
    operator boundary costs 2 to 7% of a short prefill. A socket's file descriptor becomes readable once for what has
    come since its owner last emptied it (zmq_getsockopt, ZMQ_FD), hence edge-triggered. It may ring for what the owner
    has taken meanwhile; it never fails to ring for what it has not.
    """

    def __init__(self, sockets: Iterable[zmq.Socket[bytes]]) -> None:
        self.is_rung = True
        """A message may be waiting. The owner sets it to False before it looks."""
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._stop, select.EPOLLIN)
        for socket in sockets:
            self._epoll.register(socket.FD, select.EPOLLIN | select.EPOLLET)
        self._thread = threading.Thread(target=self._listen, name="flowprefill-doorbell", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._epoll.close()
        os.close(self._stop)

    def _listen(self) -> None:
        while all(file != self._stop for file, _ in self._epoll.poll()):
            self.is_rung = True


class KvEvents:
    """State changes of KV handoffs, from the transfer backend's threads to the loop."""

    def __init__(self) -> None:
        self.ready_at: dict[int, float] = {}
        """By bootstrap room: when its decode instance became ready (CLOCK_MONOTONIC). The loop takes entries out."""
        self.has_failure = False
        """Some room has failed since this was last reset."""
        self.ended_at: float | None = None
        """When the first handoff ended, well or not, since this was last reset."""
        self._wakeup: Wakeup | None = None

    def listen(self, wakeup: Wakeup | None) -> None:
        """Wake this loop from now on; None: nobody. Also forgets what came before there was a listener."""
        self._wakeup = wakeup
        self.ready_at.clear()
        self.ended_at = None

    def is_end_due(self, *, is_urgent: bool) -> bool:
        """Whether an ended handoff is worth a stop of the running task by now."""
        ended_at = self.ended_at
        return ended_at is not None and (is_urgent or time.monotonic() - ended_at > END_MAY_WAIT_S)

    def changed(self, room: int, status: Any) -> None:  # KVPoll, from any thread
        """A room has a new status."""
        wakeup = self._wakeup
        if wakeup is None or status in (KVPoll.Bootstrapping, KVPoll.Transferring):
            return
        if status == KVPoll.WaitingForInput:
            if len(self.ready_at) >= MAX_READY_ROOMS:
                self.ready_at.clear()  # in one step, as other threads may be here too
            self.ready_at[room] = time.monotonic()
            wakeup.now_please()
            return
        self.ready_at.pop(room, None)
        if self.ended_at is None:  # a plain assignment: two threads may report at once
            self.ended_at = time.monotonic()
        if status == KVPoll.Failed:
            self.has_failure = True
            wakeup.now_please()
        else:
            wakeup.if_asleep()  # a running task is stopped by is_end_due


kv_events = KvEvents()
"""This process's; a module global because SGLang's transfer managers are made long before the loop, by SGLang."""


def hooks() -> list[Hook]:
    """Tell ``kv_events`` of every status change."""

    def after_update_status(result: None, manager: Any, bootstrap_room: int, status: Any) -> None:
        kv_events.changed(bootstrap_room, status)

    return [
        Hook(
            target="sglang.srt.disaggregation.common.conn.CommonKVManager.update_status",
            kind=HookKind.AFTER,
            function=after_update_status,
            why="a request whose decode instance is ready would not be noticed",
        ),
    ]
