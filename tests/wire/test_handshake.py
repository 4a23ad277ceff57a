"""Recorded bytes of the handshake and of every message of protocol version 1: what was sent once stays readable.

A version's bytes are never edited; a new version adds its own. ``Dispatch`` is in ``test_messages.py``.
"""

from __future__ import annotations

import msgspec
import pytest

from flowprefill_sglang.wire.framing import decode_from_worker, decode_to_worker, encode
from flowprefill_sglang.wire.messages import (
    SPOKEN,
    Abort,
    Alive,
    Answer,
    Drain,
    Draining,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    HelloAgain,
    Limits,
    Load,
    Phase,
    Progress,
    Refused,
    ToWorker,
    Welcome,
)
from flowprefill_sglang.wire.versions import Versions

LIMITS = (
    b"\xa6limits\x84\xb2max_context_tokens\xcd\x03\xe8\xadmax_kv_tokens\xcd\x0f\xa0\xabpage_tokens\x10"
    b"\xb4max_running_requests@"
)
FIELDS_OF_HELLO = (
    b"\xa4type\xa5hello\xa8protocol\x01\xa4name\xa2p0\xabincarnation\xa1i\xa7version\xa50.1.0\xa5model\xa1m"
    b"\xa8http_url\xaahttp://h:1\xaebootstrap_host\xa1h\xaebootstrap_port\x02\xb0transfer_backend\xa3zmq" + LIMITS
)
FIELDS_OF_WELCOME = (
    b"\xa4type\xa7welcome\xa8protocol\x01\xa6router\xa1r\xb4heartbeat_interval_s\xcb?\xf0\x00\x00\x00\x00\x00\x00"
    b"\xacdead_after_s\xcb@\x08\x00\x00\x00\x00\x00\x00"
)
FIELDS_OF_REFUSED = b"\xa4type\xa7refused\xa6reason\xa2no\xa8protocol\x01"
FROM_THE_FUTURE = b"\xadfuture_things\x81\xa1a\x93\x01\x02\x03"
"""A field that a later version may add."""

HELLO = Hello(
    protocol=1,
    name="p0",
    incarnation="i",
    version="0.1.0",
    model="m",
    http_url="http://h:1",
    bootstrap_host="h",
    bootstrap_port=2,
    transfer_backend="zmq",
    limits=Limits(max_context_tokens=1000, max_kv_tokens=4000, page_tokens=16, max_running_requests=64),
)
WELCOME = Welcome(protocol=1, router="r", heartbeat_interval_s=1.0, dead_after_s=3.0)
REFUSED = Refused(reason="no", protocol=1)


def test_the_handshake_from_before_ranges_were_stated() -> None:
    hello, _ = decode_from_worker([b"\x8b" + FIELDS_OF_HELLO])
    assert hello == HELLO
    assert isinstance(hello, Hello)
    assert hello.spoken == Versions(1, 1)
    assert decode_to_worker([b"\x85" + FIELDS_OF_WELCOME])[0] == WELCOME
    assert decode_to_worker([b"\x83" + FIELDS_OF_REFUSED])[0] == REFUSED


def test_the_handshakes_bytes_with_ranges() -> None:
    hello = msgspec.structs.replace(HELLO, oldest_protocol=1)
    assert encode(hello) == [b"\x8c" + FIELDS_OF_HELLO + b"\xafoldest_protocol\x01"]
    welcome = msgspec.structs.replace(WELCOME, version="0.1.0")
    assert encode(welcome) == [b"\x86" + FIELDS_OF_WELCOME + b"\xa7version\xa50.1.0"]
    refused = msgspec.structs.replace(REFUSED, oldest_protocol=1, version="0.1.0")
    assert encode(refused) == [b"\x85" + FIELDS_OF_REFUSED + b"\xafoldest_protocol\x01\xa7version\xa50.1.0"]


def test_unknown_fields_of_a_later_version_are_ignored() -> None:
    assert decode_from_worker([b"\x8c" + FIELDS_OF_HELLO + FROM_THE_FUTURE])[0] == HELLO
    assert decode_to_worker([b"\x86" + FIELDS_OF_WELCOME + FROM_THE_FUTURE])[0] == WELCOME
    assert decode_to_worker([b"\x84" + FIELDS_OF_REFUSED + FROM_THE_FUTURE])[0] == REFUSED
    assert decode_to_worker([b"\x83\xa4type\xa5abort\xa3rid\xa2r1" + FROM_THE_FUTURE])[0] == Abort(rid="r1")


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        (b"\x83\xa4type\xa8progress\xa3rid\xa2r1\xa5phase\xa7started", Progress(rid="r1", phase=Phase.STARTED)),
        (
            b"\x84\xa4type\xa6answer\xa3rid\xa2r1\xa6status\xcc\xc8\xaccontent_type\xb0application/json",
            Answer(rid="r1", status=200),
        ),
        (b"\x82\xa4type\xa9heartbeat\xa4load\x81\xa9in_flight\x03", Heartbeat(load=Load(in_flight=3))),
        (
            b"\x82\xa4type\xa9heartbeat\xa4load\x82\xa9in_flight\x03\xa8silent_s\xcb@\x14\x00\x00\x00\x00\x00\x00",
            Heartbeat(load=Load(in_flight=3, silent_s=5.0)),
        ),
        (b"\x82\xa4type\xa8draining\xa6reason\xa1d", Draining(reason="d")),
        (b"\x82\xa4type\xa7goodbye\xa6reason\xa1g", Goodbye(reason="g")),
        (b"\x81\xa4type\xabhello_again", HelloAgain()),
        (b"\x82\xa4type\xa5abort\xa3rid\xa2r1", Abort(rid="r1")),
        (b"\x81\xa4type\xa5drain", Drain()),
        (b"\x81\xa4type\xa5alive", Alive()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, msgspec.Struct) else "",
)
def test_messages_of_version_1(recorded: bytes, message: FromWorker | ToWorker) -> None:
    payload = [b"{}"] if isinstance(message, Answer) else []
    decode = decode_from_worker if isinstance(message, FromWorker) else decode_to_worker
    assert decode([recorded, *payload])[0] == message
    assert encode(message, *payload)[0] == recorded


def test_version_1_is_spoken() -> None:
    assert 1 in SPOKEN, "the recorded bytes above may go only when it no longer is"
