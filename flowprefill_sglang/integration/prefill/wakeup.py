"""What wakes the prefill loop: SGLang's sockets, and state changes of KV handoffs on other threads.

A request can be prefilled once its message has come *and* its decode instance is ready for its KV; either may be first.
``News`` hears of both: of messages from a ``Doorbell``, of handoffs from a hook on ``CommonKVManager.update_status``,
which every transfer backend calls from its own threads. Only what can change a decision stops the running task at its
next boundary: the second of the two, a failed handoff, or one that ended while memory is short. Anything else (the
first of the two, a control request) stops it after ``MAY_WAIT_S``, a handoff that ended well after
``ENDED_MAY_WAIT_S``, and is otherwise taken in when the task stops or ends by itself: a stop costs up to a millisecond,
and a request would make three. And requests that come in a burst share their stops: see ``Pace``.

``Wakeup`` is the loop's own bed: it sleeps on the sockets and on an eventfd, and gets up for either.

With tensor parallelism the leader's loop sleeps here and decides; a follower's news goes to the leader, which counts a
room as ready, or ended, once every rank has said so.
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import msgspec
import zmq
from sglang.srt.disaggregation.base.conn import KVPoll

from flowprefill_sglang.integration.hooks import Hook, HookKind
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.ranks import Alone, Ranks, RoomChanged, WakeUp
from flowprefill_sglang.prefill_worker.ranks import News as RankNews
from flowprefill_sglang.prefill_worker.rooms import RoomReports

MAX_READY_ROOMS = 4096
"""Rooms whose decode instance is ready and whose request has not come, of which the moment is remembered. A request
that SGLang refuses never comes. One that is forgotten and comes after all stops a running task a little later."""

MAY_WAIT_S = 0.02
"""How long what changes no decision may wait for the running task's end before it stops that task."""
ENDED_MAY_WAIT_S = 0.1
"""The same for a handoff that ended well, while nobody waits for what it holds. The first token is with the decode
instance by then; only an answer that carries logprobs of the prompt waits for it."""

SHARE_OF_OBJECTIVE = 0.01
"""What a request may wait, of the tightest objective seen lately, because the loop has just looked for news."""
_REMEMBERED = 256
"""Arrivals that the tightest objective is taken of, at least; twice as many at most."""


class Pace:
    """How soon after the loop has looked for news a running task may be stopped for more of it.

    One arrival stops the running task at once. In a burst each would, and a stop costs up to a millisecond of the
    engine's time: so there is at most one stop in ``spacing_s``, a hundredth of the tightest objective that requests
    have had lately and never more than ``MAY_WAIT_S``. The objective of the request at the door is not known before it
    is taken in, hence that of its predecessors. Owned by the scheduler's thread; ``spacing_s`` may be read from any.
    """

    def __init__(self) -> None:
        self.spacing_s = MAY_WAIT_S
        self._tightest_s = self._tightest_before_s = math.inf
        self._counted = 0

    def arrived(self, objective_s: float) -> None:
        """A request with this objective has come."""
        if self._counted == _REMEMBERED:
            self._tightest_before_s, self._tightest_s, self._counted = self._tightest_s, math.inf, 0
        self._counted += 1
        self._tightest_s = min(self._tightest_s, objective_s)
        self.spacing_s = min(MAY_WAIT_S, SHARE_OF_OBJECTIVE * min(self._tightest_s, self._tightest_before_s))


class Wakeup:
    """Owned by the scheduler's thread; those that ask for it may be called from any."""

    def __init__(
        self,
        sockets: Iterable[zmq.Socket[bytes]],
        gate: Gate,
        clock: Callable[[], float] = time.monotonic,
        ranks: Ranks | None = None,
    ) -> None:
        self._gate = gate
        self._ranks = ranks or Alone()
        self._clock = clock
        self.pace = Pace()
        self._looked_at = -math.inf
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._eventfd, zmq.POLLIN)
        for socket in sockets:
            self._poller.register(socket, zmq.POLLIN)

    def now_please(self) -> None:
        """Stop the running task at its next boundary, a little later if the loop has looked for news just now, or get
        the loop up if it sleeps."""
        self._ranks.tell(WakeUp(is_urgent=True))
        early_s = self._looked_at + self.pace.spacing_s - self._clock()
        if early_s > 0:
            self._gate.raise_within(early_s)
        else:
            self._gate.raise_flag()
        self._if_asleep()

    def soon_please(self, within_s: float = MAY_WAIT_S) -> None:
        """Stop the running task after ``within_s``, or get the loop up if it sleeps."""
        self._ranks.tell(WakeUp(is_urgent=False))
        self._gate.raise_within(within_s)
        self._if_asleep()

    def _if_asleep(self) -> None:
        os.eventfd_write(self._eventfd, 1)

    def clear(self) -> None:
        """Forget what has been asked so far; called before looking at what there is to do, never after."""
        self._gate.clear()
        self._looked_at = self._clock()
        with suppress(BlockingIOError):
            os.eventfd_read(self._eventfd)

    def wait(self, timeout_s: float) -> None:
        """Sleep until something happens, at most ``timeout_s``. Not on a rank that follows: it sleeps where it waits
        for the leader's next word."""
        if self._ranks.leads:
            self._poller.poll(int(timeout_s * 1000))

    def close(self) -> None:
        """Nobody may ask any more."""
        os.close(self._eventfd)


class Doorbell:
    """Notices that a message has come to a ZeroMQ socket while its owner is busy, on a thread of its own.

    To ask ZeroMQ at every operator boundary costs 2 to 7% of a short prefill. A socket's file descriptor becomes
    readable once for what has come since its owner last emptied it (zmq_getsockopt, ZMQ_FD), hence edge-triggered, and
    stays so until its owner has a look, hence no ring for what has been taken meanwhile.
    """

    def __init__(self, sockets: Iterable[zmq.Socket[bytes]], ring: Callable[[], None]) -> None:
        """``ring`` is called on the doorbell's thread: a message is there that the owner has not taken."""
        self._ring = ring
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._edges = select.epoll()
        self._edges.register(self._stop, select.EPOLLIN)
        self._levels = select.poll()
        for socket in sockets:
            self._edges.register(socket.FD, select.EPOLLIN | select.EPOLLET)
            self._levels.register(socket.FD, select.POLLIN)
        self._thread = threading.Thread(target=self._listen, name="flowprefill-doorbell", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._edges.close()
        os.close(self._stop)

    def _listen(self) -> None:
        while all(file != self._stop for file, _ in self._edges.poll()):
            if self._levels.poll(0):
                self._ring()


class Taken(msgspec.Struct, frozen=True, array_like=True):
    """What has happened since the loop last took it."""

    at: float
    """When it was taken."""
    has_message: bool
    has_failure: bool
    ended_at: float | None


class News:
    """What other threads report to the loop: messages, and state changes of KV handoffs."""

    def __init__(self) -> None:
        self.ready_at: dict[int, float] = {}
        """By bootstrap room: when its decode instance became ready (CLOCK_MONOTONIC). The loop takes entries out."""
        self.awaited: frozenset[int] = frozenset()
        """Rooms of requests whose message the loop has taken and whose decode instance it waits for. The loop sets it
        after it has taken messages and before it looks which rooms are ready."""
        self.has_message = False
        """A message has come since the loop set this to False, which it does before it takes messages."""
        self.has_failure = False
        """Some room has failed since this was last reset."""
        self.ended_at: float | None = None
        """When the first handoff ended, well or not, since this was last reset."""
        self.is_memory_short = False
        """Whether somebody waits for what an ended handoff holds. Set by the loop."""
        self._wakeup: Wakeup | None = None
        self._ranks: Ranks = Alone()
        self._reports = RoomReports(ranks=1, capacity=MAX_READY_ROOMS)

    def listen(self, wakeup: Wakeup | None, ranks: Ranks | None = None) -> None:
        """Wake this loop from now on; None: nobody. Also forgets what came before there was a listener. ``ranks``: the
        group it is in."""
        self._wakeup = wakeup
        self._ranks = ranks or Alone()
        self._reports = RoomReports(self._ranks.count, capacity=MAX_READY_ROOMS)
        self.ready_at.clear()
        self.ended_at = None
        self.awaited = frozenset()
        self.has_message = self.is_memory_short = False

    def take(self) -> Taken:
        """What has happened, which is then no news any more. Only what was found is reset: the other threads go on."""
        taken = Taken(time.monotonic(), self.has_message, self.has_failure, self.ended_at)
        if taken.has_message:
            self.has_message = False
        if taken.has_failure:
            self.has_failure = False
        if taken.ended_at is not None:
            self.ended_at = None
        return taken

    # Each of two threads first leaves its own mark and then looks for the other's, so one of them sees both.

    def message_came(self) -> None:
        """The doorbell has rung."""
        self.has_message = True
        if self._wakeup is None:
            return
        if self.ready_at:  # it may be the request of a room that is ready
            self._wakeup.now_please()
        else:
            self._wakeup.soon_please()

    def changed(self, room: int, status: Any) -> None:  # KVPoll, from any thread
        """A room has a new status on this rank."""
        if self._wakeup is None or status in (KVPoll.Bootstrapping, KVPoll.Transferring):
            return
        if self._ranks.leads:
            self._changed_on(0, room, status)
        else:
            self._ranks.tell(RoomChanged(room, int(status)))

    def heard(self, rank: int, news: RankNews) -> None:
        """Another rank's news; on the thread that listens to it."""
        match news:
            case RoomChanged(room, status):
                self._changed_on(rank, room, status)
            case WakeUp(is_urgent) if self._wakeup is not None:
                (self._wakeup.now_please if is_urgent else self._wakeup.soon_please)()

    def rank_lost(self) -> None:
        """A rank is gone. The loop finds out by itself where it needs it, and needs a turn for that."""
        wakeup = self._wakeup
        if wakeup is not None:
            wakeup.now_please()

    def _changed_on(self, rank: int, room: int, status: Any) -> None:  # KVPoll
        wakeup = self._wakeup
        if status == KVPoll.Failed:
            self._reports.forget(room)
        elif not self._reports.is_last(rank, room, int(status)):
            return
        if wakeup is None:
            return
        if status == KVPoll.WaitingForInput:
            self._became_ready(room, wakeup)
            return
        self.ready_at.pop(room, None)
        if self.ended_at is None:  # a plain assignment: two threads may report at once
            self.ended_at = time.monotonic()
        if status == KVPoll.Failed:
            self.has_failure = True
            wakeup.now_please()
        elif self.is_memory_short:
            wakeup.now_please()
        else:
            wakeup.soon_please(ENDED_MAY_WAIT_S)

    def _became_ready(self, room: int, wakeup: Wakeup) -> None:
        if len(self.ready_at) >= MAX_READY_ROOMS:
            self.ready_at.clear()  # in one step, as other threads may be here too
        self.ready_at[room] = time.monotonic()
        if room in self.awaited or self.has_message:
            wakeup.now_please()
        # Else its message is still to come, and will wake the loop.


news = News()
"""This process's; a module global because SGLang's transfer managers are made long before the loop, by SGLang."""


def hooks() -> list[Hook]:
    """Tell ``news`` of every status change."""

    def after_update_status(result: None, manager: Any, bootstrap_room: int, status: Any) -> None:
        news.changed(bootstrap_room, status)

    return [
        Hook(
            target="sglang.srt.disaggregation.common.conn.CommonKVManager.update_status",
            kind=HookKind.AFTER,
            function=after_update_status,
            why="a request whose decode instance is ready would not be noticed",
        ),
    ]
