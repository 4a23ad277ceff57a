"""The numbers of the ``zmq`` KV transfer backend, from the environment: SGLang passes a backend no options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from flowprefill_sglang.errors import StartupError

PREFIX: Final = "FLOWPREFILL_KV_"


@dataclass(frozen=True, kw_only=True)
class KvSettings:
    """Each field is read from ``FLOWPREFILL_KV_<FIELD IN CAPITALS>``."""

    chunk_bytes: int = 1 << 20
    """Largest payload of one message. Big enough that a message's fixed cost (about 0.1 ms for both sides) is small,
    small enough that the chunks of a window stay in the processor's caches between gather, checksum and send, and that
    a short request waits little behind a chunk of a long one. In a quick comparison 4 MiB was slower."""
    window_chunks: int = 8
    """Chunks that may be under way on one link; a link takes at most
    ``window_chunks * chunk_bytes`` of the receiver's memory."""
    staging_chunks: int = 8
    """Staging buffers of a sender, shared by its links; bounds its memory to ``staging_chunks * chunk_bytes``."""
    handshake_timeout_s: float = 10.0
    """A decode instance that has not welcomed a link by then counts as dead."""
    stall_timeout_s: float = 30.0
    """A link on which something is due and nothing has come back for this long counts as dead."""
    heartbeat_interval_s: float = 2.0
    """ZeroMQ's own pings on a link; the kernel reports a killed process at once, these find a vanished host."""
    heartbeat_timeout_s: float = 6.0
    """A link whose peer has not answered a ping for this long is dead."""


def settings_from_environment(environ: Mapping[str, str]) -> KvSettings:
    """Raises StartupError for a value that is no positive number, or a name that is no setting."""
    kinds: dict[str, type[Any]] = {field.name: type(field.default) for field in fields(KvSettings)}  # int or float
    values: dict[str, int | float] = {}
    for name, text in environ.items():
        if not name.startswith(PREFIX):
            continue
        kind = kinds.get(name.removeprefix(PREFIX).lower())
        if kind is None:
            known = ", ".join(PREFIX + field.upper() for field in kinds)
            raise StartupError(f"{name} is no setting of the KV transfer; there are {known}")
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise StartupError(f"{name}={text!r}: expected a positive {'integer' if kind is int else 'number'}")
        values[name.removeprefix(PREFIX).lower()] = value
    return KvSettings(**values)  # type: ignore[arg-type]  # each value was made by its field's own type
