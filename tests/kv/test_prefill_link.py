"""One connection's bookkeeping on the prefill side: turns, credit and when it counts as dead. No sockets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import zmq

from flowprefill_sglang.kv.layout import Layout
from flowprefill_sglang.kv.messages import PROTOCOL_VERSION, Announce, Hello, Register
from flowprefill_sglang.kv.prefill_link import Link, Room, open_link
from flowprefill_sglang.kv.settings import KvSettings
from flowprefill_sglang.kv.transfer import OutgoingTransfer
from flowprefill_testing.kv_link_pair import HOST, LAYOUT, PAGE_BYTES

SETTINGS = KvSettings(handshake_timeout_s=10, stall_timeout_s=30)


def peer(host: str = HOST, layout: Layout = LAYOUT) -> Register:
    return Register(
        protocol=PROTOCOL_VERSION,
        session="s",
        host=host,
        control_port=1,
        link_port=2,
        max_chunk_bytes=1000,
        layout=layout,
    )


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as made:
        yield made


HELLO = Hello(protocol=PROTOCOL_VERSION, prefill="p", session="s", layout=LAYOUT)


@pytest.fixture
def link(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Link]:
    made = open_link(context, peer(), HELLO, SETTINGS, now=100.0)
    yield made
    made.close()


def ready_room(link: Link, number: int, pages: int) -> Room:
    announce = Announce(
        session="s", host=HOST, control_port=1, room=number, transfer=1, pages=pages, decode_prefix_tokens=0
    )
    outgoing = OutgoingTransfer(
        room=number, transfer=1, pages=pages, page_bytes=PAGE_BYTES, chunk_bytes=sum(PAGE_BYTES)
    )
    outgoing.add_pages(np.arange(pages, dtype=np.int32), first_page=0, is_last=True)
    room = Room(outgoing=outgoing, announce=announce, link=link)
    link.rooms[number] = link.ready[number] = room
    return room


def test_no_answer_to_the_handshake_is_overdue_in_time(link: Link) -> None:
    assert link.overdue(SETTINGS, 110.0) is None
    assert "did not answer the KV handshake" in (link.overdue(SETTINGS, 110.1) or "")


def test_silence_counts_only_while_something_is_due_and_from_when_it_became_due(link: Link) -> None:
    link.is_welcome = True
    link.credit.open(2)
    assert link.overdue(SETTINGS, 1000.0) is None
    room = ready_room(link, 1, pages=1)
    link.message_sent(room, is_end=False, now=1000.0)
    assert link.overdue(SETTINGS, 1030.0) is None
    assert "has taken no KV for 30" in (link.overdue(SETTINGS, 1030.1) or "")
    link.credit.allow(3)
    assert link.overdue(SETTINGS, 1030.1) is None
    link.message_sent(room, is_end=True, now=2000.0)  # decode owes the acknowledgement
    assert link.overdue(SETTINGS, 2030.1) is not None
    link.forget(1)
    assert link.overdue(SETTINGS, 2030.1) is None


def test_rooms_take_turns(link: Link) -> None:
    link.credit.open(9)
    long, short = ready_room(link, 1, pages=3), ready_room(link, 2, pages=1)
    order = []
    while link.ready:
        number, room = next(iter(link.ready.items()))
        order.append(number)
        link.message_sent(room, is_end=room.outgoing.next_span() is None, now=0.0)
    assert order[:4] == [1, 2, 1, 2]
    assert set(order[4:]) == {1}
    assert {long.outgoing.state, short.outgoing.state} == {"ended"}


def test_an_address_that_is_none_leaves_no_socket_behind(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with pytest.raises(zmq.ZMQError):
        open_link(context, peer(host="no such host"), HELLO, SETTINGS, now=0.0)
    context.term()  # would wait for a socket that is open
