"""Messages on the wire: round trips, recorded bytes, and bytes that are none."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.kv import messages
from flowprefill_sglang.kv.layout import Layout, Span
from flowprefill_sglang.kv.messages import (
    CONTROL_TAG,
    MAX_HEADER_BYTES,
    Accepted,
    Announce,
    Chunk,
    Credit,
    End,
    Hello,
    MalformedKvMessage,
    Refused,
    Register,
    Rejected,
    Welcome,
    decode_control,
    decode_from_decode,
    decode_from_prefill,
    encode,
)

LAYOUT = Layout(
    page_tokens=1,
    dtype="float32",
    kv_layout=None,
    page_bytes=(4, 4),
    layer_ids=(),
    aux_bytes=(8,),
    attn_tp_size=1,
    attn_tp_rank=0,
)
CONTROL = [
    Register(protocol=1, session="s", host="::1", control_port=1, link_port=2, max_chunk_bytes=3, layout=LAYOUT),
    Announce(session="s", host="h", control_port=1, room=2**63, transfer=2, pages=3, decode_prefix_tokens=4),
]
FROM_PREFILL = [
    Hello(protocol=1, prefill="p", session="s", layout=LAYOUT),
    Chunk(room=2**63, transfer=1, sequence=2, span=Span(3, 4, 5, 6), checksum=2**64 - 1),
    End(room=1, transfer=2, sequence=3, checksum=4),
]
FROM_DECODE = [
    Welcome(credit_chunks=8),
    Refused(reason="r"),
    Credit(chunks=9),
    Accepted(room=1, transfer=2),
    Rejected(room=1, transfer=2, reason="r"),
]


LAYOUT_OF_VERSION_1 = (
    b"\xa6layout\x88\xabpage_tokens\x01\xa5dtype\xa7float32\xa9kv_layout\xc0\xaapage_bytes\x92\x04\x04\xa9layer_ids\x90"
    b"\xa9aux_bytes\x91\x08\xacattn_tp_size\x01\xacattn_tp_rank\x00"
)
REGISTER_OF_VERSION_1 = (
    b"\xa4type\xa8register\xa8protocol\x01\xa7session\xa1s\xa4host\xa3::1\xaccontrol_port\x01\xa9link_port\x02"
    b"\xafmax_chunk_bytes\x03" + LAYOUT_OF_VERSION_1
)
HELLO_OF_VERSION_1 = b"\xa4type\xa5hello\xa8protocol\x01\xa7prefill\xa1p\xa7session\xa1s" + LAYOUT_OF_VERSION_1


def test_the_handshake_from_before_ranges_were_stated() -> None:
    assert decode_control([CONTROL_TAG, b"\x88" + REGISTER_OF_VERSION_1]) == CONTROL[0]
    assert decode_from_prefill(b"\x85" + HELLO_OF_VERSION_1, 0) == FROM_PREFILL[0]


def test_the_handshakes_bytes_with_ranges() -> None:
    register = msgspec.structs.replace(CONTROL[0], oldest_protocol=1, version="0.1")
    assert encode(register) == b"\x8a" + REGISTER_OF_VERSION_1 + b"\xafoldest_protocol\x01\xa7version\xa30.1"
    hello = msgspec.structs.replace(FROM_PREFILL[0], version="0.1")
    assert encode(hello) == b"\x86" + HELLO_OF_VERSION_1 + b"\xa7version\xa30.1"


def test_unknown_fields_of_a_later_version_are_ignored() -> None:
    later = b"\xadfuture_things\x81\xa1a\x93\x01\x02\x03"
    assert decode_control([CONTROL_TAG, b"\x89" + REGISTER_OF_VERSION_1 + later]) == CONTROL[0]
    assert decode_from_prefill(b"\x86" + HELLO_OF_VERSION_1 + later, 0) == FROM_PREFILL[0]


@pytest.mark.parametrize("message", CONTROL, ids=lambda m: type(m).__name__)
def test_control_messages_round_trip(message: messages.Control) -> None:
    assert decode_control([CONTROL_TAG, encode(message)]) == message


@pytest.mark.parametrize("message", FROM_PREFILL, ids=lambda m: type(m).__name__)
def test_prefill_messages_round_trip(message: messages.FromPrefill) -> None:
    assert decode_from_prefill(encode(message), 0 if isinstance(message, Hello) else 1) == message


@pytest.mark.parametrize("message", FROM_DECODE, ids=lambda m: type(m).__name__)
def test_decode_messages_round_trip(message: messages.FromDecode) -> None:
    assert decode_from_decode([encode(message)]) == message


def test_the_bytes_of_version_1_are_still_read() -> None:
    recorded = bytes.fromhex(
        "86a474797065a56368756e6ba4726f6f6d01a87472616e7366657202a873657175656e636503"
        "a47370616e84aa66697273745f7061676500a5706167657302ac66697273745f62756666657201a76275666665727304"
        "a8636865636b73756d05"
    )
    assert decode_from_prefill(recorded, 1) == Chunk(room=1, transfer=2, sequence=3, span=Span(0, 2, 1, 4), checksum=5)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_message_or_malformed(junk: bytes) -> None:
    for read in (
        lambda: decode_from_prefill(junk, 1),
        lambda: decode_from_decode([junk]),
        lambda: decode_control([CONTROL_TAG, junk]),
    ):
        try:
            read()
        except MalformedKvMessage:
            continue


@pytest.mark.parametrize("frames", [0, 2])
def test_payload_frames_are_counted(frames: int) -> None:
    with pytest.raises(MalformedKvMessage, match="carries 1 payload"):
        decode_from_prefill(encode(FROM_PREFILL[1]), frames)


def test_an_oversized_header_is_not_parsed() -> None:
    with pytest.raises(MalformedKvMessage, match="at most"):
        decode_from_prefill(encode(FROM_PREFILL[0]) + bytes(MAX_HEADER_BYTES), 0)


def test_other_messages_on_the_control_socket_are_left_alone() -> None:
    assert decode_control([b"ABORT", b"1"]) is None
    assert decode_control([]) is None


def test_a_checksum_binds_the_payload_to_its_place() -> None:
    payload = memoryview(b"payload")
    good = messages.checksum(payload, transfer=1, sequence=2)
    assert good == messages.checksum(memoryview(b"payload"), transfer=1, sequence=2)
    assert good != messages.checksum(memoryview(b"paylaod"), transfer=1, sequence=2)
    assert good != messages.checksum(payload, transfer=1, sequence=3)
    assert good != messages.checksum(payload, transfer=2, sequence=2)
