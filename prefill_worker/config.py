"""What a prefill worker is told at its start, apart from SGLang's own flags."""

from __future__ import annotations

import argparse
import math
import os
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """One worker's link to its router."""

    router: str
    """ZeroMQ address of the router's worker port, e.g. ``tcp://10.0.0.1:30001``."""
    name: str
    """Unique within the cluster. Default: host name and process id, which a restart changes; an orchestrator should
    give a stable one, so that a restarted worker replaces its former self at once."""
    hello_retry_s: float = 1.0
    """Pause between greetings while no router answers. A second: routers start slower than that, and a greeting is a
    hundred bytes."""
    leave_after_s: float = 30.0
    """Longest wait for requests in flight once the worker drains, asked by the router or by SIGTERM. Then they are
    aborted, and the router tries them elsewhere. Thirty seconds are what orchestrators give a process by default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The worker's own flags; SGLang's are passed through."""
    parser.add_argument(
        "--router", required=True, type=_endpoint, metavar="tcp://HOST:PORT", help="the router's worker port"
    )
    parser.add_argument("--name", default=None, help="unique name of this worker (default: HOST-PID)")
    parser.add_argument(
        "--shutdown-drain-secs",
        type=_seconds,
        default=WorkerConfig.leave_after_s,
        metavar="S",
        help="longest wait for requests in flight on shutdown (default: %(default)s)",
    )


def _endpoint(text: str) -> str:
    try:
        parts = urlsplit(text)
        is_endpoint = parts.scheme == "tcp" and bool(parts.hostname) and bool(parts.port)
    except ValueError:  # a port that is no number
        is_endpoint = False
    if not is_endpoint:
        raise argparse.ArgumentTypeError(f"expected tcp://HOST:PORT, the router's --worker-bind, got {text}")
    return text


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, 0 or more, got {text}")
    return value


def from_arguments(namespace: argparse.Namespace) -> WorkerConfig:
    """The configuration that the parsed flags describe."""
    name = namespace.name or f"{socket.gethostname()}-{os.getpid()}"
    return WorkerConfig(router=namespace.router, name=name, leave_after_s=namespace.shutdown_drain_secs)
