"""The life of one transfer on each side, and of the credit on a link. Sans-IO: no socket, clock or lock in here.

A *room* is SGLang's number for one request's transfer; a *transfer* tells two uses of a room number apart. Each side
keeps one object a room. An event that its table does not list is a bug of ours and raises ``InternalError``; what a
peer does wrong raises ``RoomFault``, which ends that room, or ``LinkFault``, which ends the link and every room on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from flowprefill_sglang.errors import InternalError, PeerFault
from flowprefill_sglang.kv.layout import Coverage, Span, plan_spans
from flowprefill_sglang.kv.messages import Chunk, End

PageIds = npt.NDArray[np.int32]


class RoomFault(PeerFault):
    """The peer broke the rules of one room; ``str()`` is the reason that both sides report."""

    code = "kv_room_fault"


class LinkFault(PeerFault):
    """The peer broke the rules of the link."""

    code = "kv_link_fault"


# ---- prefill side ------------------------------------------------------------------------------------------------


class Sending(StrEnum):
    """States of an ``OutgoingTransfer``."""

    OPEN = "open"
    """Decode has reserved pages; nothing sent."""
    STREAMING = "streaming"
    """Some pages were handed over by the scheduler."""
    ENDED = "ended"
    """Everything was sent; decode has not said yet that it arrived."""
    DELIVERED = "delivered"
    FAILED = "failed"


class SendEvent(StrEnum):
    """What happens to an ``OutgoingTransfer``."""

    PAGES = "pages"
    END = "end"
    ACCEPTED = "accepted"
    FAIL = "fail"


SENDING_TABLE: Final[Mapping[Sending, Mapping[SendEvent, Sending]]] = {
    Sending.OPEN: {SendEvent.PAGES: Sending.STREAMING, SendEvent.FAIL: Sending.FAILED},
    Sending.STREAMING: {
        SendEvent.PAGES: Sending.STREAMING,
        SendEvent.END: Sending.ENDED,
        SendEvent.FAIL: Sending.FAILED,
    },
    Sending.ENDED: {SendEvent.ACCEPTED: Sending.DELIVERED, SendEvent.FAIL: Sending.FAILED},
    Sending.DELIVERED: {},
    Sending.FAILED: {},
}


class OutgoingTransfer:
    """One room on the prefill side: pages in, spans out, in order."""

    def __init__(self, *, room: int, transfer: int, pages: int, page_bytes: Sequence[int], chunk_bytes: int) -> None:
        self.room = room
        self.transfer = transfer
        self.pages = pages
        self.state = Sending.OPEN
        self.sequence = 0
        """Of the next message."""
        self._page_bytes = page_bytes
        self._chunk_bytes = chunk_bytes
        self._added_pages = 0
        self._is_last_added = False
        self._spans: deque[tuple[Span, PageIds]] = deque()

    @property
    def is_over(self) -> bool:
        """Whether the room has come to its one end."""
        return not SENDING_TABLE[self.state]

    @property
    def has_work(self) -> bool:
        """Whether a span or the end can be sent now."""
        return self.state is Sending.STREAMING and (bool(self._spans) or self._is_last_added)

    def add_pages(self, page_ids: PageIds, *, first_page: int, is_last: bool) -> None:
        """The scheduler hands over the room's pages from ``first_page`` on. Raises RoomFault when the two sides count
        the room's pages differently."""
        if first_page != self._added_pages or self._is_last_added:
            raise InternalError(f"room {self.room}: page {first_page} added after {self._added_pages} pages")
        self._added_pages += len(page_ids)
        if self._added_pages > self.pages or (is_last and self._added_pages != self.pages):
            raise RoomFault(f"prefill has {self._added_pages} pages to send, decode has reserved {self.pages}")
        self._move(SendEvent.PAGES)
        self._is_last_added = is_last
        for span in plan_spans(
            self._page_bytes, first_page=first_page, pages=len(page_ids), chunk_bytes=self._chunk_bytes
        ):
            offset = span.first_page - first_page
            self._spans.append((span, page_ids[offset : offset + span.pages]))

    def next_span(self) -> tuple[Span, PageIds] | None:
        """The span to send now and its page numbers in this side's pool; None when it is the end's turn."""
        if not self.has_work:
            raise InternalError(f"room {self.room} has nothing to send")
        return self._spans[0] if self._spans else None

    def span_sent(self) -> None:
        """The span of ``next_span`` is on its way."""
        self._spans.popleft()
        self.sequence += 1

    def end_sent(self) -> None:
        """The end is on its way."""
        self._move(SendEvent.END)
        self.sequence += 1

    def accepted(self) -> None:
        """Decode has everything. Raises RoomFault when it cannot have."""
        if self.state is not Sending.ENDED:
            raise RoomFault(f"decode acknowledged a room that is still {self.state}")
        self._move(SendEvent.ACCEPTED)

    def fail(self) -> bool:
        """End the room; False when it had ended before."""
        if self.is_over:
            return False
        self._move(SendEvent.FAIL)
        self._spans.clear()
        return True

    def _move(self, event: SendEvent) -> None:
        try:
            self.state = SENDING_TABLE[self.state][event]
        except KeyError:
            raise InternalError(f"room {self.room}: {event} while {self.state}") from None


# ---- decode side -------------------------------------------------------------------------------------------------


class Receiving(StrEnum):
    """States of an ``IncomingTransfer``."""

    WAITING = "waiting"
    """Pages are reserved; nothing has arrived."""
    ARRIVING = "arriving"
    COMPLETE = "complete"
    FAILED = "failed"


class ReceiveEvent(StrEnum):
    """What happens to an ``IncomingTransfer``."""

    CHUNK = "chunk"
    END = "end"
    FAIL = "fail"


RECEIVING_TABLE: Final[Mapping[Receiving, Mapping[ReceiveEvent, Receiving]]] = {
    Receiving.WAITING: {
        ReceiveEvent.CHUNK: Receiving.ARRIVING,
        ReceiveEvent.END: Receiving.COMPLETE,  # nothing to send: decode held the whole prefix
        ReceiveEvent.FAIL: Receiving.FAILED,
    },
    Receiving.ARRIVING: {
        ReceiveEvent.CHUNK: Receiving.ARRIVING,
        ReceiveEvent.END: Receiving.COMPLETE,
        ReceiveEvent.FAIL: Receiving.FAILED,
    },
    Receiving.COMPLETE: {},
    Receiving.FAILED: {},
}


class IncomingTransfer:
    """One room on the decode side: decides whether a payload may be written, and where.

    A payload may be written only between ``admit_chunk``/``admit_end`` returning and the next call on this object; the
    shell holds the room's lock over both, which is what keeps writes out of pages that were given back.
    """

    def __init__(
        self, *, room: int, transfer: int, page_ids: PageIds, page_bytes: Sequence[int], aux_bytes: int
    ) -> None:
        self.room = room
        self.transfer = transfer
        self.page_ids = page_ids
        self.state = Receiving.WAITING
        self._page_bytes = page_bytes
        self._aux_bytes = aux_bytes
        self._coverage = Coverage(pages=len(page_ids), buffers=len(page_bytes))
        self._sequence = 0

    @property
    def is_over(self) -> bool:
        """Whether the room has come to its one end; nothing is written from then on."""
        return not RECEIVING_TABLE[self.state]

    def admit_chunk(self, chunk: Chunk, *, payload_bytes: int, checksum: int) -> PageIds:
        """The page numbers of this side's pool that the payload belongs to. Raises RoomFault."""
        self._check_next(chunk, checksum)
        problem = self._coverage.try_add(chunk.span)
        if problem is not None:
            raise RoomFault(f"message {chunk.sequence}: {problem}")
        expected = chunk.span.size_bytes(self._page_bytes)
        if payload_bytes != expected:
            raise RoomFault(f"message {chunk.sequence}: {payload_bytes} bytes where {expected} belong")
        self._move(ReceiveEvent.CHUNK)
        return self.page_ids[chunk.span.first_page : chunk.span.first_page + chunk.span.pages]

    def admit_end(self, end: End, *, payload_bytes: int, checksum: int) -> None:
        """The room is complete once the payload (the metadata) has been written. Raises RoomFault."""
        self._check_next(end, checksum)
        if not self._coverage.is_complete:
            raise RoomFault(f"message {end.sequence}: the end came before all {len(self.page_ids)} pages")
        if payload_bytes != self._aux_bytes:
            raise RoomFault(f"message {end.sequence}: {payload_bytes} bytes of metadata where {self._aux_bytes} belong")
        self._move(ReceiveEvent.END)

    def fail(self) -> bool:
        """End the room; False when it had ended before."""
        if self.is_over:
            return False
        self._move(ReceiveEvent.FAIL)
        return True

    def _check_next(self, message: Chunk | End, checksum: int) -> None:
        if message.sequence != self._sequence:
            raise RoomFault(
                f"message {message.sequence} came where {self._sequence} was due: lost, repeated or swapped"
            )
        if message.checksum != checksum:
            raise RoomFault(f"message {message.sequence} was damaged on its way: its checksum does not match")
        self._sequence += 1

    def _move(self, event: ReceiveEvent) -> None:
        try:
            self.state = RECEIVING_TABLE[self.state][event]
        except KeyError:
            raise InternalError(f"room {self.room}: {event} while {self.state}") from None


# ---- credit ------------------------------------------------------------------------------------------------------


class SendCredit:
    """The sender's side of a link's credit, in chunks. Metadata (``End``) is small and needs none."""

    def __init__(self) -> None:
        self._allowed = 0
        self._window: int | None = None
        self.sent = 0

    @property
    def available(self) -> int:
        """Chunks that may be sent now; never negative."""
        return self._allowed - self.sent

    @property
    def in_flight(self) -> int:
        """Chunks sent for which no credit has come back."""
        return 0 if self._window is None else self.sent + self._window - self._allowed

    def open(self, window_chunks: int) -> None:
        """The peer welcomed the link. Raises LinkFault."""
        if self._window is not None or window_chunks < 1:
            raise LinkFault(f"a welcome with credit for {window_chunks} chunks, out of turn or empty")
        self._window = self._allowed = window_chunks

    def allow(self, total_chunks: int) -> None:
        """The peer raised the running total. Raises LinkFault for a total that it cannot have reached."""
        if self._window is None or not self._allowed <= total_chunks <= self.sent + self._window:
            raise LinkFault(f"credit for {total_chunks} chunks after {self.sent} were sent and {self._allowed} allowed")
        self._allowed = total_chunks

    def take(self) -> None:
        """A chunk goes out."""
        if self.available < 1:
            raise InternalError("a chunk was sent without credit")
        self.sent += 1


class ReceiveCredit:
    """The receiver's side of a link's credit, in chunks.

    It does not police the sender: chunks that came without credit wait unread in the socket, whose own limit on waiting
    messages then stops the connection.
    """

    def __init__(self, window_chunks: int) -> None:
        self.total = window_chunks
        """The running total to tell the peer."""

    def finish(self) -> None:
        """A chunk's memory is free again."""
        self.total += 1
