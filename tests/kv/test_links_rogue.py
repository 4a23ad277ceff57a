"""Links whose other side lies or breaks the rules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flowprefill_sglang.kv.layout import Span
from flowprefill_sglang.kv.messages import (
    MAX_HEADER_BYTES,
    Accepted,
    Announce,
    Chunk,
    Credit,
    End,
    FromDecode,
    Refused,
    Rejected,
    Welcome,
    checksum,
    encode,
)
from flowprefill_sglang.kv.settings import KvSettings
from flowprefill_testing.kv_link_pair import (
    LAYOUT,
    PAGE_BYTES,
    SMALL,
    Decode,
    Prefill,
    wait_until,
)
from flowprefill_testing.kv_rogues import RogueDecode, RoguePrefill

# ---- a prefill side that breaks the rules ----------------------------------------------------------------------------


@pytest.fixture
def rogue(decode: Decode) -> Iterator[RoguePrefill]:
    side = RoguePrefill(decode)
    yield side
    side.close()


ROW = sum(PAGE_BYTES)


def a_chunk(announce: Announce, payload: bytes, **changes: object) -> Chunk:
    fields = {"room": announce.room, "transfer": announce.transfer, "sequence": 0, "span": Span(0, 1, 0, 3)} | changes
    digest = checksum(memoryview(payload), transfer=fields["transfer"], sequence=fields["sequence"])
    return Chunk(**({"checksum": digest} | fields))


@pytest.mark.parametrize(
    ("changes", "size", "expected"),
    [
        ({"checksum": 1}, ROW, "damaged"),
        ({}, ROW - 1, "bytes where"),
        ({}, ROW + 1, "bytes where"),
        ({"sequence": 1}, ROW, "lost, repeated or swapped"),
        ({"span": Span(1, 1, 0, 3)}, ROW, "was due"),
        ({"span": Span(0, 9, 0, 3)}, 9 * ROW, "beyond"),
        ({"span": Span(0, 1, 0, 4)}, ROW, "no part"),
        ({"span": Span(-1, 1, 0, 3)}, ROW, "was due"),
        ({"span": Span(0, -1, 0, 3)}, ROW, "no part"),
    ],
)
def test_a_bad_chunk_fails_the_room_on_both_sides_and_writes_nothing(
    decode: Decode, rogue: RoguePrefill, changes: dict[str, object], size: int, expected: str
) -> None:
    rogue.connect()
    announce = decode.open(1, [4, 5])
    payload = b"x" * size
    rogue.send(a_chunk(announce, payload, **changes), payload)
    answer = rogue.receive()
    assert isinstance(answer, Rejected)
    assert expected in answer.reason
    wait_until(lambda: 1 in decode.failed, "the failure")
    assert expected in decode.failed[1]
    assert not any(decode.pool.copy())
    assert rogue.receive() == Credit(chunks=SMALL.window_chunks + 1)  # the link goes on


def test_a_repeated_chunk_fails_the_room(decode: Decode, rogue: RoguePrefill) -> None:
    rogue.connect()
    announce = decode.open(1, [4, 5])
    payload = b"x" * ROW
    for _ in range(2):
        rogue.send(a_chunk(announce, payload), payload)
    assert isinstance(rogue.receive(), Credit)
    answer = rogue.receive()
    assert isinstance(answer, Rejected)
    assert "repeated" in answer.reason


def test_a_late_chunk_of_an_earlier_transfer_leaves_the_new_one_alone(decode: Decode, rogue: RoguePrefill) -> None:
    rogue.connect()
    old = decode.open(1, [4])
    decode.links.close(1, "aborted")
    assert isinstance(rogue.receive(), Rejected)
    new = decode.open(1, [5])
    payload = b"x" * ROW
    rogue.send(a_chunk(old, payload), payload)
    assert rogue.receive() == Rejected(room=1, transfer=old.transfer, reason="decode has no such room any more")
    assert isinstance(rogue.receive(), Credit)
    rogue.send(a_chunk(new, payload), payload)
    assert isinstance(rogue.receive(), Credit)
    aux = bytes(sum(LAYOUT.aux_bytes))
    digest = checksum(memoryview(aux), transfer=new.transfer, sequence=1)
    rogue.send(End(room=1, transfer=new.transfer, sequence=1, checksum=digest), aux)
    assert rogue.receive() == Accepted(room=1, transfer=new.transfer)
    assert decode.complete == [1]
    assert not any(decode.pool.pages([4]))
    assert decode.pool.pages([5]) == payload


def test_an_unknown_room_is_rejected(decode: Decode, rogue: RoguePrefill) -> None:
    rogue.connect()
    payload = b"x" * ROW
    announce = Announce(session="", host="", control_port=0, room=99, transfer=1, pages=1, decode_prefix_tokens=0)
    rogue.send(a_chunk(announce, payload), payload)
    assert isinstance(rogue.receive(), Rejected)
    assert decode.links.rejected_messages == 1


def test_a_room_of_another_prefill_is_out_of_reach(decode: Decode, rogue: RoguePrefill) -> None:
    rogue.connect()
    announce = decode.open(1, [4], prefill="prefill:2")
    payload = b"x" * ROW
    rogue.send(a_chunk(announce, payload), payload)
    assert isinstance(rogue.receive(), Rejected)
    assert not any(decode.pool.copy())
    assert 1 not in decode.failed


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"junk"],
        [b"\x81\xa4type\xa5chunk", b"x"],
        [encode(Credit(chunks=1))],
        [encode(End(room=1, transfer=1, sequence=0, checksum=0))],
        [encode(End(room=1, transfer=1, sequence=0, checksum=0)), b"", b""],
        [bytes(MAX_HEADER_BYTES + 1)],
    ],
)
def test_frames_that_are_no_message_end_the_link_with_its_rooms(
    decode: Decode, rogue: RoguePrefill, frames: list[bytes]
) -> None:
    rogue.connect()
    decode.open(1, [4])
    rogue.send(*frames)
    assert isinstance(rogue.receive(), Refused)
    wait_until(lambda: 1 in decode.failed, "the failure")
    honest = RoguePrefill(decode, name="prefill:2")  # decode is alive
    honest.connect()
    honest.close()


def test_nothing_is_read_before_the_handshake(decode: Decode, rogue: RoguePrefill) -> None:
    announce = decode.open(1, [4])
    payload = b"x" * ROW
    rogue.send(a_chunk(announce, payload), payload)
    answer = rogue.receive()
    assert isinstance(answer, Refused)
    assert "before the handshake" in answer.reason
    assert not any(decode.pool.copy())
    assert 1 not in decode.failed


def test_a_message_over_the_limit_loses_its_connection(decode: Decode, rogue: RoguePrefill) -> None:
    rogue.connect()
    announce = decode.open(1, [4])
    payload = bytes(decode.links.max_chunk_bytes + 100_000)
    rogue.send(a_chunk(announce, payload), payload)
    wait_until(lambda: 1 in decode.failed, "the failure", timeout_s=5)
    assert "lost the KV connection" in decode.failed[1]


# ---- a decode side that breaks the rules -----------------------------------------------------------------------------


@pytest.fixture
def rogue_decode() -> Iterator[RogueDecode]:
    side = RogueDecode()
    yield side
    side.close()


def start_room(prefill: Prefill, decode: Decode, rogue: RogueDecode, pages: int = 3) -> Announce:
    prefill.links.register(decode.registration(link_port=rogue.port))
    announce = decode.open(1, list(range(pages)))
    prefill.links.announce(announce)
    prefill.send(1, list(range(pages)))
    assert len(rogue.receive()) == 1  # hello
    return announce


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"junk", "no message of the KV protocol"),
        (Credit(chunks=5), "credit for 5 chunks"),
        (Welcome(credit_chunks=0), "out of turn or empty"),
        (Refused(reason="no thanks"), "refused: no thanks"),
    ],
)
def test_a_bad_answer_to_the_handshake_fails_the_room(
    prefill: Prefill, decode: Decode, rogue_decode: RogueDecode, answer: FromDecode | bytes, expected: str
) -> None:
    start_room(prefill, decode, rogue_decode)
    rogue_decode.send(answer)
    wait_until(lambda: 1 in prefill.failed, "the failure")
    assert expected in prefill.failed[1]


def test_no_chunk_is_sent_without_credit(prefill: Prefill, decode: Decode, rogue_decode: RogueDecode) -> None:
    start_room(prefill, decode, rogue_decode, pages=12)
    rogue_decode.send(Welcome(credit_chunks=1))
    assert len(rogue_decode.receive()) == 2
    assert rogue_decode.is_quiet()
    rogue_decode.send(Credit(chunks=2))
    assert len(rogue_decode.receive()) == 2


def test_an_acknowledgement_before_the_end_fails_the_room(
    prefill: Prefill, decode: Decode, rogue_decode: RogueDecode
) -> None:
    announce = start_room(prefill, decode, rogue_decode, pages=12)
    rogue_decode.send(Welcome(credit_chunks=1))
    rogue_decode.receive()
    rogue_decode.send(Accepted(room=1, transfer=announce.transfer))
    wait_until(lambda: 1 in prefill.failed, "the failure")
    assert "still streaming" in prefill.failed[1]
    assert prefill.delivered == []


@pytest.mark.parametrize("is_welcome", [True, False])
def test_a_silent_decode_fails_the_room_in_time(decode: Decode, rogue_decode: RogueDecode, is_welcome: bool) -> None:
    side = Prefill(KvSettings(chunk_bytes=200, handshake_timeout_s=0.2, stall_timeout_s=0.2))
    start_room(side, decode, rogue_decode)
    if is_welcome:
        rogue_decode.send(Welcome(credit_chunks=1))
    wait_until(lambda: 1 in side.failed, "the failure", timeout_s=5)
    assert ("has taken no KV" if is_welcome else "did not answer the KV handshake") in side.failed[1]
    side.links.close()
