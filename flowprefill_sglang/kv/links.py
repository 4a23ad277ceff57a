"""What both ends of a KV connection have in common: socket options, and the signs that it is lost."""

from __future__ import annotations

from typing import Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from flowprefill_sglang.kv.settings import KvSettings

LINK_LOST_EVENTS: Final = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def configure_link(socket: zmq.Socket[bytes], settings: KvSettings, host: str) -> None:
    """Options of both ends. A killed peer is reported by the kernel at once, a vanished one by the pings."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, round(settings.heartbeat_interval_s * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(settings.heartbeat_timeout_s * 1000))
    socket.setsockopt(zmq.CONNECT_TIMEOUT, round(settings.handshake_timeout_s * 1000))
    if ":" in host:
        socket.setsockopt(zmq.IPV6, 1)


def has_lost_link(monitor: zmq.Socket[bytes]) -> bool:
    """Read all that a monitor has to tell; whether a connection was among it that ended or never came about."""
    is_lost = False
    while monitor.poll(0):
        event = recv_monitor_message(monitor)
        is_lost |= bool(event["event"] & LINK_LOST_EVENTS)
    return is_lost
