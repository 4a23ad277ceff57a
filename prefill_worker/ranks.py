"""How the ranks of a tensor-parallel worker take the same decisions.

Every rank runs the same loop, with the same state machine and SGLang's scheduler as replicated state machines. What is
not replicated comes from the leader (rank 0): clock readings, what happened and when, measured times. At each such
place the loop asks ``agree``; the leader says its own value and every follower takes it instead of its own. What the
ranks derive from it is compared now and then (``confirm``): ranks that have parted end the worker with an error before
they can hang in a collective.

A Unix socket leads from the leader to each follower. A follower that has nothing to do sleeps in ``recv``, for hours if
need be, where a collective would run into its time-out and a look at shared memory would burn a core; and whichever end
dies, the other one reads its end at once. The same sockets carry a follower's own news to the leader: handoffs that
changed their state, which may come last from any rank, and its requests to be woken.
"""

from __future__ import annotations

import logging
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar

import msgspec

from flowprefill_sglang.errors import InternalError, PeerFault

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_MESSAGE_BYTES: Final = 16 * 1024
"""Of one value: a few numbers each."""


class RoomChanged(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A follower's KV handoff has a new status."""

    room: int
    status: int


class WakeUp(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A follower wants a turn of the loop."""

    is_urgent: bool


News = RoomChanged | WakeUp


class _Said(msgspec.Struct, frozen=True, array_like=True):
    what: str
    value: msgspec.Raw


class Ranks(Protocol):
    """What the loop needs of its group. Called by the loop's thread only, but for ``tell``."""

    leads: bool
    """Whether this rank decides. A worker of one rank leads itself."""
    count: int

    def agree(self, what: str, value: T) -> T:
        """The leader's value, on every rank. ``what`` must be the same on all, in the same order; ``value`` is of a
        type that msgspec encodes. Raises PeerFault when a rank is gone, InternalError when they have parted."""

    def confirm(self, what: str, value: object) -> None:
        """Raises InternalError on a follower whose value is another than the leader's. Else as ``agree``."""

    def now(self) -> float:
        """The leader's ``time.monotonic()``."""

    def tell(self, news: News) -> None:
        """Tell the leader; from any thread. Nothing happens where this rank leads, or the leader is gone."""

    def listen(self, heard: Callable[[int, News], None], lost: Callable[[], None]) -> None:
        """On the leader, call ``heard`` with each rank's news, and ``lost`` once one is gone, on another thread."""

    def check(self) -> None:
        """Raises PeerFault when a rank is known to be gone."""

    def close(self) -> None:
        """Leave the group."""


class Alone:
    """A worker of one rank."""

    leads = True
    count = 1

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock

    def agree(self, what: str, value: T) -> T:
        """Its own."""
        return value

    def confirm(self, what: str, value: object) -> None:
        """With nobody."""

    def tell(self, news: News) -> None:
        """Nobody."""

    def listen(self, heard: Callable[[int, News], None], lost: Callable[[], None]) -> None:
        """To nobody."""

    def check(self) -> None:
        """Nobody can be gone."""

    def close(self) -> None:
        """Nothing to leave."""


class Leader:
    """Rank 0 of a group. Owns its sockets; a thread reads them from ``listen`` on."""

    leads = True

    def __init__(self, followers: Mapping[int, socket.socket], clock: Callable[[], float] = time.monotonic) -> None:
        """``followers``: a connected socket (SOCK_SEQPACKET) to each rank but this one."""
        self.count = len(followers) + 1
        self._followers = followers
        self._clock = clock
        self._encoder = msgspec.msgpack.Encoder()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None
        self._lost: int | None = None  # the first rank that was; written by the thread

    def agree(self, what: str, value: T) -> T:
        """Say this rank's own value."""
        data = self._encoder.encode((what, value))
        for rank, follower in self._followers.items():
            try:
                follower.send(data, socket.MSG_NOSIGNAL)
            except OSError as error:
                raise _gone(self._lost or rank) from error
        return value

    def confirm(self, what: str, value: object) -> None:
        """Say this rank's own value; the others compare."""
        self.agree(what, value)

    def now(self) -> float:
        """Read the clock for all."""
        return self.agree("now", self._clock())

    def tell(self, news: News) -> None:
        """The leader hears of its own news by itself."""

    def listen(self, heard: Callable[[int, News], None], lost: Callable[[], None]) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._hear, args=(heard, lost), name="flowprefill-ranks", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises PeerFault when a follower is gone."""
        if self._lost is not None:
            raise _gone(self._lost)
        for rank, follower in self._followers.items():
            _check(follower, rank)

    def close(self) -> None:
        """End the thread and hang up, which the followers take for this rank's end."""
        os.eventfd_write(self._stop, 1)
        if self._thread is not None:
            self._thread.join()
        for follower in self._followers.values():
            follower.close()
        os.close(self._stop)

    def _hear(self, heard: Callable[[int, News], None], lost: Callable[[], None]) -> None:
        decoder = msgspec.msgpack.Decoder(News)
        with selectors.DefaultSelector() as selector:
            selector.register(self._stop, selectors.EVENT_READ)
            for rank, follower in self._followers.items():
                selector.register(follower, selectors.EVENT_READ, rank)
            while True:
                for key, _ in selector.select():
                    if key.fd == self._stop:
                        return
                    data = _received(self._followers[key.data])
                    if data:
                        heard(key.data, decoder.decode(data))
                        continue
                    self._let_go(key.data)
                    lost()
                    return

    def _let_go(self, lost: int) -> None:
        """A rank is gone: hang up on the others, who may be in a collective that does not end, or break it without
        knowing why. This rank's own thread may be in one too."""
        self._lost = lost
        for follower in self._followers.values():
            with suppress(OSError):
                follower.shutdown(socket.SHUT_RDWR)


class Follower:
    """Any other rank. Owns its socket."""

    leads = False

    def __init__(self, rank: int, count: int, leader: socket.socket) -> None:
        """``leader``: a connected socket (SOCK_SEQPACKET)."""
        self.rank = rank
        self.count = count
        self._leader = leader
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(_Said)

    def agree(self, what: str, value: T) -> T:
        """Sleep until the leader says its value."""
        return msgspec.msgpack.decode(self._said(what), type=type(value))

    def confirm(self, what: str, value: object) -> None:
        """Compare with what the leader says."""
        theirs: Any = msgspec.msgpack.decode(self._said(what))
        mine = msgspec.msgpack.decode(self._encoder.encode(value))
        if theirs != mine:
            raise InternalError(
                f"tensor-parallel rank {self.rank} has parted from its leader: {what} is {mine!r:.500} here and "
                f"{theirs!r:.500} there"
            )

    def now(self) -> float:
        """The leader's clock."""
        return self.agree("now", 0.0)

    def tell(self, news: News) -> None:
        """Send it. From any thread."""
        try:
            self._leader.send(self._encoder.encode(news), socket.MSG_NOSIGNAL)
        except OSError:  # gone: the loop's thread finds out by itself, and says so
            logger.debug("the leader does not hear of %s", news)

    def listen(self, heard: Callable[[int, News], None], lost: Callable[[], None]) -> None:
        """Nobody tells a follower anything but what it waits for."""

    def check(self) -> None:
        """Raises PeerFault when the leader is gone."""
        _check(self._leader, 0)

    def close(self) -> None:
        """Hang up, which the leader takes for this rank's end."""
        self._leader.close()

    def _said(self, what: str) -> msgspec.Raw:
        data = _received(self._leader)
        if not data:
            raise _gone(0)
        said = self._decoder.decode(data)
        if said.what != what:
            raise InternalError(
                f"tensor-parallel rank {self.rank} has parted from its leader: it asks for {what!r} and hears of "
                f"{said.what!r}"
            )
        return said.value


def _received(sock: socket.socket) -> bytes:
    """One message; none when the other end is gone."""
    try:
        return sock.recv(MAX_MESSAGE_BYTES)
    except OSError:
        return b""


def _check(sock: socket.socket, rank: int) -> None:
    """Raises PeerFault when the other end is gone, even if it has said something that was not read yet."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    if poll.poll(0):
        raise _gone(rank)


def _gone(rank: int) -> PeerFault:
    what = f"tensor-parallel rank {rank} of this worker has ended"
    if rank == 0:
        what = "the leader of this tensor-parallel worker, rank 0, has hung up: it has ended, or has lost another rank"
    return PeerFault(f"{what}. This rank ends too; that one's log lines say why, or the kernel's if it was killed")
