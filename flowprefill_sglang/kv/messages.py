"""What a prefill rank and a decode rank say to each other, beside SGLang's own status and abort messages.

*Control* messages go from decode to prefill over the sockets that SGLang's common connection classes open anyway.
*Link* messages use a connection of their own (prefill: DEALER, decode: ROUTER), on which ``Chunk`` and ``End`` carry
one payload frame. Every message is one MessagePack frame that is decoded into a checked type; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec
import xxhash

from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.kv.layout import Layout, Span
from flowprefill_sglang.wire.versions import Versions

PROTOCOL_VERSION: Final = 1
"""The newest version that this code speaks."""
SPOKEN: Final = Versions(1, PROTOCOL_VERSION)
"""All that it speaks. ``Register`` states them, the prefill side takes the newest that both know and says so in
``Hello``; from then on both speak that one. A version stays for at least one release after its successor has come."""
MAX_HEADER_BYTES: Final = 64 * 1024
CONTROL_TAG: Final = b"FLOWPREFILL_KV"
"""First frame of a control message; SGLang's own messages on that socket start with other words."""

T = TypeVar("T")


class MalformedKvMessage(PeerFault):
    """Frames that are no message of the KV protocol."""

    code = "malformed_kv_message"


# ---- control: decode -> prefill ----------------------------------------------------------------------------------


class Register(msgspec.Struct, frozen=True, kw_only=True, tag="register"):
    """A decode rank introduces itself, before its first room with this prefill rank."""

    protocol: int
    """The newest version of the protocol that the decode rank speaks."""
    session: str
    """Names this life of the decode rank."""
    host: str
    control_port: int
    """Where SGLang's status messages go."""
    link_port: int
    """Where KV goes."""
    max_chunk_bytes: int
    """Larger messages make the decode side drop the connection."""
    layout: Layout
    oldest_protocol: int | None = None
    """The oldest one; None from decode ranks that know ``protocol`` alone."""
    version: str = ""
    """FlowPrefill's version, for people; empty when it was not said yet."""


class Announce(msgspec.Struct, frozen=True, kw_only=True, tag="announce"):
    """Pages are reserved for a room: the transfer may begin."""

    session: str
    host: str
    control_port: int
    room: int
    transfer: int
    """Tells a transfer from an earlier one with the same room number."""
    pages: int
    decode_prefix_tokens: int
    """Tokens that decode holds already and that are not to be sent."""


Control = Register | Announce


# ---- link: prefill -> decode -------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """First message on a link."""

    protocol: int
    """The version that both sides speak on it."""
    prefill: str
    """``host:port`` under which SGLang's bootstrap server knows the prefill rank."""
    session: str
    """The decode session that the prefill rank believes to be talking to."""
    layout: Layout
    version: str = ""
    """FlowPrefill's version, for people; empty when it was not said yet."""


class Chunk(msgspec.Struct, frozen=True, kw_only=True, tag="chunk"):
    """One span of a room; the payload is its block."""

    room: int
    transfer: int
    sequence: int
    """0, 1, 2, … within the transfer."""
    span: Span
    checksum: int


class End(msgspec.Struct, frozen=True, kw_only=True, tag="end"):
    """All pages were sent; the payload is the request's metadata (first token, …), buffer after buffer."""

    room: int
    transfer: int
    sequence: int
    checksum: int


FromPrefill = Hello | Chunk | End


# ---- link: decode -> prefill -------------------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """The link is open, with credit for this many chunks."""

    credit_chunks: int


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The link is closed, with everything on it."""

    reason: str


class Credit(msgspec.Struct, frozen=True, kw_only=True, tag="credit"):
    """Chunks allowed since the link was opened: a running total, so that saying it twice does no harm."""

    chunks: int


class Accepted(msgspec.Struct, frozen=True, kw_only=True, tag="accepted"):
    """Everything of the room is in its place."""

    room: int
    transfer: int


class Rejected(msgspec.Struct, frozen=True, kw_only=True, tag="rejected"):
    """The room has failed on the decode side; nothing more of it will be written."""

    room: int
    transfer: int
    reason: str


FromDecode = Welcome | Refused | Credit | Accepted | Rejected

_encoder = msgspec.msgpack.Encoder()
_control: msgspec.msgpack.Decoder[Control] = msgspec.msgpack.Decoder(Control)
_from_prefill: msgspec.msgpack.Decoder[FromPrefill] = msgspec.msgpack.Decoder(FromPrefill)
_from_decode: msgspec.msgpack.Decoder[FromDecode] = msgspec.msgpack.Decoder(FromDecode)


def encode(message: Control | FromPrefill | FromDecode) -> bytes:
    """The header frame of a message."""
    return _encoder.encode(message)


def decode_control(frames: Sequence[bytes]) -> Control | None:
    """A control message, or None when the frames are one of SGLang's own. Raises MalformedKvMessage."""
    if not frames or frames[0] != CONTROL_TAG:
        return None
    if len(frames) != 2:
        raise MalformedKvMessage(f"a control message has 2 frames, not {len(frames)}")
    return _decode(_control, frames[1])


def decode_from_prefill(header: memoryview | bytes, payload_frames: int) -> FromPrefill:
    """A link message of the prefill side. Raises MalformedKvMessage."""
    message = _decode(_from_prefill, header)
    expected = 0 if isinstance(message, Hello) else 1
    if payload_frames != expected:
        raise MalformedKvMessage(f"{type(message).__name__} carries {expected} payload frames, not {payload_frames}")
    return message


def decode_from_decode(frames: Sequence[bytes]) -> FromDecode:
    """A link message of the decode side. Raises MalformedKvMessage."""
    if len(frames) != 1:
        raise MalformedKvMessage(f"a message of the decode side has 1 frame, not {len(frames)}")
    return _decode(_from_decode, frames[0])


def _decode(decoder: msgspec.msgpack.Decoder[T], header: memoryview | bytes) -> T:
    if len(header) > MAX_HEADER_BYTES:
        raise MalformedKvMessage(f"a header of {len(header)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    try:
        decoded: T = decoder.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedKvMessage(f"no message of the KV protocol: {error}") from error
    return decoded


def checksum(payload: memoryview, *, transfer: int, sequence: int) -> int:
    """XXH3-64 of a payload, seeded with where it belongs, so that a good payload under a wrong header fails too.

    TCP's own 16-bit sum misses one damaged segment in 65,536, and says nothing of a staging buffer that was used again
    too early. Measured on 4 MiB, XXH3 costs a twelfth of zlib's CRC-32 and a twentieth of its Adler-32; SGLang requires
    the package anyway.
    """
    return xxhash.xxh3_64_intdigest(payload, seed=(transfer + sequence) & 0xFFFF_FFFF_FFFF_FFFF)
