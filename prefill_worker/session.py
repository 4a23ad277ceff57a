"""A worker's side of the protocol with its router: events in, actions out; no socket, no clock, no tasks.

::

    GREETING ──Welcome──▶ JOINED ──Drain / own shutdown──▶ DRAINING ──nothing in flight──▶ LEFT
     ▲    │                ▲  │                               │
     │ Refused             │  │                               │
     │    ▼                │  │                               │
     │ REFUSED ──Welcome───┘  │                               │
     └── router silent, or HelloAgain: requests in flight are dropped

``LEFT`` is final. A router that refused this worker for its version may be upgraded, or replaced at its address, so
``REFUSED`` is not. A router that forgot this worker has no client waiting for its answers, so what is in flight for it
is aborted: the KV it holds is worth more than an answer that nobody reads.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from flowprefill_sglang.errors import InternalError
from flowprefill_sglang.wire.framing import Buffer
from flowprefill_sglang.wire.messages import (
    Abort,
    Alive,
    Answer,
    Dispatch,
    Drain,
    Draining,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    HelloAgain,
    Load,
    Phase,
    Progress,
    Refused,
    ToWorker,
    Welcome,
)
from flowprefill_sglang.wire.versions import Side, stated, why_not

UNANSWERED_LOG_INTERVAL_S = 30.0
"""How often a worker that no router answers says so: a wrong address looks like a router that is not up yet."""


class State(Enum):
    """Where the link stands; the picture above is the transition table."""

    GREETING = auto()
    JOINED = auto()
    DRAINING = auto()
    REFUSED = auto()
    LEFT = auto()


_NEXT: dict[State, frozenset[State]] = {
    State.GREETING: frozenset({State.JOINED, State.REFUSED, State.LEFT}),
    State.JOINED: frozenset({State.GREETING, State.DRAINING, State.LEFT}),
    State.DRAINING: frozenset({State.GREETING, State.LEFT}),
    State.REFUSED: frozenset({State.JOINED, State.LEFT}),
    State.LEFT: frozenset(),
}

_UNWELCOMED = (State.GREETING, State.REFUSED)


@dataclass(frozen=True)
class Send:
    """Send a message to the router."""

    message: FromWorker
    payload: tuple[Buffer, ...] = ()


@dataclass(frozen=True)
class Prefill:
    """Hand a request to SGLang."""

    dispatch: Dispatch
    body: Buffer


@dataclass(frozen=True)
class Cancel:
    """Stop a request that was handed to SGLang."""

    rid: str


@dataclass(frozen=True)
class Reconnect:
    """Close the connection and open a new one: whatever is queued in it is out of date."""


@dataclass(frozen=True)
class Log:
    """Something an operator should read; ``level`` is the standard library's."""

    text: str
    level: int = logging.WARNING


Action = Send | Prefill | Cancel | Reconnect | Log


class Session:
    """The state of one link. Owned by the worker's event loop; every method returns what to do next, in order.

    ``now`` is a monotonic clock in seconds. ``next_tick_at`` says when ``tick`` wants to be called at the latest.
    """

    def __init__(
        self, hello: Hello, *, hello_retry_s: float, refused_retry_s: float, leave_after_s: float, now: float
    ) -> None:
        self.state = State.GREETING
        self.in_flight: set[str] = set()
        self._phases: dict[str, Phase] = {}  # of those in flight that have begun
        self.refusal = ""
        """Why the router does not take this worker; empty unless it has said so last."""
        self.protocol: int | None = None
        """The version of the protocol that was agreed with the router that this worker joined last."""
        self._hello = hello
        self._hello_retry_s = hello_retry_s
        self._refused_retry_s = refused_retry_s
        self._leave_after_s = leave_after_s
        self._heartbeat_interval_s = hello_retry_s
        self._dead_after_s = 0.0
        self._heard_at = now
        self._leave_at = float("inf")
        self._greeting_since = now
        self._complain_at = now + UNANSWERED_LOG_INTERVAL_S
        self.next_tick_at = now

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen on this link."""
        return self.state is State.LEFT

    def tick(self, now: float, silent_s: float = 0.0) -> list[Action]:
        """Greet, beat, notice a silent router, leave when drained. ``silent_s``: of SGLang's scheduler, for the
        router to know."""
        if self.is_over:
            self.next_tick_at = float("inf")
            return []
        if self.state is State.GREETING:
            return self._greet(now)
        if self.state is State.REFUSED:
            self.next_tick_at = now + self._refused_retry_s
            return [Send(self._hello)]
        if now - self._heard_at > self._dead_after_s:
            silent_s = now - self._heard_at
            return [Log(f"the router has been silent for {silent_s:.1f} s; greeting it again"), *self._greet_again(now)]
        if self.state is State.DRAINING and (not self.in_flight or now >= self._leave_at):
            return self.leave("drained" if not self.in_flight else "drained too slowly")
        self.next_tick_at = now + self._heartbeat_interval_s
        return [Send(Heartbeat(load=Load(in_flight=len(self.in_flight), silent_s=silent_s)))]

    def receive(self, message: ToWorker, payload: Sequence[Buffer], now: float) -> list[Action]:
        """One message from the router."""
        if self.is_over:
            return []
        self._heard_at = now
        match message:
            case Welcome():
                return self._welcomed(message, now)
            case Refused():
                return self._refused(message.reason, now)
            case HelloAgain():
                return [] if self.state in _UNWELCOMED else self._greet_again(now)
            case Dispatch():
                return self._dispatched(message, payload[0])
            case Abort():
                return [Cancel(message.rid)] if message.rid in self.in_flight else []
            case Drain():
                return self.drain("asked by the router", now)
            case Alive():
                return []

    def answered(self, rid: str, status: int, content_type: str, body: Buffer) -> list[Action]:
        """SGLang is done with a request. Answers to requests that were dropped meanwhile go nowhere."""
        if rid not in self.in_flight:
            return []
        self.in_flight.discard(rid)
        self._phases.pop(rid, None)
        phase = Phase.FINISHED if status < 400 else Phase.FAILED
        actions: list[Action] = [
            Send(Progress(rid=rid, phase=phase)),
            Send(Answer(rid=rid, status=status, content_type=content_type), (body,)),
        ]
        if self.state is State.DRAINING and not self.in_flight:
            actions += self.leave("drained")
        return actions

    def progressed(self, rid: str, phase: Phase) -> list[Action]:
        """SGLang's scheduler started, preempted or resumed a prompt of a request. Only news go to the router: a request
        may be a batch of prompts, and each prompt several chunks that start one after the other."""
        if rid not in self.in_flight:
            return []
        former = self._phases.get(rid, Phase.QUEUED)
        if phase is Phase.STARTED and former is Phase.PREEMPTED:
            phase = Phase.RESUMED
        is_running = former in (Phase.STARTED, Phase.RESUMED)
        if is_running != (phase is Phase.PREEMPTED):
            return []
        self._phases[rid] = phase
        return [Send(Progress(rid=rid, phase=phase))]

    def drain(self, reason: str, now: float) -> list[Action]:
        """Take nothing new; leave once nothing is in flight."""
        if self.state in _UNWELCOMED:
            return self.leave(reason)
        if self.state is not State.JOINED:
            return []
        self._move(State.DRAINING)
        self._leave_at = now + self._leave_after_s
        actions: list[Action] = [Log(f"draining: {reason}", logging.INFO), Send(Draining(reason=reason))]
        return actions if self.in_flight else [*actions, *self.leave("drained")]

    def leave(self, reason: str) -> list[Action]:
        """Say goodbye now. What is still in flight is cancelled."""
        if self.is_over:
            return []
        greeted = self.state not in _UNWELCOMED
        self._move(State.LEFT)
        actions: list[Action] = [Cancel(rid) for rid in sorted(self.in_flight)]
        self.in_flight.clear()
        self._phases.clear()
        return [*actions, Send(Goodbye(reason=reason))] if greeted else actions

    def _greet(self, now: float) -> list[Action]:
        self.next_tick_at = now + self._hello_retry_s
        if now < self._complain_at:
            return [Send(self._hello)]
        self._complain_at = now + UNANSWERED_LOG_INTERVAL_S
        waited_s = now - self._greeting_since
        return [Log(f"no router has answered for {waited_s:.0f} s; greeting on"), Send(self._hello)]

    def _welcomed(self, message: Welcome, now: float) -> list[Action]:
        if self.state not in _UNWELCOMED:
            return []  # the answer to a greeting that was sent twice
        if message.protocol not in self._hello.spoken:
            router = Side(what="router", software=message.version, versions=stated(message.protocol, None))
            worker = Side(what="worker", software=self._hello.version, versions=self._hello.spoken)
            goodbye = Send(Goodbye(reason="the version of the protocol in the welcome is not spoken here"))
            return [*self._refused(why_not("router-worker", worker, router), now), goodbye]
        self._move(State.JOINED)
        self.refusal = ""
        self.protocol = message.protocol
        self._heartbeat_interval_s = message.heartbeat_interval_s
        self._dead_after_s = message.dead_after_s
        self.next_tick_at = now + self._heartbeat_interval_s
        software = f", FlowPrefill {message.version}" if message.version else ""
        return [Log(f"joined router {message.router} (protocol version {self.protocol}{software})", logging.INFO)]

    def _refused(self, reason: str, now: float) -> list[Action]:
        """Said once for each reason: the router will repeat it at each greeting."""
        if self.state not in _UNWELCOMED:
            return [Log(f"ignored a refusal after the router's welcome: {reason}")]
        if self.state is State.GREETING:
            self._move(State.REFUSED)
        self.next_tick_at = now + self._refused_retry_s
        if reason == self.refusal:
            return []
        self.refusal = reason
        return [Log(f"refused by the router; asking again every {self._refused_retry_s:g} s: {reason}", logging.ERROR)]

    def _dispatched(self, message: Dispatch, body: Buffer) -> list[Action]:
        rid = message.rid
        if self.state is not State.JOINED:
            refusal = b'{"error":{"message":"this worker is draining","type":"server_error","code":"draining"}}'
            return [Send(Answer(rid=rid, status=503), (refusal,))]
        if rid in self.in_flight:
            return [Log(f"request {rid} was dispatched twice; the second one is ignored")]
        self.in_flight.add(rid)
        return [Send(Progress(rid=rid, phase=Phase.QUEUED)), Prefill(message, body)]

    def _greet_again(self, now: float) -> list[Action]:
        self._move(State.GREETING)
        cancelled = [Cancel(rid) for rid in sorted(self.in_flight)]
        self.in_flight.clear()
        self._phases.clear()
        self._greeting_since = now
        self._complain_at = now + UNANSWERED_LOG_INTERVAL_S
        return [*cancelled, Reconnect(), *self._greet(now)]

    def _move(self, state: State) -> None:
        if state not in _NEXT[self.state]:
            raise InternalError(f"a worker's link cannot go from {self.state.name} to {state.name}")
        self.state = state
