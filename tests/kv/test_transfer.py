"""The life of a room on each side, under any order of events."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.errors import InternalError
from flowprefill_sglang.kv.layout import Span
from flowprefill_sglang.kv.messages import Chunk, End
from flowprefill_sglang.kv.transfer import (
    RECEIVING_TABLE,
    SENDING_TABLE,
    IncomingTransfer,
    LinkFault,
    OutgoingTransfer,
    PageIds,
    ReceiveCredit,
    Receiving,
    RoomFault,
    SendCredit,
    Sending,
)

PAGE_BYTES = (8, 8)
AUX_BYTES = 24


def outgoing(pages: int) -> OutgoingTransfer:
    return OutgoingTransfer(room=1, transfer=7, pages=pages, page_bytes=PAGE_BYTES, chunk_bytes=16)


def incoming(page_ids: list[int]) -> IncomingTransfer:
    return IncomingTransfer(
        room=1, transfer=7, page_ids=np.array(page_ids, np.int32), page_bytes=PAGE_BYTES, aux_bytes=AUX_BYTES
    )


def pages(*ids: int) -> PageIds:
    return np.array(ids, dtype=np.int32)


# ---- sending -----------------------------------------------------------------------------------------------------


def test_every_page_is_sent_once_then_the_end() -> None:
    transfer = outgoing(5)
    transfer.add_pages(pages(10, 11, 12), first_page=0, is_last=False)
    transfer.add_pages(pages(20, 21), first_page=3, is_last=True)
    sent = []
    while (due := transfer.next_span()) is not None:
        span, ids = due
        sent += [(span.first_page + i, b, int(n)) for i, n in enumerate(ids) for b in range(span.buffers)]
        assert len(ids) == span.pages
        transfer.span_sent()
    transfer.end_sent()
    assert not transfer.has_work
    transfer.accepted()
    assert transfer.state is Sending.DELIVERED
    assert {(page, number) for page, _, number in sent} == {(0, 10), (1, 11), (2, 12), (3, 20), (4, 21)}


def test_the_end_waits_for_the_last_pages() -> None:
    transfer = outgoing(2)
    transfer.add_pages(pages(1), first_page=0, is_last=False)
    while transfer.has_work:
        transfer.span_sent()
    assert transfer.state is Sending.STREAMING
    transfer.add_pages(pages(2), first_page=1, is_last=True)
    assert transfer.has_work


def test_a_room_without_pages_is_only_its_end() -> None:
    transfer = outgoing(0)
    transfer.add_pages(pages(), first_page=0, is_last=True)
    assert transfer.has_work
    assert transfer.next_span() is None


@pytest.mark.parametrize(("count", "is_last"), [(3, False), (3, True), (1, True)])
def test_a_different_number_of_pages_than_decode_reserved_is_a_fault(count: int, is_last: bool) -> None:
    with pytest.raises(RoomFault, match="decode has reserved 2"):
        outgoing(2).add_pages(pages(*range(count)), first_page=0, is_last=is_last)


def test_an_acknowledgement_before_the_end_is_a_fault() -> None:
    transfer = outgoing(1)
    transfer.add_pages(pages(1), first_page=0, is_last=True)
    with pytest.raises(RoomFault, match="still streaming"):
        transfer.accepted()


@given(st.lists(st.sampled_from(["pages", "last", "span", "end", "accept", "fail"]), max_size=14))
def test_sending_ends_once_whatever_happens(events: list[str]) -> None:
    transfer = outgoing(4)
    terminal: list[Sending] = []
    added = 0
    for event in events:
        try:
            if event in ("pages", "last"):
                transfer.add_pages(pages(added), first_page=added, is_last=event == "last")
                added += 1
            elif event == "span":
                if transfer.next_span() is not None:
                    transfer.span_sent()
            elif event == "end":
                if transfer.has_work and transfer.next_span() is None:
                    transfer.end_sent()
            elif event == "accept":
                transfer.accepted()
            else:
                transfer.fail()
        except RoomFault:
            transfer.fail()
        except InternalError:
            pass  # refused, and nothing changed: checked below
        if transfer.is_over:
            terminal.append(transfer.state)
            assert not transfer.has_work
    assert len(set(terminal)) <= 1, "a terminal state was left"


# ---- receiving ---------------------------------------------------------------------------------------------------


def chunk(sequence: int, first_page: int, count: int = 1, *, checksum: int = 5, buffers: int = 2) -> Chunk:
    return Chunk(room=1, transfer=7, sequence=sequence, span=Span(first_page, count, 0, buffers), checksum=checksum)


def end(sequence: int, *, checksum: int = 5) -> End:
    return End(room=1, transfer=7, sequence=sequence, checksum=checksum)


def test_a_whole_room_arrives() -> None:
    transfer = incoming([30, 10, 20])
    assert transfer.admit_chunk(chunk(0, 0, 2), payload_bytes=32, checksum=5).tolist() == [30, 10]
    assert transfer.admit_chunk(chunk(1, 2), payload_bytes=16, checksum=5).tolist() == [20]
    transfer.admit_end(end(2), payload_bytes=AUX_BYTES, checksum=5)
    assert transfer.state is Receiving.COMPLETE


@pytest.mark.parametrize(
    ("message", "payload_bytes", "checksum", "expected"),
    [
        (chunk(0, 0), 16, 5, "lost, repeated or swapped"),  # a duplicate
        (chunk(2, 1), 16, 5, "lost, repeated or swapped"),  # a gap
        (chunk(1, 1), 16, 6, "damaged"),
        (chunk(1, 1), 15, 5, "15 bytes where 16 belong"),
        (chunk(1, 1, 2), 32, 5, "beyond the room's 2 pages"),
        (chunk(1, 0), 16, 5, "page 1 of buffer 0 was due"),
        (chunk(1, 1, buffers=3), 24, 5, "no part of 2 buffers"),
        (end(1), AUX_BYTES, 5, "before all 2 pages"),
    ],
)
def test_what_does_not_belong_is_a_fault(
    message: Chunk | End, payload_bytes: int, checksum: int, expected: str
) -> None:
    transfer = incoming([4, 5])
    transfer.admit_chunk(chunk(0, 0), payload_bytes=16, checksum=5)
    admit = transfer.admit_end if isinstance(message, End) else transfer.admit_chunk
    with pytest.raises(RoomFault, match=expected):
        admit(message, payload_bytes=payload_bytes, checksum=checksum)


def test_metadata_of_the_wrong_size_is_a_fault() -> None:
    with pytest.raises(RoomFault, match="metadata"):
        incoming([]).admit_end(end(0), payload_bytes=AUX_BYTES - 1, checksum=5)


received_events = st.one_of(
    st.tuples(
        st.just("chunk"), st.integers(0, 4), st.integers(0, 3), st.integers(1, 3), st.booleans(), st.integers(-1, 1)
    ),
    st.tuples(st.just("end"), st.integers(0, 4), st.booleans()),
    st.tuples(st.just("fail")),
)


@given(st.lists(received_events, max_size=12))
def test_nothing_is_admitted_after_the_end_and_complete_means_every_page(events: list[tuple]) -> None:
    transfer = incoming([7, 3, 9])
    written: list[int] = []
    terminal: list[Receiving] = []
    for event in events:
        was_over = transfer.is_over
        try:
            if event[0] == "chunk":
                _, sequence, first_page, count, is_good, extra = event
                ids = transfer.admit_chunk(
                    chunk(sequence, first_page, count), payload_bytes=16 * count + extra, checksum=5 if is_good else 6
                )
                assert not was_over, "a write was admitted to a room that had ended"
                written += ids.tolist()
            elif event[0] == "end":
                transfer.admit_end(end(event[1]), payload_bytes=AUX_BYTES, checksum=5 if event[2] else 6)
                assert not was_over, "an end was admitted to a room that had ended"
            else:
                assert transfer.fail() == (not was_over)
        except (RoomFault, InternalError):
            transfer.fail()
        if transfer.is_over:
            terminal.append(transfer.state)
    assert len(set(terminal)) <= 1, "a terminal state was left"
    assert len(written) == len(set(written)), "a page was written twice"
    if transfer.state is Receiving.COMPLETE:
        assert written == [7, 3, 9]


# ---- tables and credit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [SENDING_TABLE, RECEIVING_TABLE])
def test_each_table_lists_every_state_and_each_state_can_fail_or_is_final(table: dict) -> None:
    for state, events in table.items():
        assert type(state)("failed") in table
        assert not events or "failed" in {str(target) for target in events.values()}
    assert set(table) == set(type(next(iter(table))))


@given(st.integers(1, 5), st.lists(st.sampled_from(["send", "receive", "credit", "stale"]), max_size=60))
def test_credit_is_never_negative_and_bounds_what_is_under_way(window: int, events: list[str]) -> None:
    sender, receiver = SendCredit(), ReceiveCredit(window)
    sender.open(receiver.total)
    in_network, in_memory = 0, 0
    for event in events:
        if event == "send" and sender.available:
            sender.take()
            in_network += 1
        elif event == "receive" and in_network:
            in_network, in_memory = in_network - 1, in_memory + 1
        elif event == "credit" and in_memory:
            receiver.finish()
            in_memory -= 1
            sender.allow(receiver.total)
        elif event == "stale":
            sender.allow(receiver.total)  # saying a total again does no harm
        assert 0 <= sender.available <= window
        assert in_network + in_memory <= window
        assert sender.in_flight == in_network + in_memory


@pytest.mark.parametrize("total", [1, 4])
def test_credit_that_cannot_be_is_a_fault_of_the_link(total: int) -> None:
    credit = SendCredit()
    credit.open(2)
    credit.take()
    with pytest.raises(LinkFault, match=f"credit for {total} chunks"):
        credit.allow(total)


def test_sending_without_credit_is_our_bug() -> None:
    with pytest.raises(InternalError):
        SendCredit().take()
