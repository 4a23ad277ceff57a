"""The decode side's thread: checks what arrives and writes it into the pages that were reserved for it.

One thread a rank owns the ROUTER socket and the links on it. The scheduler's thread opens and closes rooms directly: it
must know that nothing is written to a room's pages once ``close`` has returned, so each room has a lock that covers
"may I write" and the write. Only this process writes to its pages; the sender does not even know where they are.
SGLang's deferred release of pages, which covers remote writes still under way after an abort, is therefore not needed.
"""

from __future__ import annotations

import functools
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import zmq

from flowprefill_sglang import __version__
from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.kernels.kv_pages import block_bytes, scatter_pages
from flowprefill_sglang.kv.layout import Layout, largest_chunk_bytes, layout_mismatch
from flowprefill_sglang.kv.link_thread import LinkThread
from flowprefill_sglang.kv.links import LINK_LOST_EVENTS, configure_link, has_lost_link
from flowprefill_sglang.kv.mailbox import Mailbox
from flowprefill_sglang.kv.messages import (
    MAX_HEADER_BYTES,
    SPOKEN,
    Accepted,
    Chunk,
    Credit,
    End,
    FromDecode,
    Hello,
    Refused,
    Rejected,
    Welcome,
    checksum,
    decode_from_prefill,
    encode,
)
from flowprefill_sglang.kv.settings import KvSettings
from flowprefill_sglang.kv.transfer import IncomingTransfer, LinkFault, PageIds, ReceiveCredit, RoomFault
from flowprefill_sglang.wire.versions import Side, stated, why_not

logger = logging.getLogger(__name__)

_TICK_MS: Final = 500
_PROBE_MS: Final = 50
_PROBE_FOR_S: Final = 2.0
_MESSAGES_A_TURN: Final = 64


@dataclass(kw_only=True)
class _Room:
    incoming: IncomingTransfer
    aux_index: int
    prefill: str
    link: bytes | None = None
    """Routing identity of the link that its messages come over, once the first has come."""
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(kw_only=True)
class _Link:
    prefill: str
    credit: ReceiveCredit


class DecodeLinks:
    """All KV connections of one decode rank.

    ``on_complete(room)`` and ``on_failed(room, reason)`` are called by the thread of this object, at most one of them
    and at most once for each opened room; not at all for a room that ``close`` ended.
    """

    def __init__(
        self,
        *,
        host: str,
        layout: Layout,
        buffers: Sequence[torch.Tensor],
        aux_buffers: Sequence[torch.Tensor],
        settings: KvSettings,
        on_complete: Callable[[int], None],
        on_failed: Callable[[int, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session = f"{host}-{secrets.token_hex(8)}"
        """Names this life of the decode rank."""
        self.max_chunk_bytes = largest_chunk_bytes(layout.page_bytes, settings.chunk_bytes)
        self.rejected_messages = 0
        """Messages that were not taken in, of any cause."""
        self._layout = layout
        self._buffers = buffers
        self._aux_buffers = aux_buffers
        self._aux_bytes = block_bytes(aux_buffers, 1)
        self._settings = settings
        self._on_complete = on_complete
        self._on_failed = on_failed
        self._clock = clock
        self._rooms: dict[int, _Room] = {}  # put in by the scheduler's thread, taken out by any, under _table_lock
        self._table_lock = threading.Lock()
        self._transfers = itertools.count(secrets.randbits(48))
        self._links: dict[bytes, _Link] = {}
        self._probe_until = 0.0
        self._mailbox = Mailbox()
        self._is_closing = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        configure_link(self._socket, settings, host)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a lost peer is an error, which is how we find it
        self._socket.setsockopt(zmq.MAXMSGSIZE, self.max_chunk_bytes + MAX_HEADER_BYTES)
        # A good peer keeps within its credit; one that does not fills its own TCP window, not our memory.
        self._socket.setsockopt(zmq.RCVHWM, 2 * settings.window_chunks + 16)
        self._monitor = self._socket.get_monitor_socket(LINK_LOST_EVENTS)
        self.port = self._socket.bind_to_random_port(f"tcp://[{host}]" if ":" in host else f"tcp://{host}")
        self._thread = LinkThread("kv-decode-links", self._run, lambda: self._mailbox.post(self._end_loop))
        self._thread.start()

    # ---- from any thread --------------------------------------------------------------------------------------

    def open(self, room: int, *, page_ids: PageIds, aux_index: int, prefill: str) -> int:
        """Reserve: from now on the room's pages may be written. The returned transfer number goes into ``Announce``.

        ``prefill`` is the prefill rank's ``host:port`` from SGLang's bootstrap. Raises IndexError for a page or
        metadata index that this side does not have.
        """
        _check_indices(self._buffers, page_ids, "page")
        _check_indices(self._aux_buffers, np.array([aux_index]), "metadata index")
        self.close(room, "the room was opened again")
        transfer = next(self._transfers)
        incoming = IncomingTransfer(
            room=room,
            transfer=transfer,
            page_ids=page_ids,
            page_bytes=self._layout.page_bytes,
            aux_bytes=self._aux_bytes,
        )
        with self._table_lock:
            self._rooms[room] = _Room(incoming=incoming, aux_index=aux_index, prefill=prefill)
        return transfer

    def close(self, room: int, reason: str) -> None:
        """End a room. Once this returns nothing is written to its pages any more; it waits for a write under way."""
        closed = self._take(room)
        if closed is None:
            return
        with closed.lock:
            ends_now = closed.incoming.fail()
        if ends_now:
            message = Rejected(room=room, transfer=closed.incoming.transfer, reason=reason)
            self._mailbox.post(lambda: self._tell_prefill(closed.prefill, message))

    def is_linked(self, prefill: str) -> bool:
        """Whether a prefill rank is connected, as far as this side has noticed."""
        return any(link.prefill == prefill for link in list(self._links.values()))

    def shut_down(self) -> None:
        """Fail what is in flight, close all connections and end the thread."""
        self._mailbox.post(self._begin_shut_down)
        self._thread.wait()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._context.destroy(linger=0)
        self._mailbox.close()

    # ---- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._mailbox.fileno(), self._socket, self._monitor):
            poller.register(source, zmq.POLLIN)
        while not self._is_closing:
            try:
                self._turn(poller)
            except Exception as error:  # the thread's edge: whatever happens, nobody may be left waiting
                logger.exception("the KV receiver failed; its connections are reset")
                for identity in list(self._links):
                    self._refuse(identity, f"internal error of the decode side: {type(error).__name__}: {error}")

    def _turn(self, poller: zmq.Poller) -> None:
        is_probing = self._clock() < self._probe_until
        events = dict(poller.poll(_PROBE_MS if is_probing else _TICK_MS))
        self._mailbox.run_all()
        for _ in range(_MESSAGES_A_TURN if self._socket in events else 0):
            try:
                frames = self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                break
            self._receive(frames[0].bytes, [frame.buffer for frame in frames[1:]])
        if self._monitor in events and has_lost_link(self._monitor):
            self._probe_until = self._clock() + _PROBE_FOR_S
        if is_probing:
            # ZeroMQ says that a connection was lost, not whose. A credit total may be said twice, and saying it to a
            # peer that is gone fails, though only once the socket has noticed: hence again for a while.
            for identity, link in list(self._links.items()):
                self._say(identity, Credit(chunks=link.credit.total))

    def _begin_shut_down(self) -> None:
        self._fail_rooms(lambda _: True, "the decode side is shutting down")
        self._end_loop()

    def _end_loop(self) -> None:
        self._is_closing = True

    def _receive(self, identity: bytes, frames: list[memoryview]) -> None:
        link = self._links.get(identity)
        try:
            if not frames:
                raise LinkFault("a message without frames")
            message = decode_from_prefill(frames[0], len(frames) - 1)
            if isinstance(message, Hello):
                self._hello(identity, message)
            elif link is None:
                raise LinkFault("a message before the handshake")
            else:
                self._payload(identity, link, message, frames[1])
                if isinstance(message, Chunk):
                    link.credit.finish()
                    self._say(identity, Credit(chunks=link.credit.total))
        except PeerFault as fault:
            self.rejected_messages += 1
            self._refuse(identity, str(fault))

    def _hello(self, identity: bytes, hello: Hello) -> None:
        if hello.protocol not in SPOKEN:
            prefill = Side(what="prefill", software=hello.version, versions=stated(hello.protocol, None))
            decode = Side(what="decode", software=__version__, versions=SPOKEN)
            raise LinkFault(why_not("KV", prefill, decode))
        if hello.session != self.session:
            raise LinkFault(f"this is decode session {self.session}, not {hello.session}")
        mismatch = layout_mismatch(prefill=hello.layout, decode=self._layout)
        if mismatch is not None:
            raise LinkFault(mismatch)
        if identity in self._links:
            raise LinkFault("a second handshake on one link")
        for other in [key for key, link in self._links.items() if link.prefill == hello.prefill]:
            del self._links[other]
            self._fail_rooms(functools.partial(_came_over, other), f"prefill {hello.prefill} connected anew")
        credit = ReceiveCredit(self._settings.window_chunks)
        self._links[identity] = _Link(prefill=hello.prefill, credit=credit)
        self._say(identity, Welcome(credit_chunks=credit.total))

    def _payload(self, identity: bytes, link: _Link, message: Chunk | End, payload: memoryview) -> None:
        digest = checksum(payload, transfer=message.transfer, sequence=message.sequence)
        room = self._rooms.get(message.room)
        if room is None or room.incoming.transfer != message.transfer or room.prefill != link.prefill:
            self._reject(identity, message, "decode has no such room any more")
            return
        try:
            with room.lock:  # nothing is said under the lock: a send can fail, which ends rooms
                self._admit_and_write(room, identity, message, payload, digest)
        except RoomFault as fault:
            self._reject(identity, message, str(fault))
            self._fail(room, f"prefill {link.prefill}: {fault}")
            return
        if isinstance(message, End):
            if self._take(message.room, room) is not None:  # close() may have been faster, after the last write
                self._on_complete(message.room)
            self._say(identity, Accepted(room=message.room, transfer=message.transfer))

    def _admit_and_write(
        self, room: _Room, identity: bytes, message: Chunk | End, payload: memoryview, digest: int
    ) -> None:
        if room.incoming.is_over:
            raise RoomFault("decode has ended the room")
        if room.link is None:
            room.link = identity
        if room.link != identity:
            raise RoomFault(f"message {message.sequence} came over another connection than those before it")
        if isinstance(message, End):
            room.incoming.admit_end(message, payload_bytes=payload.nbytes, checksum=digest)
            scatter_pages(self._aux_buffers, np.array([room.aux_index]), payload)
            return
        page_ids = room.incoming.admit_chunk(message, payload_bytes=payload.nbytes, checksum=digest)
        span = message.span
        scatter_pages(self._buffers[span.first_buffer : span.first_buffer + span.buffers], page_ids, payload)

    # ---- answers and endings ----------------------------------------------------------------------------------

    def _reject(self, identity: bytes, message: Chunk | End, reason: str) -> None:
        self.rejected_messages += 1
        self._say(identity, Rejected(room=message.room, transfer=message.transfer, reason=reason))

    def _tell_prefill(self, prefill: str, message: Rejected) -> None:
        for identity, link in list(self._links.items()):
            if link.prefill == prefill:
                self._say(identity, message)

    def _say(self, identity: bytes, message: FromDecode) -> None:
        try:
            self._socket.send_multipart([identity, encode(message)], zmq.DONTWAIT)
        except zmq.ZMQError:  # gone, or it does not read what it is told
            link = self._links.pop(identity, None)
            if link is not None:
                logger.warning("lost the KV connection to prefill %s", link.prefill)
                self._fail_rooms(
                    lambda room: room.prefill == link.prefill, f"lost the KV connection to prefill {link.prefill}"
                )

    def _refuse(self, identity: bytes, reason: str) -> None:
        """Tell the peer to go away, forget its link and fail its rooms."""
        link = self._links.get(identity)
        logger.warning("refused a KV connection (prefill %s): %s", link.prefill if link else "unknown", reason)
        self._say(identity, Refused(reason=reason))
        if self._links.pop(identity, None) is not None and link is not None:
            self._fail_rooms(lambda room: room.prefill == link.prefill, f"prefill {link.prefill}: {reason}")

    def _fail_rooms(self, is_affected: Callable[[_Room], bool], reason: str) -> None:
        for room in list(self._rooms.values()):
            if is_affected(room):
                self._fail(room, reason)

    def _fail(self, room: _Room, reason: str) -> None:
        self._take(room.incoming.room, room)
        with room.lock:
            ends_now = room.incoming.fail()
        if ends_now:
            self._on_failed(room.incoming.room, reason)

    def _take(self, number: int, room: _Room | None = None) -> _Room | None:
        """Take a room out of the table, whichever thread; with ``room``, only if it is still that one."""
        with self._table_lock:
            found = self._rooms.get(number)
            return self._rooms.pop(number) if found is not None and (room is None or found is room) else None


def _came_over(link: bytes, room: _Room) -> bool:
    return room.link == link


def _check_indices(buffers: Sequence[torch.Tensor], indices: npt.NDArray[np.integer[Any]], what: str) -> None:
    held = min(buffer.shape[0] for buffer in buffers)
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= held):
        raise IndexError(f"{what} {int(indices.min())}..{int(indices.max())}; there are 0..{held - 1}")
