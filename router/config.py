"""The router's configuration: one frozen dataclass, from which the command-line flags are derived."""

from __future__ import annotations

import argparse
import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.router.objectives import (
    CUSTOM,
    DEFAULT_CLASS,
    DEFAULT_CLASSES_MS,
    LARGEST_SLO_MS,
    LEAST_SLO_MS,
    NO_CLASS,
)
from flowprefill_sglang.router.policies import DEFAULT_POLICY, POLICIES
from flowprefill_sglang.wire.messages import MAX_CLASS_CHARACTERS


def _option(default: Any, text: str, **extra: Any) -> Any:  # dataclasses.field() itself is typed as the field's type
    return field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Everything a router needs to know. Raises BadInput for values that cannot work."""

    host: str = _option("127.0.0.1", "address to serve HTTP on")
    port: int = _option(30000, "port to serve HTTP on; 0 picks a free one")
    worker_bind: str = _option(
        "tcp://127.0.0.1:30100", "ZeroMQ endpoint that prefill workers connect to; keep it on a trusted network"
    )
    decode: tuple[str, ...] = _option((), "URL of a decode instance; repeat for more", metavar="URL")
    prefill_policy: str = _option(DEFAULT_POLICY, "how a prefill worker is chosen", choices=tuple(POLICIES))
    decode_policy: str = _option(DEFAULT_POLICY, "how a decode instance is chosen", choices=tuple(POLICIES))
    slo_class: tuple[str, ...] = _option(
        (),
        "a class of requests and its TTFT objective in milliseconds; repeat for more. Known without it: "
        + ", ".join(f"{name}={value:g}" for name, value in DEFAULT_CLASSES_MS.items()),
        metavar="NAME=MS",
    )
    default_slo_class: str = _option(DEFAULT_CLASS, "class of requests that name neither an objective nor a class")
    max_concurrent_requests: int = _option(4096, "requests in the cluster at once; more wait in the queue")
    queue_size: int = _option(1024, "requests that may wait; more are answered with 429")
    queue_timeout_secs: float = _option(60.0, "longest wait in the queue, then 429")
    request_timeout_secs: float = _option(1800.0, "longest life of a request, then 504")
    connect_timeout_secs: float = _option(5.0, "longest wait for a TCP connection to a decode instance")
    retry_max_retries: int = _option(2, "further pairs to try when a worker dies before the first token")
    disable_retries: bool = _option(False, "never try another pair")
    max_body_bytes: int = _option(64 * 1024 * 1024, "largest request body; larger ones are answered with 413")
    max_answer_bytes: int = _option(1 << 30, "largest message of a prefill worker; prompt logprobs can be long")
    heartbeat_interval_secs: float = _option(1.0, "how often prefill workers report")
    heartbeat_dead_secs: float = _option(3.0, "silence after which a prefill worker counts as dead")
    health_check_interval_secs: float = _option(5.0, "how often decode instances are checked once they are ready")
    health_check_timeout_secs: float = _option(10.0, "longest wait for a decode instance's health answer")
    health_failure_threshold: int = _option(3, "failed checks in a row after which a decode instance counts as dead")
    drain_settle_secs: float = _option(0.0, "on shutdown: how long /readiness says no before new requests are refused")
    shutdown_drain_secs: float = _option(30.0, "on shutdown: how long running requests may take to end")
    api_key: str | None = _option(None, "key that clients must send as a bearer token; also sent to decode instances")
    prometheus_port: int | None = _option(
        None, "port for /metrics alone, which --port then no longer answers; 0 picks a free one", type=int
    )
    log_level: str = _option("info", "least serious log line to print", choices=("debug", "info", "warning", "error"))
    log_json: bool = _option(False, "print log lines as JSON objects")

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise BadInput(f"{_flag(name)} must be at least {least}, not {getattr(self, name)}")
        if self.heartbeat_dead_secs <= self.heartbeat_interval_secs:
            raise BadInput("--heartbeat-dead-secs must be longer than --heartbeat-interval-secs")
        for name in ("prefill_policy", "decode_policy"):
            if getattr(self, name) not in POLICIES:
                raise BadInput(f"{_flag(name)} must be one of {', '.join(POLICIES)}, not {getattr(self, name)!r}")
        if self.default_slo_class not in self.slo_classes_ms:
            known = ", ".join(self.slo_classes_ms)
            raise BadInput(f"--default-slo-class must be one of {known}, not {self.default_slo_class!r}")
        if self.prometheus_port is not None and self.prometheus_port < 0:
            raise BadInput(f"--prometheus-port must be at least 0, not {self.prometheus_port}")
        for url in self.decode:
            check_url(url)

    @property
    def slo_classes_ms(self) -> dict[str, float]:
        """TTFT objectives by class: the default ones, with those of ``slo_class`` added or put in their place."""
        return dict(DEFAULT_CLASSES_MS) | dict(map(parse_slo_class, self.slo_class))

    @property
    def retries(self) -> int:
        return 0 if self.disable_retries else self.retry_max_retries


LEAST: Final[dict[str, float]] = {
    "port": 0,
    "max_concurrent_requests": 1,
    "queue_size": 0,
    "queue_timeout_secs": 0,
    "request_timeout_secs": 0.001,
    "connect_timeout_secs": 0.001,
    "retry_max_retries": 0,
    "max_body_bytes": 1,
    "max_answer_bytes": 1 << 16,
    "heartbeat_interval_secs": 0.01,
    "health_check_interval_secs": 0.01,
    "health_check_timeout_secs": 0.01,
    "health_failure_threshold": 1,
    "drain_settle_secs": 0,
    "shutdown_drain_secs": 0,
}


def check_url(url: str) -> str:
    """A decode instance's URL without a trailing slash. Raises BadInput."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadInput(f"{url!r} is no URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise BadInput(f"{url!r} is no URL of a decode instance; expected http://HOST:PORT")
    return url.rstrip("/")


_CLASS_NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_CLASS_CHARACTERS - 1}}}")


def parse_slo_class(text: str) -> tuple[str, float]:
    """A class's name and its objective in milliseconds, from ``NAME=MS``. Raises BadInput."""
    name, _, value = text.partition("=")
    try:
        slo_ms = float(value)
    except ValueError:
        slo_ms = 0.0
    if not _CLASS_NAME.fullmatch(name) or not LEAST_SLO_MS <= slo_ms <= LARGEST_SLO_MS:
        raise BadInput(
            f"--slo-class must be NAME=MS, with a name of letters, digits, '.', '_' and '-', "
            f"and from {LEAST_SLO_MS:g} to {LARGEST_SLO_MS:.0f} ms, not {text!r}"
        )
    if name in NO_CLASS or name == CUSTOM:
        raise BadInput(f"--slo-class {text!r}: the name {name!r} has a meaning of its own; take another")
    return name, slo_ms


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of ``RouterConfig``, and ``--policy``, which sets both policies."""
    for item in dataclasses.fields(RouterConfig):
        options: dict[str, Any] = {key: value for key, value in item.metadata.items() if key != "help"}
        options["help"] = item.metadata["help"]
        if item.default is False:
            options["action"] = "store_true"
        elif isinstance(item.default, tuple):
            options.update(action="append", default=None)
        else:
            options.setdefault("type", str if item.default is None else type(item.default))
            options["default"] = item.default
            if item.default is not None:
                options["help"] += " (default: %(default)s)"
        parser.add_argument(_flag(item.name), **options)
    parser.add_argument("--policy", choices=tuple(POLICIES), help="sets --prefill-policy and --decode-policy")


def from_arguments(namespace: argparse.Namespace) -> RouterConfig:
    """The configuration of parsed flags. Raises BadInput."""
    values = {item.name: getattr(namespace, item.name) for item in dataclasses.fields(RouterConfig)}
    values["decode"] = tuple(check_url(url) for url in values["decode"] or ())
    values["slo_class"] = tuple(values["slo_class"] or ())
    if namespace.policy is not None:
        values["prefill_policy"] = values["decode_policy"] = namespace.policy
    return RouterConfig(**values)
