"""Messages to frames and back: value in, value out, nothing here owns a socket.

Bytes from a peer are never trusted: a frame that is no MessagePack, no known message, or breaks a size limit raises
``MalformedMessage``, which names the field. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec

from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.wire.messages import Answer, Dispatch, FromWorker, ToWorker

MAX_MESSAGE_BYTES: Final = 64 * 1024
"""Largest struct frame; bodies travel in payload frames, whose size the HTTP side limits."""

T = TypeVar("T")

Buffer = bytes | bytearray | memoryview
"""What a payload frame may be: anything that ZeroMQ sends without copying."""

_encoder = msgspec.msgpack.Encoder()
_from_worker = msgspec.msgpack.Decoder(FromWorker)
_to_worker = msgspec.msgpack.Decoder(ToWorker)
_PAYLOAD_FRAMES: Final[dict[type, int]] = {Dispatch: 1, Answer: 1}


class MalformedMessage(PeerFault):
    """Frames that are no message of the protocol."""

    code = "malformed_message"


def encode(message: FromWorker | ToWorker, *payload: Buffer) -> list[Buffer]:
    """Frames of a message, ready for ``send_multipart``. Raises ValueError on a wrong number of payload frames."""
    expected = _PAYLOAD_FRAMES.get(type(message), 0)
    if len(payload) != expected:
        raise ValueError(f"{type(message).__name__} carries {expected} payload frames, not {len(payload)}")
    return [_encoder.encode(message), *payload]


def decode_from_worker(frames: Sequence[Buffer]) -> tuple[FromWorker, Sequence[Buffer]]:
    """A worker's message and its payload frames. Raises MalformedMessage."""
    return _decode(_from_worker, frames)


def decode_to_worker(frames: Sequence[Buffer]) -> tuple[ToWorker, Sequence[Buffer]]:
    """A router's message and its payload frames. Raises MalformedMessage."""
    return _decode(_to_worker, frames)


def _decode(decoder: msgspec.msgpack.Decoder[T], frames: Sequence[Buffer]) -> tuple[T, Sequence[Buffer]]:
    if not frames:
        raise MalformedMessage("a message without frames")
    if len(frames[0]) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"a message frame of {len(frames[0])} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        message = decoder.decode(frames[0])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"no message of the protocol: {error}") from error
    expected = _PAYLOAD_FRAMES.get(type(message), 0)
    if len(frames) - 1 != expected:
        raise MalformedMessage(f"{type(message).__name__} carries {expected} payload frames, not {len(frames) - 1}")
    return message, frames[1:]
