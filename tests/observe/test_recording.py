"""Recordings in JSON, whose numbers have no infinity."""

from __future__ import annotations

import json
import math

import msgspec
import pytest

from flowprefill_sglang.observe import recording
from flowprefill_sglang.observe.events import Outcome, RequestArrived, RequestEnded, RoundDone, TaskStarted, Trigger
from flowprefill_sglang.observe.recording import Recording

EVENTS = [
    RequestArrived(at=1.0, rid="a", tokens=5, slo_class="text", received_at=0.5, deadline_at=0.75, dispatch_rid="d"),
    RequestArrived(at=1.0, rid="b", tokens=5, slo_class="", received_at=0.5, deadline_at=math.inf),
    TaskStarted(at=2.0, task=1, rids=["a", "b"], new_tokens=9, cached_tokens=1, predicted_s=0.1, deadline_at=math.inf),
    RoundDone(at=2.0, trigger=Trigger.ARRIVAL, duration_s=1e-5, waiting=0, suspended=0),
    RequestEnded(at=3.0, rid="a", outcome=Outcome.FAILED, slo_class="text", first_token_s=2.5, is_in_time=False),
]


def test_a_recording_survives_json() -> None:
    taken = Recording(worker="w", monotonic_now=4.0, unix_now=1e9, events=EVENTS, lost=3)
    document = recording.encode(taken)
    assert recording.decode(document) == taken
    json.loads(document, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.mark.parametrize("document", [b"[]", b"null", b'{"worker": "w"}', b'{"events": [{"type": "bogus"}]}', b"{"])
def test_nonsense_is_refused(document: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        recording.decode(document)


def test_a_recording_of_an_older_version_is_readable() -> None:
    event = {"type": "arrived", "at": 1, "rid": "a", "tokens": 1, "slo_class": "", "received_at": 1, "deadline_at": 2}
    old = json.dumps({"worker": "w", "monotonic_now": 1, "unix_now": 1, "events": [event]})
    assert recording.decode(old).events == [
        RequestArrived(at=1.0, rid="a", tokens=1, slo_class="", received_at=1.0, deadline_at=2.0)
    ]
