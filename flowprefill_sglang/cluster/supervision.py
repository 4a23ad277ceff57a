"""What keeps a pool at its desired size: ``(event, now) -> actions``, with no process, socket or clock.

A shell tells what it sees of each member, and does what it is told. A member that ends, hangs, or does not start in
time is killed and started again after a pause, which doubles with each failure in a row. Members that are too many are
drained first. Each start has a number of its own, so that late news of a former process is not taken for news of the
present one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

Kind = Literal["prefill", "decode"]
KINDS: Final[tuple[Kind, ...]] = ("prefill", "decode")


class MemberState(StrEnum):
    """Where a member is; one that is stopped is no member any more."""

    STARTING = "starting"
    """It waits for a place, or its process is being started."""
    LOADING = "loading"
    """Its process runs, and does not take requests yet."""
    READY = "ready"
    DRAINING = "draining"
    """Nothing new is sent to it; it ends once what it has in hand is done."""
    BACKING_OFF = "backing_off"
    """It failed, and is started again at ``retry_at``."""


_TRANSITIONS: Final = {
    MemberState.STARTING: {MemberState.LOADING, MemberState.BACKING_OFF},
    MemberState.LOADING: {MemberState.READY, MemberState.DRAINING, MemberState.BACKING_OFF},
    MemberState.READY: {MemberState.DRAINING, MemberState.BACKING_OFF},
    MemberState.DRAINING: set(),
    MemberState.BACKING_OFF: {MemberState.STARTING},
}


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Lengths of time."""

    start_s: float = 600.0
    """From the process's start until it takes requests. Large models load for minutes."""
    sick_s: float = 10.0
    """How long a ready member may fail its health checks: longer than a pause of the network, shorter than a client's
    patience."""
    drain_s: float = 120.0
    """How long a draining member may take before it is killed."""
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    steady_s: float = 60.0
    """A member that was ready for so long has no failures behind it."""


@dataclass(slots=True, kw_only=True)
class Member:
    """One prefill worker or decode instance, across its restarts. Points in time are those that the shell passes in."""

    name: str
    kind: Kind
    state: MemberState = MemberState.STARTING
    start: int = 1
    """Number of its present start, from 1."""
    failures: int = 0
    """In a row."""
    reason: str = ""
    """What it waits for, or what ails it now."""
    last_failure: str = ""
    """How its last process ended that was not meant to."""
    since: float = 0.0
    """When it came into its state."""
    well_at: float = 0.0
    """When its health was last good."""
    retry_at: float = 0.0

    @property
    def index(self) -> int:
        """Its number among its kind."""
        return int(self.name.rpartition("-")[2])

    def enter(self, state: MemberState, now: float) -> None:
        """Change its state. Raises ValueError for a way that there is not."""
        if state not in _TRANSITIONS[self.state]:
            raise ValueError(f"{self.name} cannot go from {self.state} to {state}")
        self.state, self.since = state, now


@dataclass(frozen=True)
class Scaled:
    """Somebody wants so many."""

    prefill: int
    decode: int


@dataclass(frozen=True)
class Waiting:
    """It has no place yet, and why."""

    name: str
    start: int
    reason: str


@dataclass(frozen=True)
class Running:
    """Its process runs; ``takes_requests`` is what the router says of it, None while the router says nothing.
    ``reason``: why not."""

    name: str
    start: int
    takes_requests: bool | None
    reason: str = ""


@dataclass(frozen=True)
class Ended:
    """Its process is gone, or was never started."""

    name: str
    start: int
    reason: str


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Scaled | Waiting | Running | Ended | Tick


@dataclass(frozen=True)
class Start:
    """Start a process for this member."""

    name: str
    kind: Kind
    start: int


@dataclass(frozen=True)
class Drain:
    """Send it nothing new, and have it end when it is done."""

    name: str


@dataclass(frozen=True)
class Remove:
    """End what may be left of this start, by force, and have the router forget it."""

    name: str
    start: int


Action = Start | Drain | Remove


class Supervisor:
    """The picture of a pool. Owned by one shell; not thread-safe."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self.members: dict[str, Member] = {}
        self.desired: dict[Kind, int] = dict.fromkeys(KINDS, 0)

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about this, in order. ``now``: seconds on a clock that never goes back."""
        match event:
            case Scaled():
                return self._scale({"prefill": event.prefill, "decode": event.decode}, now)
            case Tick():
                return [action for member in list(self.members.values()) for action in self._tick(member, now)]
        member = self.members.get(event.name)
        if member is None or member.start != event.start or member.state is MemberState.BACKING_OFF:
            return []
        match event:
            case Waiting():
                member.reason = event.reason
            case Running():
                self._running(member, event, now)
            case Ended():
                return self._ended(member, event.reason, now)
        return []

    def _scale(self, desired: dict[Kind, int], now: float) -> list[Action]:
        self.desired = desired
        return [action for kind in KINDS for action in self._resize(kind, now)]

    def _resize(self, kind: Kind, now: float) -> Iterator[Action]:
        staying = [m for m in self.members.values() if m.kind == kind and m.state is not MemberState.DRAINING]
        surplus = len(staying) - self.desired[kind]
        # Those that serve nobody go first, then the youngest.
        by_worth = sorted(staying, key=lambda m: (m.state is MemberState.READY, -m.index))
        for member in by_worth[: max(0, surplus)]:
            if member.state is MemberState.READY:
                member.enter(MemberState.DRAINING, now)
                yield Drain(member.name)
            else:
                del self.members[member.name]
                if member.state is not MemberState.BACKING_OFF:
                    yield Remove(member.name, member.start)
        for _ in range(-surplus):
            name = self._free_name(kind)
            member = self.members[name] = Member(name=name, kind=kind, since=now, well_at=now)
            yield Start(name, kind, member.start)

    def _free_name(self, kind: Kind) -> str:
        number = 0
        while f"{kind}-{number}" in self.members:
            number += 1
        return f"{kind}-{number}"

    def _running(self, member: Member, event: Running, now: float) -> None:
        if member.state is MemberState.STARTING:
            member.enter(MemberState.LOADING, now)
            member.reason = ""
        if event.takes_requests:
            member.well_at = now
            if member.state is MemberState.LOADING:
                member.enter(MemberState.READY, now)
            member.reason = ""
            if member.state is MemberState.READY and now - member.since >= self._patience.steady_s:
                member.failures = 0
        elif member.state is MemberState.READY:
            member.reason = event.reason
            if event.takes_requests is None:  # nobody is to be killed for what is not known
                member.well_at = now

    def _ended(self, member: Member, reason: str, now: float) -> list[Action]:
        remove = Remove(member.name, member.start)
        if member.state is MemberState.DRAINING:
            del self.members[member.name]
            return [remove, *self._resize(member.kind, now)]
        patience = self._patience
        pause_s = min(patience.first_pause_s * 2.0 ** min(member.failures, 32), patience.longest_pause_s)
        member.enter(MemberState.BACKING_OFF, now)
        member.failures += 1
        member.reason, member.last_failure, member.retry_at = "", reason, now + pause_s
        return [remove]

    def _tick(self, member: Member, now: float) -> list[Action]:
        patience = self._patience
        for_s = now - member.since
        match member.state:
            case MemberState.BACKING_OFF if now >= member.retry_at:
                member.enter(MemberState.STARTING, now)
                member.start += 1
                return [Start(member.name, member.kind, member.start)]
            case MemberState.LOADING if for_s > patience.start_s:
                return self._ended(member, f"took no requests {patience.start_s:g} s after its start", now)
            case MemberState.READY if now - member.well_at > patience.sick_s:
                why = member.reason or "no answer"
                return self._ended(member, f"failed its health checks for {patience.sick_s:g} s: {why}", now)
            case MemberState.DRAINING if for_s > patience.drain_s:
                return self._ended(member, f"had not drained after {patience.drain_s:g} s", now)
        return []
