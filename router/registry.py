"""The router's picture of its prefill workers: messages and ticks in, effects out; no socket, no clock.

One owner: the router's event loop. Every request handed to a worker (``assign``) comes back exactly once, as
``Answered`` or as ``Lost``, whatever the worker, the network or a stranger does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from flowprefill_sglang import __version__
from flowprefill_sglang.errors import InternalError
from flowprefill_sglang.router.states import WorkerState, transition
from flowprefill_sglang.wire.messages import (
    SPOKEN,
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
from flowprefill_sglang.wire.versions import Side, Versions, newest_common, why_not

FORGET_AFTER_S: Final = 600.0
"""A dead worker stays visible in ``/workers`` for so long, unless it comes back."""


@dataclass(slots=True, kw_only=True)
class Assignment:
    """One request that a prefill worker holds."""

    rid: str
    tokens: int
    """Predicted prefill work."""
    prompt_bytes: int
    """Length of the prompt's text, to learn from; 0 when there is none."""
    assigned_at: float
    slo_class: str
    phase: Phase | None = None
    """None until the worker has reported."""


@dataclass(slots=True, kw_only=True)
class PrefillWorker:
    """What the router knows about one prefill worker."""

    hello: Hello
    link: bytes
    """ZeroMQ routing id of its present connection."""
    heard_at: float
    protocol: int
    """The version of the protocol that was agreed."""
    state: WorkerState = WorkerState.JOINING
    reason: str = ""
    """Why it is in its state."""
    load: Load | None = None
    is_silent: bool = False
    """Its scheduler process leaves a question unanswered, for longer than the worker itself may be silent. It may be
    busy with one long operator, or hang, which the worker then finds out and ends."""
    assigned: dict[str, Assignment] = field(default_factory=dict)
    outstanding_tokens: int = 0
    dispatched_total: int = 0
    """Requests handed to it since it joined."""

    @property
    def name(self) -> str:
        return self.hello.name


@dataclass(slots=True, frozen=True)
class Send:
    """Put ``message`` on ``link``."""

    link: bytes
    message: ToWorker


@dataclass(slots=True, frozen=True)
class Answered:
    """The worker's answer for a request; its payload frame came with it."""

    answer: Answer
    assignment: Assignment


@dataclass(slots=True, frozen=True)
class Lost:
    """The worker will never answer this request."""

    rid: str
    reason: str


@dataclass(slots=True, frozen=True)
class Changed:
    """A worker's state changed; for the log."""

    name: str
    state: WorkerState
    reason: str


@dataclass(slots=True, frozen=True)
class TurnedAway:
    """A worker that speaks no common version of the protocol was refused; for the log."""

    name: str
    version: str
    """Its version of FlowPrefill."""
    reason: str


Effect = Send | Answered | Lost | Changed | TurnedAway


class PrefillRegistry:
    """Prefill workers by name and link, and the requests that each one holds."""

    def __init__(
        self, *, router: str, heartbeat_interval_s: float, dead_after_s: float, spoken: Versions = SPOKEN
    ) -> None:
        self._welcomes = {
            protocol: Welcome(
                protocol=protocol,
                router=router,
                heartbeat_interval_s=heartbeat_interval_s,
                dead_after_s=dead_after_s,
                version=__version__,
            )
            for protocol in range(spoken.oldest, spoken.newest + 1)
        }
        self._spoken = spoken
        self._dead_after_s = dead_after_s
        self.workers: dict[str, PrefillWorker] = {}
        self.preemptions: Counter[str] = Counter()
        """Suspensions that workers reported, by the suspended request's SLO class."""
        self._by_link: dict[bytes, PrefillWorker] = {}
        self._holder: dict[str, PrefillWorker] = {}  # by rid
        self._ready: list[PrefillWorker] | None = None  # cache, dropped at each change of a state

    # ---- what dispatch policies look at --------------------------------------------------------------------------

    def ready(self) -> list[PrefillWorker]:
        """Workers that take requests, in the order they joined, those whose scheduler is silent only where there is no
        other. Do not change the list."""
        if self._ready is None:
            ready = [worker for worker in self.workers.values() if worker.state is WorkerState.READY]
            self._ready = [worker for worker in ready if not worker.is_silent] or ready
        return self._ready

    def holds(self, rid: str) -> bool:
        """Whether a worker still owes an answer or a loss for this request."""
        return rid in self._holder

    # ---- the router's own decisions ------------------------------------------------------------------------------

    def assign(self, name: str, dispatch: Dispatch, *, tokens: int, prompt_bytes: int = 0, now: float) -> Send:
        """Hand a request to a ready worker. Raises InternalError for another worker or a request already held."""
        worker = self.workers.get(name)
        if worker is None or worker.state is not WorkerState.READY or dispatch.rid in self._holder:
            raise InternalError(f"request {dispatch.rid} cannot be assigned to {name}")
        worker.assigned[dispatch.rid] = Assignment(
            rid=dispatch.rid,
            tokens=tokens,
            prompt_bytes=prompt_bytes,
            assigned_at=now,
            slo_class=dispatch.slo_class,
        )
        worker.outstanding_tokens += tokens
        worker.dispatched_total += 1
        self._holder[dispatch.rid] = worker
        return Send(worker.link, dispatch)

    def abort(self, rid: str) -> list[Effect]:
        """Ask the holder to stop; its answer still comes. Nothing when nobody holds the request."""
        worker = self._holder.get(rid)
        return [Send(worker.link, Abort(rid=rid))] if worker is not None else []

    def drain(self, name: str) -> list[Effect]:
        """Ask a ready worker to leave once it is done."""
        worker = self.workers[name]
        if worker.state is not WorkerState.READY:
            return []
        return [self._change(worker, WorkerState.DRAINING, "asked to drain"), Send(worker.link, Drain())]

    # ---- what comes in -------------------------------------------------------------------------------------------

    def on_message(self, link: bytes, message: FromWorker, now: float) -> list[Effect]:
        """One message of a worker, or of a stranger."""
        if isinstance(message, Hello):
            return self._on_hello(link, message, now)
        worker = self._by_link.get(link)
        if worker is None:
            # A goodbye needs no answer; anything else comes from a worker that this router does not know (any more).
            return [] if isinstance(message, Goodbye) else [Send(link, HelloAgain())]
        worker.heard_at = now
        match message:
            case Answer():
                assignment = self._release(worker, message.rid)
                return [Answered(message, assignment)] if assignment is not None else []
            case Progress():
                if (assignment := worker.assigned.get(message.rid)) is not None:
                    assignment.phase = message.phase
                    if message.phase is Phase.PREEMPTED:
                        self.preemptions[assignment.slo_class] += 1
                return []
            case Heartbeat():
                worker.load = message.load
                self._note_silence(worker, message.load.silent_s)
                return [Send(link, Alive()), *self._reconcile(worker, now)]
            case Draining():
                if worker.state is WorkerState.READY:
                    return [self._change(worker, WorkerState.DRAINING, message.reason)]
                return []
            case Goodbye():
                return self._bury(worker, f"it said goodbye: {message.reason}")

    def on_unreachable(self, link: bytes) -> list[Effect]:
        """A message could not be sent: the connection is gone, or its queue is full."""
        worker = self._by_link.get(link)
        return self._bury(worker, "its connection is gone") if worker is not None else []

    def on_tick(self, now: float) -> list[Effect]:
        """Give up workers that have been silent too long; forget those dead for long. Call every second or so."""
        effects: list[Effect] = []
        for worker in list(self.workers.values()):
            silent_s = now - worker.heard_at
            if worker.state is WorkerState.DEAD:
                if silent_s > FORGET_AFTER_S:
                    del self.workers[worker.name]
            elif silent_s > self._dead_after_s:
                effects += self._bury(worker, f"no message for {silent_s:.1f} s")
        return effects

    # ---- inside --------------------------------------------------------------------------------------------------

    def _on_hello(self, link: bytes, hello: Hello, now: float) -> list[Effect]:
        protocol = newest_common(self._spoken, hello.spoken)
        if protocol is None:
            return self._turn_away(link, hello)
        welcome = Send(link, self._welcomes[protocol])
        effects: list[Effect] = []
        known = self.workers.get(hello.name)
        other = self._by_link.get(link)
        if other is not None and other is not known:  # one connection, now under another name
            effects += self._bury(other, f"its link now belongs to {hello.name}")
        if known is not None and known.link == link and known.hello.incarnation == hello.incarnation:
            known.heard_at = now  # it has not seen the welcome yet
            if known.state is not WorkerState.DEAD:
                return [*effects, welcome]
        if known is not None and known.state is not WorkerState.DEAD:
            # A worker greets on a new link after it has dropped all that it held (prefill_worker/session.py).
            restarted = known.hello.incarnation != hello.incarnation
            effects += self._bury(known, "it restarted" if restarted else "it lost its connection and came back")
        worker = PrefillWorker(hello=hello, link=link, heard_at=now, protocol=protocol)
        self.workers[hello.name] = worker
        self._by_link[link] = worker
        return [*effects, self._change(worker, WorkerState.READY, "hello"), welcome]

    def _turn_away(self, link: bytes, hello: Hello) -> list[Effect]:
        """A worker of that name which is served already stays: it may be the one that this one is to replace."""
        worker = Side(what=f"worker {hello.name}", software=hello.version, versions=hello.spoken)
        router = Side(what="router", software=__version__, versions=self._spoken)
        reason = why_not("router-worker", worker, router)
        refused = Refused(
            reason=reason, protocol=self._spoken.newest, oldest_protocol=self._spoken.oldest, version=__version__
        )
        return [TurnedAway(hello.name, hello.version, reason), Send(link, refused)]

    def _note_silence(self, worker: PrefillWorker, silent_s: float) -> None:
        is_silent = silent_s > self._dead_after_s
        if is_silent is not worker.is_silent:
            worker.is_silent, self._ready = is_silent, None

    def _reconcile(self, worker: PrefillWorker, now: float) -> Iterator[Effect]:
        """A worker that holds nothing has lost whatever the router believes it holds: messages can vanish with a
        connection. Requests younger than a heartbeat's way there and back are left alone."""
        if worker.load is None or worker.load.in_flight > 0:
            return
        for assignment in list(worker.assigned.values()):
            if now - assignment.assigned_at > self._dead_after_s:
                self._release(worker, assignment.rid)
                yield Lost(assignment.rid, f"prefill worker {worker.name} no longer holds it")

    def _release(self, worker: PrefillWorker, rid: str) -> Assignment | None:
        assignment = worker.assigned.pop(rid, None)
        if assignment is not None:
            worker.outstanding_tokens -= assignment.tokens
            del self._holder[rid]
        return assignment

    def _bury(self, worker: PrefillWorker, reason: str) -> list[Effect]:
        self._by_link.pop(worker.link, None)
        lost = [rid for rid in list(worker.assigned) if self._release(worker, rid) is not None]
        return [
            self._change(worker, WorkerState.DEAD, reason),
            *(Lost(rid, f"prefill worker {worker.name} is gone: {reason}") for rid in lost),
        ]

    def _change(self, worker: PrefillWorker, state: WorkerState, reason: str) -> Changed:
        worker.state, worker.reason = transition(worker.state, state), reason
        self._ready = None
        return Changed(worker.name, state, reason)
