"""What a worker remembers of its last minutes, as it travels over HTTP and lies in files."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from flowprefill_sglang.observe.events import Event


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """Events of one worker. ``unix_now - monotonic_now`` turns their times into those of day."""

    worker: str
    monotonic_now: float
    """Both clocks, read at one moment, when the recording was taken."""
    unix_now: float
    events: list[Event]
    lost: int = 0
    """Events dropped since the worker's start, because the HTTP process did not keep up."""


_encoder = msgspec.json.Encoder()


def encode(recording: Recording) -> bytes:
    """The recording in JSON. JSON has no infinity, so a deadline that is never due becomes ``null``."""
    return _encoder.encode(recording)


def decode(document: bytes | str) -> Recording:
    """A recording from JSON. Raises msgspec.DecodeError, of which a wrong field's ValidationError is one."""
    raw: Any = msgspec.json.decode(document)  # any JSON document until it was converted
    events = raw.get("events") if isinstance(raw, dict) else None
    for event in events if isinstance(events, list) else ():
        if isinstance(event, dict) and event.get("deadline_at", 0.0) is None:
            event["deadline_at"] = math.inf
    return msgspec.convert(raw, Recording)
