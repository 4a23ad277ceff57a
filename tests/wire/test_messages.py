"""What the messages look like on the wire, and that routers and workers of different versions understand each other."""

from __future__ import annotations

import math
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.wire.framing import MalformedMessage, decode_to_worker, encode
from flowprefill_sglang.wire.messages import MAX_CLASS_CHARACTERS, Dispatch, FromWorker, ToWorker

WITHOUT_OBJECTIVE = (
    b"\x85\xa4type\xa8dispatch\xa3rid\xa2r1\xa4path\xa9/generate\xa7headers\x91\x92\xacx-request-id\xa1a"
    b"\xa5age_s\xcb?\xd0\x00\x00\x00\x00\x00\x00"
)
"""A dispatch as routers sent it before they knew of objectives."""
WITH_OBJECTIVE = (
    b"\x88\xa4type\xa8dispatch\xa3rid\xa2r1\xa4path\xa9/generate\xa7headers\x91\x92\xacx-request-id\xa1a"
    b"\xa5age_s\xcb?\xd0\x00\x00\x00\x00\x00\x00"
    b"\xaattft_slo_s\xcb?\xe0\x00\x00\x00\x00\x00\x00\xa9slo_class\xa4text\xa8priority\xfd"
)


class OldDispatch(msgspec.Struct, frozen=True, kw_only=True, tag="dispatch"):
    """What a worker of that time reads."""

    rid: str
    path: str
    headers: list[tuple[str, str]] = []
    age_s: float = 0.0


FIELDS: dict[str, Any] = {"rid": "r1", "path": "/generate", "headers": [("x-request-id", "a")], "age_s": 0.25}
NEW: dict[str, Any] = {"ttft_slo_s": 0.5, "slo_class": "text", "priority": -3}


def test_a_dispatchs_bytes() -> None:
    assert encode(Dispatch(**FIELDS, **NEW), b"{}") == [WITH_OBJECTIVE, b"{}"]
    assert decode_to_worker([WITH_OBJECTIVE, b"{}"])[0] == Dispatch(**FIELDS, **NEW)


def test_a_dispatch_of_an_older_router_has_no_objective() -> None:
    message, _ = decode_to_worker([WITHOUT_OBJECTIVE, b"{}"])
    assert message == Dispatch(**FIELDS)
    assert isinstance(message, Dispatch)
    assert (message.ttft_slo_s, message.slo_class, message.priority) == (None, "", None)


def test_an_older_worker_reads_a_dispatch_with_an_objective() -> None:
    assert msgspec.msgpack.encode(OldDispatch(**FIELDS)) == WITHOUT_OBJECTIVE
    for frame in (WITH_OBJECTIVE, encode(Dispatch(**FIELDS), b"")[0]):
        assert msgspec.msgpack.decode(frame, type=OldDispatch) == OldDispatch(**FIELDS)


@given(
    st.builds(
        Dispatch,
        rid=st.text(),
        path=st.text(),
        headers=st.lists(st.tuples(st.text(), st.text()), max_size=3),
        age_s=st.floats(0, 1e6),
        ttft_slo_s=st.none() | st.floats(0, exclude_min=True, allow_nan=False),
        slo_class=st.text(max_size=MAX_CLASS_CHARACTERS),
        priority=st.none() | st.integers(-(2**63), 2**63 - 1),
    ),
    st.binary(max_size=10),
)
def test_a_dispatch_round_trips(message: Dispatch, body: bytes) -> None:
    assert decode_to_worker(encode(message, body)) == (message, [body])


@pytest.mark.parametrize(
    "wrong",
    [
        *({"ttft_slo_s": value} for value in (0.0, -1.0, math.nan, "1", True)),
        *({"slo_class": value} for value in ("x" * (MAX_CLASS_CHARACTERS + 1), None, 5)),
        *({"priority": value} for value in (2**63, 1.5, "1", True)),
    ],
)
def test_nonsense_from_a_router_is_no_message(wrong: dict) -> None:
    frame = msgspec.msgpack.encode({"type": "dispatch", **FIELDS, **NEW, **wrong})
    with pytest.raises(MalformedMessage):
        decode_to_worker([frame, b"{}"])


@pytest.mark.parametrize("message", [*get_args(FromWorker), *get_args(ToWorker)])
def test_no_point_in_time_crosses_the_wire(message: type) -> None:
    """Two hosts' clocks differ: only lengths of time may travel."""
    names = [field.name for field in msgspec.structs.fields(message)]
    assert not [name for name in names if name.endswith("_at")]
