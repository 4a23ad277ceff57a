from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.bench.sse import SseDecoder

STREAM = (
    b': comment\r\nevent: x\r\ndata: {"a": 1}\r\n\r\ndata:{"b": 2}\ndata: more\n\n\n\ndata: [DONE]\n\ndata: unfinished'
)
EVENTS = [b'{"a": 1}', b'{"b": 2}\nmore', b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=10))
def test_events_do_not_depend_on_how_the_bytes_arrive(cuts: list[int]) -> None:
    decoder = SseDecoder()
    edges = [0, *sorted(cuts), len(STREAM)]
    events = [e for start, end in pairwise(edges) for e in decoder.feed(STREAM[start:end])]
    assert events == EVENTS


@pytest.mark.parametrize("chunk", [b"x" * 30, b"data: " + b"y" * 30 + b"\n"])
def test_an_endless_event_is_refused(chunk: bytes) -> None:
    decoder = SseDecoder(max_event_bytes=100)
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        decoder.feed(chunk * 5)
