"""Peers of the KV handoff that say whatever a test wants, on real sockets."""

from __future__ import annotations

import zmq

from flowprefill_sglang.kv.messages import (
    PROTOCOL_VERSION,
    FromDecode,
    FromPrefill,
    Hello,
    Welcome,
    decode_from_decode,
    encode,
)
from flowprefill_testing.kv_link_pair import (
    HOST,
    LAYOUT,
    PREFILL,
    SMALL,
    Decode,
)


class RoguePrefill:
    """Speaks the link protocol by hand."""

    def __init__(self, decode: Decode, name: str = PREFILL) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self._socket.connect(f"tcp://{HOST}:{decode.links.port}")
        self.hello = Hello(protocol=PROTOCOL_VERSION, prefill=name, session=decode.links.session, layout=LAYOUT)

    def send(self, message: FromPrefill | bytes, *payload: bytes) -> None:
        self._socket.send_multipart([message if isinstance(message, bytes) else encode(message), *payload])

    def receive(self) -> FromDecode:
        return decode_from_decode(self._socket.recv_multipart())

    def connect(self) -> None:
        self.send(self.hello)
        assert self.receive() == Welcome(credit_chunks=SMALL.window_chunks)

    def close(self) -> None:
        self._context.destroy(linger=0)


class RogueDecode:
    """Speaks the link protocol by hand."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self.port = self._socket.bind_to_random_port(f"tcp://{HOST}")
        self._identity = b""

    def receive(self) -> list[bytes]:
        self._identity, *frames = self._socket.recv_multipart()
        return frames

    def is_quiet(self) -> bool:
        """Nothing comes within a tenth of a second, many times what the next chunk would take."""
        return not self._socket.poll(100)

    def send(self, message: FromDecode | bytes) -> None:
        self._socket.send_multipart([self._identity, message if isinstance(message, bytes) else encode(message)])

    def close(self) -> None:
        self._context.destroy(linger=0)
