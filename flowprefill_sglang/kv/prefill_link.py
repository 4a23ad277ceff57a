"""One connection of a prefill rank to a decode session: its socket, its credit and the rooms that use it.

Owned by the thread of ``PrefillLinks``, which does the work; nothing in here reads a clock, blocks or calls back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import zmq

from flowprefill_sglang.kv.links import LINK_LOST_EVENTS, configure_link
from flowprefill_sglang.kv.messages import Announce, Hello, Register, encode
from flowprefill_sglang.kv.settings import KvSettings
from flowprefill_sglang.kv.transfer import OutgoingTransfer, SendCredit, Sending


@dataclass(kw_only=True)
class Room:
    """A room that decode has announced, until it ends."""

    outgoing: OutgoingTransfer
    announce: Announce
    link: Link
    aux_index: int | None = None
    """Which metadata to send with the end; known with the last pages."""


@dataclass(kw_only=True)
class Link:
    """A DEALER to one decode session. Made by ``open_link``, ended by ``close``, never reconnected."""

    peer: Register
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    opened_at: float
    heard_at: float
    is_welcome: bool = False
    credit: SendCredit = field(default_factory=SendCredit)
    rooms: dict[int, Room] = field(default_factory=dict)
    ready: dict[int, Room] = field(default_factory=dict)
    """Rooms with something to send, in the order of their turns."""

    @property
    def name(self) -> str:
        """The decode rank, for messages to people."""
        return f"decode {self.peer.host}:{self.peer.link_port}"

    @property
    def awaits_answer(self) -> bool:
        """Whether decode owes a credit or an acknowledgement."""
        return self.credit.in_flight > 0 or any(room.outgoing.state is Sending.ENDED for room in self.rooms.values())

    def message_sent(self, room: Room, *, is_end: bool, now: float) -> None:
        """A chunk or the end of the room is on its way: take its credit and put the room at the end of the queue."""
        if not self.awaits_answer:
            self.heard_at = now  # the link was idle: its silence counts from now
        number = room.outgoing.room
        del self.ready[number]
        if is_end:
            room.outgoing.end_sent()
            return
        self.credit.take()
        room.outgoing.span_sent()
        if room.outgoing.has_work:
            self.ready[number] = room

    def overdue(self, settings: KvSettings, now: float) -> str | None:
        """Why the link counts as dead although it is connected, or None."""
        if not self.is_welcome:
            is_late = now - self.opened_at > settings.handshake_timeout_s
            return f"{self.name} did not answer the KV handshake" if is_late else None
        is_late = self.awaits_answer and now - self.heard_at > settings.stall_timeout_s
        return f"{self.name} has taken no KV for {settings.stall_timeout_s} s" if is_late else None

    def forget(self, number: int) -> None:
        """The room has ended."""
        self.rooms.pop(number, None)
        self.ready.pop(number, None)

    def close(self) -> None:
        """Close the connection; what was not sent is dropped."""
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=0)


def open_link(
    context: zmq.Context[zmq.Socket[bytes]], peer: Register, hello: Hello, settings: KvSettings, now: float
) -> Link:
    """Begin to connect and put the handshake on its way. Raises zmq.ZMQError for an address that is none, and when the
    process has no sockets left."""
    socket = context.socket(zmq.DEALER)
    try:
        configure_link(socket, settings, peer.host)
        # A new connection is a new handshake with fresh credit, so ZeroMQ must not reconnect behind our back.
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        socket.setsockopt(zmq.SNDHWM, 0)  # credit is the bound
        monitor = socket.get_monitor_socket(LINK_LOST_EVENTS)
        try:
            host = f"[{peer.host}]" if ":" in peer.host else peer.host
            socket.connect(f"tcp://{host}:{peer.link_port}")
            socket.send(encode(hello))
        except zmq.ZMQError:
            socket.disable_monitor()
            monitor.close(linger=0)
            raise
    except zmq.ZMQError:
        socket.close(linger=0)
        raise
    return Link(peer=peer, socket=socket, monitor=monitor, opened_at=now, heard_at=now)
