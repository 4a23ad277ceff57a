"""TCP ports for the processes of one machine."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Collection
from pathlib import Path

from flowprefill_sglang.errors import StartupError

_CANDIDATES = range(10_000, 30_000)  # above well-known services, below the routers' own defaults
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int, besides: Collection[int] = ()) -> list[int]:
    """Ports that nobody listens on now, in an order of chance, so that launchers that start together rarely meet.

    ``besides``: ports that are given away, though nobody may listen on them yet.

    They are not reserved, and a large model's server binds its port minutes later. So they lie outside of the range
    from which the kernel serves outgoing connections, any of which would take a port away meanwhile. Raises
    StartupError when there are not so many.
    """
    first_ephemeral = _first_ephemeral_port()
    taken = frozenset(besides)
    below = [port for port in _CANDIDATES if port < first_ephemeral and port not in taken]
    below = below or [port for port in _CANDIDATES if port not in taken]
    found: list[int] = []
    for port in random.SystemRandom().sample(below, len(below)):
        if len(found) == count:
            break
        with socket.socket() as probe:
            try:
                probe.bind(("", port))  # on every address: members and routers listen on others than this one
            except OSError:
                continue
        found.append(port)
    if len(found) < count:
        limit = max(below or _CANDIDATES) + 1
        raise StartupError(f"{count} free ports are needed below {limit}; there are {len(found)}")
    return found


def _first_ephemeral_port() -> int:
    try:
        return int(_EPHEMERAL_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768  # Linux's default


def require_free(host: str, port: int) -> None:
    """Raise StartupError when nobody could listen on this address: taken, not ours, or no such host."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise StartupError(f"no such address: --host {host}: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            advice = "; choose an address of this machine for --host"
        else:
            advice = "; choose another --port" if port else ""
        raise StartupError(f"cannot listen on {host}:{port}: {error.strerror}{advice}") from error


def local_url(host: str, port: int) -> str:
    """The URL under which this machine reaches a server that listens on ``host``."""
    reached = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
