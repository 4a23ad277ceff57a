"""The prefill side's thread: gathers pages, sends them, and learns what became of them.

One thread a rank owns all of this but ``_cancelled``: a DEALER a decode session, the staging buffers, the rooms. The
scheduler's and the control socket's threads reach it through a mailbox; a credit, an acknowledgement or a broken
connection wakes it too. Rooms of a link take turns chunk by chunk, so that a short request's pages do not queue behind
a long one's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
import torch
import zmq

from flowprefill_sglang import __version__
from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.kernels.kv_pages import block_bytes, gather_pages
from flowprefill_sglang.kv.layout import Layout, Span, largest_chunk_bytes, layout_mismatch
from flowprefill_sglang.kv.link_thread import LinkThread
from flowprefill_sglang.kv.links import has_lost_link
from flowprefill_sglang.kv.mailbox import Mailbox
from flowprefill_sglang.kv.messages import (
    SPOKEN,
    Accepted,
    Announce,
    Chunk,
    Credit,
    End,
    FromDecode,
    Hello,
    Refused,
    Register,
    Rejected,
    Welcome,
    checksum,
    decode_from_decode,
    encode,
)
from flowprefill_sglang.kv.prefill_link import Link, Room, open_link
from flowprefill_sglang.kv.settings import KvSettings
from flowprefill_sglang.kv.staging import StagingPool
from flowprefill_sglang.kv.transfer import OutgoingTransfer, PageIds, RoomFault
from flowprefill_sglang.wire.versions import Side, newest_common, stated, why_not

logger = logging.getLogger(__name__)

_TICK_MS: Final = 500
_STAGING_RETRY_MS: Final = 1
_MAX_KNOWN_PEERS: Final = 4096


class Waitable(Protocol):
    """A ``torch.cuda.Event``, or anything like it."""

    def synchronize(self) -> None:
        """Return when what was recorded has happened."""


class PrefillLinks:
    """All KV connections of one prefill rank.

    ``on_delivered(room)`` and ``on_failed(room, reason, announce)`` are called once a room, by the thread of this
    object; exactly one of them for every announced room.
    """

    def __init__(
        self,
        *,
        name: str,
        layout: Layout,
        buffers: Sequence[torch.Tensor],
        aux_buffers: Sequence[torch.Tensor],
        settings: KvSettings,
        on_delivered: Callable[[int], None],
        on_failed: Callable[[int, str, Announce], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._layout = layout
        self._buffers = buffers
        self._aux_buffers = aux_buffers
        self._aux_bytes = block_bytes(aux_buffers, 1)
        self._settings = settings
        self._on_delivered = on_delivered
        self._on_failed = on_failed
        self._clock = clock
        self._staging = StagingPool(
            buffers=settings.staging_chunks,
            size_bytes=largest_chunk_bytes(layout.page_bytes, settings.chunk_bytes),
            pin=any(buffer.is_cuda for buffer in buffers),
        )
        self._context = zmq.Context()
        # A link takes three: itself, and both ends of its monitor. ZeroMQ's default of 1,023 is 341 decode ranks.
        self._context.set(zmq.MAX_SOCKETS, 3 * _MAX_KNOWN_PEERS)
        self._peers: dict[str, Register] = {}
        self._links: dict[str, Link] = {}
        self._rooms: dict[int, Room] = {}
        self._cancelled: set[int] = set()  # added to by any thread, before a cancelled room's pages are given back
        self._mailbox = Mailbox()
        self._is_closing = False
        self._thread = LinkThread("kv-prefill-links", self._run, lambda: self._mailbox.post(self._end_loop))
        self._thread.start()

    # ---- from any thread --------------------------------------------------------------------------------------

    def register(self, peer: Register) -> None:
        """A decode rank introduced itself: connect to it, so that each side notices the other's death from now on."""
        self._mailbox.post(lambda: self._register(peer))

    def announce(self, announce: Announce) -> None:
        """A decode rank reserved pages for a room."""
        self._mailbox.post(lambda: self._announce(announce))

    def send(
        self, room: int, page_ids: PageIds, *, first_page: int, aux_index: int | None, after: Sequence[Waitable] = ()
    ) -> None:
        """Send pages of an announced room, which start at its page ``first_page``; ``aux_index`` comes with the last.

        Nothing happens for a room that has ended. The pages must stay as they are until the room ends or is cancelled.
        """
        self._mailbox.post(lambda: self._send(room, page_ids, first_page, aux_index, after))

    def cancel(self, room: int, reason: str) -> None:
        """End a room. Once this returns, bytes read from its pages are not sent any more, so they may be given back."""
        self._cancelled.add(room)
        self._mailbox.post(lambda: self._cancel(room, reason))

    def close(self) -> None:
        """Fail what is in flight, close all connections and end the thread."""
        self._mailbox.post(self._begin_close)
        self._thread.wait()
        self._context.destroy(linger=0)
        self._mailbox.close()

    # ---- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_closing:
            try:
                self._turn()
            except Exception as error:  # the thread's edge: whatever happens, nobody may be left waiting
                logger.exception("the KV sender failed; its connections are reset")
                for link in list(self._links.values()):
                    self._drop(link, f"internal error of the prefill side: {type(error).__name__}: {error}")

    def _turn(self) -> None:
        is_starved, has_sent = False, False
        for link in list(self._links.values()):
            outcome = self._send_one(link)
            has_sent |= outcome is True
            is_starved |= outcome is None
        poller = zmq.Poller()
        poller.register(self._mailbox.fileno(), zmq.POLLIN)
        for link in self._links.values():
            poller.register(link.socket, zmq.POLLIN)
            poller.register(link.monitor, zmq.POLLIN)
        events = dict(poller.poll(0 if has_sent else _STAGING_RETRY_MS if is_starved else _TICK_MS))
        self._mailbox.run_all()
        for link in list(self._links.values()):
            if link.socket in events:
                self._receive(link)
            if link.monitor in events and has_lost_link(link.monitor):
                self._drop(link, f"lost the connection to {link.name}")
            reason = link.overdue(self._settings, self._clock())
            if reason is not None:
                self._drop(link, reason)

    def _register(self, peer: Register) -> None:
        known = self._peers.pop(peer.session, None)
        self._peers[peer.session] = peer
        if len(self._peers) > _MAX_KNOWN_PEERS:
            oldest = next((session for session in self._peers if session not in self._links), peer.session)
            del self._peers[oldest]  # without a link, it introduces itself again before its next room
            if oldest == peer.session:
                logger.error("decode %s:%s cannot be served: too many are connected", peer.host, peer.control_port)
                return
        refusal = self._refusal(peer)
        if refusal is not None and known != peer:
            logger.error("decode %s:%s cannot be served: %s", peer.host, peer.control_port, refusal)
        elif refusal is None and peer.session not in self._links:
            self._connect(peer)

    def _refusal(self, peer: Register) -> str | None:
        spoken = stated(peer.protocol, peer.oldest_protocol)
        if newest_common(SPOKEN, spoken) is None:
            prefill = Side(what="prefill", software=__version__, versions=SPOKEN)
            decode = Side(what="decode", software=peer.version, versions=spoken)
            return why_not("KV", prefill, decode)
        if peer.max_chunk_bytes < max(self._layout.page_bytes):
            return f"decode takes messages of at most {peer.max_chunk_bytes} bytes, less than one page of a buffer"
        return layout_mismatch(prefill=self._layout, decode=peer.layout)

    def _connect(self, peer: Register) -> Link | str:
        """A new link, or why there is none."""
        protocol = newest_common(SPOKEN, stated(peer.protocol, peer.oldest_protocol))
        assert protocol is not None  # or it was refused
        hello = Hello(
            protocol=protocol, prefill=self._name, session=peer.session, layout=self._layout, version=__version__
        )
        try:
            link = open_link(self._context, peer, hello, self._settings, self._clock())
        except zmq.ZMQError as error:
            reason = f"no connection to decode {peer.host}:{peer.link_port} can be made: {error}"
            logger.error("%s", reason)
            return reason
        self._links[peer.session] = link
        return link

    def _announce(self, announce: Announce) -> None:
        peer = self._peers.get(announce.session)
        if peer is None:
            self._on_failed(announce.room, "the decode instance has not introduced itself to this prefill", announce)
            return
        refusal = self._refusal(peer)
        if refusal is not None:
            self._on_failed(announce.room, refusal, announce)
            return
        if announce.room in self._rooms:
            self._fail(self._rooms[announce.room], "decode announced the same room again")
        link = self._links.get(announce.session) or self._connect(peer)
        if isinstance(link, str):
            self._on_failed(announce.room, link, announce)
            return
        outgoing = OutgoingTransfer(
            room=announce.room,
            transfer=announce.transfer,
            pages=announce.pages,
            page_bytes=self._layout.page_bytes,
            chunk_bytes=min(self._settings.chunk_bytes, peer.max_chunk_bytes),
        )
        room = Room(outgoing=outgoing, announce=announce, link=link)
        self._rooms[announce.room] = link.rooms[announce.room] = room

    def _send(
        self, number: int, page_ids: PageIds, first_page: int, aux_index: int | None, after: Sequence[Waitable]
    ) -> None:
        room = self._rooms.get(number)
        if room is None:
            return
        for event in after:
            event.synchronize()
        try:
            room.outgoing.add_pages(page_ids, first_page=first_page, is_last=aux_index is not None)
        except RoomFault as fault:
            self._fail(room, str(fault))
            return
        room.aux_index = aux_index
        if room.outgoing.has_work:
            room.link.ready[number] = room

    def _cancel(self, number: int, reason: str) -> None:
        self._cancelled.discard(number)
        room = self._rooms.get(number)
        if room is not None:
            self._fail(room, reason)

    def _begin_close(self) -> None:
        for link in list(self._links.values()):
            self._drop(link, "the prefill side is shutting down")
        self._end_loop()

    def _end_loop(self) -> None:
        self._is_closing = True

    # ---- sending ----------------------------------------------------------------------------------------------

    def _send_one(self, link: Link) -> bool | None:
        """Send one message of the next room that can send: True. False: nothing can be sent before something comes in.
        None: only a staging buffer is lacking."""
        if not link.is_welcome:
            return False
        for number in list(link.ready):
            room = link.ready[number]
            due = room.outgoing.next_span()
            if due is not None and not link.credit.available:
                continue
            size_bytes = self._aux_bytes if due is None else due[0].size_bytes(self._layout.page_bytes)
            staging = self._staging.try_take() if due is not None else None
            if due is not None and staging is None:
                return None
            block = torch.empty(size_bytes, dtype=torch.uint8) if staging is None else staging.block(size_bytes)
            header = self._fill(room, due, block)
            if number in self._cancelled:
                # Its pages may have been given back, and written to, while they were read. The cancellation itself is
                # in the mailbox.
                del link.ready[number]
                continue
            try:
                tracker = link.socket.send_multipart(
                    [header, _bytes_of(block)], copy=False, track=True, flags=zmq.DONTWAIT
                )
            except zmq.Again:
                self._drop(link, f"lost the connection to {link.name}")
                return True
            if staging is not None:
                staging.lend(tracker)
            link.message_sent(room, is_end=due is None, now=self._clock())
            return True
        return False

    def _fill(self, room: Room, due: tuple[Span, PageIds] | None, block: torch.Tensor) -> bytes:
        outgoing = room.outgoing
        where = {"transfer": outgoing.transfer, "sequence": outgoing.sequence}
        if due is None:
            gather_pages(self._aux_buffers, np.array([room.aux_index]), block)
            return encode(End(room=outgoing.room, checksum=checksum(_bytes_of(block), **where), **where))
        span, page_ids = due
        gather_pages(self._buffers[span.first_buffer : span.first_buffer + span.buffers], page_ids, block)
        digest = checksum(_bytes_of(block), **where)
        return encode(Chunk(room=outgoing.room, span=span, checksum=digest, **where))

    # ---- what comes back --------------------------------------------------------------------------------------

    def _receive(self, link: Link) -> None:
        while link.peer.session in self._links:
            try:
                frames = link.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            link.heard_at = self._clock()
            try:
                self._handle(link, decode_from_decode(frames))
            except PeerFault as fault:
                self._drop(link, f"{link.name} broke the protocol: {fault}")

    def _handle(self, link: Link, message: FromDecode) -> None:
        match message:
            case Welcome():
                link.credit.open(message.credit_chunks)
                link.is_welcome = True
            case Credit():
                link.credit.allow(message.chunks)
            case Refused():
                self._drop(link, f"{link.name} refused: {message.reason}")
            case Accepted() | Rejected():
                room = link.rooms.get(message.room)
                if room is None or room.outgoing.transfer != message.transfer:
                    return  # about a room that has ended on this side
                if isinstance(message, Rejected):
                    self._fail(room, message.reason)
                    return
                try:
                    room.outgoing.accepted()
                except RoomFault as fault:
                    self._fail(room, str(fault))
                    return
                self._forget(room)
                self._on_delivered(message.room)

    # ---- endings ----------------------------------------------------------------------------------------------

    def _fail(self, room: Room, reason: str) -> None:
        room.outgoing.fail()
        self._forget(room)
        self._on_failed(room.outgoing.room, reason, room.announce)

    def _forget(self, room: Room) -> None:
        self._rooms.pop(room.outgoing.room, None)
        room.link.forget(room.outgoing.room)

    def _drop(self, link: Link, reason: str) -> None:
        """Close a connection and fail every room on it. The peer's next room opens a new one."""
        if self._links.pop(link.peer.session, None) is None:
            return
        logger.log(logging.ERROR if link.rooms else logging.INFO, "%s (%d rooms affected)", reason, len(link.rooms))
        link.close()
        for room in list(link.rooms.values()):
            self._fail(room, reason)


def _bytes_of(block: torch.Tensor) -> memoryview:
    return memoryview(block.numpy())  # type: ignore[arg-type]  # NumPy's stubs do not call arrays buffers before 3.12
