"""The messages between a router and its prefill workers.

One tagged union a direction. A message travels as a multipart ZeroMQ message: one MessagePack frame that holds the
struct, then the payload frames that the struct announces (``Dispatch`` and ``Answer`` carry one: a request's or an
answer's body, untouched). Points in time never cross the wire, since two hosts' clocks differ; only lengths of time do.

Compatibility: new fields have defaults and go last, and a reader ignores fields that it does not know. Anything else (a
new message, which gets a new tag, or another meaning) raises ``PROTOCOL_VERSION``, and is sent only where the agreed
version has it. Router and worker agree on it in ``Hello`` and ``Welcome`` / ``Refused``, which only ever gain fields.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from flowprefill_sglang.wire.versions import Versions, stated

PROTOCOL_VERSION = 1
"""The newest version that this code speaks."""
SPOKEN = Versions(1, PROTOCOL_VERSION)
"""All that it speaks. A version stays for at least one release after its successor has come: a rolling upgrade has both
in one cluster."""
MAX_CLASS_CHARACTERS = 64


class Phase(StrEnum):
    """Where a dispatched request stands inside a prefill worker."""

    QUEUED = "queued"
    STARTED = "started"
    PREEMPTED = "preempted"
    RESUMED = "resumed"
    FINISHED = "finished"
    FAILED = "failed"


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """What one worker can hold."""

    max_context_tokens: int
    """Longest prompt plus answer that the model was started for."""
    max_kv_tokens: int
    """Tokens that fit in the worker's KV pool."""
    page_tokens: int
    """Tokens in a page of the KV pool."""
    max_running_requests: int


class Load(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker's own count of what it holds; the router's picture is corrected by it."""

    in_flight: int
    """Requests dispatched and not yet answered."""
    silent_s: float = 0.0
    """How long its scheduler or detokenizer process has left a question unanswered; 0 while both answer."""


# ---- worker -> router ---------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """First message of a worker, sent again until the router answers, and after each reconnect."""

    protocol: int
    """The newest version of the protocol that the worker speaks."""
    name: str
    """Unique within the cluster; a worker that comes back under its name replaces its former self."""
    incarnation: str
    """Random, made at the worker's start: tells a reconnect from a restart."""
    version: str
    """FlowPrefill's version, for people: ``/workers``, metrics and refusals show it."""
    model: str
    """The served model name, as clients ask for it."""
    http_url: str
    """The worker's own SGLang HTTP endpoint, for health checks and control requests."""
    bootstrap_host: str
    bootstrap_port: int
    """Where decode instances find this worker for the KV handoff."""
    transfer_backend: str
    limits: Limits
    oldest_protocol: int | None = None
    """The oldest version that it speaks; None from workers that know ``protocol`` alone."""

    @property
    def spoken(self) -> Versions:
        """The versions that the worker speaks."""
        return stated(self.protocol, self.oldest_protocol)


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """A request changed its phase."""

    rid: str
    phase: Phase


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag="answer"):
    """The worker's HTTP answer to a dispatch; one payload frame: the body. Ends the request on this link.

    ``status`` is the HTTP status that SGLang's own endpoint gave; 499 after an abort, 500 for a failure of the link.
    """

    rid: str
    status: int
    content_type: str = "application/json"


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """Sent every ``Welcome.heartbeat_interval_s``, also when idle."""

    load: Load


class Draining(msgspec.Struct, frozen=True, kw_only=True, tag="draining"):
    """The worker takes no new requests and will say goodbye once those in flight have ended."""

    reason: str


class Goodbye(msgspec.Struct, frozen=True, kw_only=True, tag="goodbye"):
    """The worker leaves; requests still in flight here are lost."""

    reason: str


FromWorker = Hello | Progress | Answer | Heartbeat | Draining | Goodbye


# ---- router -> worker ---------------------------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """The router took the worker in."""

    protocol: int
    """The version that both sides speak from here on: the newest that both know."""
    router: str
    heartbeat_interval_s: float
    dead_after_s: float
    """Each side gives the other up after this long without a message."""
    version: str = ""
    """The router's version of FlowPrefill, for people; empty from routers that did not say it yet."""


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The router does not take the worker. Asking again is of use only once one of the two was upgraded."""

    reason: str
    protocol: int
    """The newest version that the router speaks."""
    oldest_protocol: int | None = None
    """The oldest one; None from routers that know ``protocol`` alone."""
    version: str = ""
    """The router's version of FlowPrefill; empty from routers that did not say it yet."""


class HelloAgain(msgspec.Struct, frozen=True, kw_only=True, tag="hello_again"):
    """The router does not know this link (it restarted, or gave the worker up); the worker says hello again."""


class Dispatch(msgspec.Struct, frozen=True, kw_only=True, tag="dispatch"):
    """Prefill this request; one payload frame: the JSON body, PD fields included."""

    rid: str
    path: str
    """The HTTP path the client asked for, e.g. ``/generate``: the worker calls SGLang's handler for it."""
    headers: list[tuple[str, str]] = []
    """Headers to pass on (identity, tracing, authorization); names in lower case."""
    age_s: float = 0.0
    """Time from the router's receipt of the whole request until this message was sent, over all attempts; the time that
    the message itself takes is not in it."""
    ttft_slo_s: Annotated[float, Meta(gt=0)] | None = None
    """The TTFT objective, from that receipt: the first token is due ``ttft_slo_s - age_s`` after this message arrived.
    None from routers that know of no objectives."""
    slo_class: Annotated[str, Meta(max_length=MAX_CLASS_CHARACTERS)] = ""
    """The class that the router counts the request under; a label, which decides nothing by itself."""
    priority: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    """The client's: breaks ties, higher first. None when it gave none. SGLang's own ``priority`` is in the body."""


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Stop working on this request and free what it holds; the answer is then an ``Answer`` with status 499."""

    rid: str


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag="drain"):
    """Finish what is in flight, take nothing new, then say goodbye."""


class Alive(msgspec.Struct, frozen=True, kw_only=True, tag="alive"):
    """The router's answer to a heartbeat."""


ToWorker = Welcome | Refused | HelloAgain | Dispatch | Abort | Drain | Alive
