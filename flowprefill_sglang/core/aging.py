"""Nobody waits for ever: a share of the device for those that the policy keeps putting off.

A request older than ``max_wait_s``, or a task suspended longer than ``max_suspend_s``, is *promoted*, which is a mark
that stays until it has ended, through all chunks of its prompt; a task inherits it from its requests. The promoted are
served in order of arrival, so nothing that arrived later overtakes them for ever.

**They are guaranteed a share, not the device.** ``max_share`` of its time, as a credit that grows with the clock and is
charged the time that promoted ones ran, whatever let them run. What the credit stands at is their ``Claim``:

- 0 or more: the oldest of them runs **first**, until the next event;
- less, by up to ``max_share × max_wait_s``: first only in a **gap**, i.e. if all of it can run and everyone on time is
  still on time, as far as anyone knows;
- less than that: **none**; they have had their share for now.

Under ``feasible``, which knows who is on time, the promoted always come right behind those and before the others.

So a long overdue prompt is computed in slices between the short ones. An earlier rule let it run to its end, and every
request that arrived meanwhile was late too: under lasting overload that cost several times what its share of the
device is worth (docs/scheduling.md has the figures).

**The bound.** Let W be the work that had arrived and was not done when a request arrived, its own included, and P the
longest remaining time of any candidate, at most ``max_wait_s``. Then it has ended no later than
``max(max_wait_s, objective) + 2·max_wait_s + W / max_share + 2·P`` after its arrival, whatever arrives later: it
becomes overdue, and is marked at the next event, no later than when what runs ends, since there is no timer; the
largest debt there can be is paid; and from then on the promoted that arrived no later have their share, of which none
is lost, since between two events no more credit is earned than can be kept. Memory is supposed to be had, and
predictions to hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from math import inf
from typing import Protocol

from flowprefill_sglang.core.candidate import Candidate
from flowprefill_sglang.core.policies import Policy, feasible


@dataclass(frozen=True, slots=True, kw_only=True)
class AgingLimits:
    max_wait_s: float = 60.0
    """Since arrival. Long past any objective for a first token, and still within the patience of HTTP clients."""
    max_suspend_s: float = 30.0
    """At a stretch. Shorter than the wait, since a suspended task holds memory that others wait for."""
    max_share: float = 0.02
    """Of the device's time, for promoted ones, in (0, 1]. 1 lets them run first whatever the load. More of it makes
    more requests late and hardly anyone's wait shorter, since gaps do most of the work (docs/scheduling.md)."""

    def __post_init__(self) -> None:
        if self.max_wait_s <= 0 or self.max_suspend_s <= 0 or not 0 < self.max_share <= 1:
            raise ValueError(f"max_wait_s and max_suspend_s must be positive, max_share in (0, 1]: {self}")


class Claim(Enum):
    """How far the promoted may go ahead of others now."""

    NONE = auto()
    GAP = auto()
    """Before those on time, if that makes none of them late."""
    FIRST = auto()


class AgedPolicy(Protocol):
    """A policy that heeds promotion: takes what a policy takes, and the claim of the promoted."""

    def __call__(self, candidates: Sequence[Candidate], now: float, claim: Claim = Claim.NONE) -> list[Candidate]: ...


def overdue(candidates: Iterable[Candidate], now: float, limits: AgingLimits) -> list[Candidate]:
    """Those that should be promoted and are not yet, in order of arrival.

    A finite objective longer than ``max_wait_s`` takes its place: a request promised 100 s is not late at 60. It does
    so even when a prediction says that the promise cannot be kept: being overdue depends on time alone.
    """
    arrived_before, suspended_before = now - limits.max_wait_s, now - limits.max_suspend_s
    found = [
        candidate
        for candidate in candidates
        if (
            (candidate.arrived_at < arrived_before and (candidate.deadline_at < now or candidate.deadline_at == inf))
            or (candidate.suspended_at is not None and candidate.suspended_at < suspended_before)
        )
        and not candidate.is_promoted
    ]
    found.sort(key=_arrival)
    return found


class Promotions:
    """Who is promoted, and their claim. Owned by the scheduler's state machine, which tells it how long promoted ones
    ran and asks it once in each round, before the policy; the one writer of ``Candidate.is_promoted`` apart from
    whoever makes a task's candidate."""

    def __init__(self, limits: AgingLimits, now: float) -> None:
        self._limits = limits
        self._gap_s = limits.max_share * limits.max_wait_s
        self._credit_s = 0.0
        self._credited_at = now

    @property
    def claim(self) -> Claim:
        """As of the last round or charge."""
        if self._credit_s >= 0:
            return Claim.FIRST
        return Claim.GAP if self._credit_s > -self._gap_s else Claim.NONE

    def ran(self, seconds: float) -> None:
        """A promoted candidate had the device for so long. A debt has an end: two ``max_wait_s`` pay the largest."""
        self._credit_s = max(-2 * self._gap_s, self._credit_s - seconds)

    def promote(self, candidates: Iterable[Candidate], now: float) -> int:
        """Mark those that are overdue. Returns how many, for ``starvation_promotion_total``.

        Credit is kept only while someone is promoted and was not served, which takes no longer than an event is away;
        no one is to be blocked for what nobody claimed.
        """
        self._credit_s += self._limits.max_share * (now - self._credited_at)
        self._credited_at = now
        is_claimed = any(candidate.is_promoted for candidate in candidates)
        self._credit_s = min(self._gap_s if is_claimed else 0.0, self._credit_s)
        found = overdue(candidates, now, self._limits)
        for candidate in found:
            candidate.is_promoted = True
        return len(found)


def with_aging(policy: Policy) -> AgedPolicy:
    """The policy, with the promoted where their claim puts them, in order of arrival."""

    def aged(candidates: Sequence[Candidate], now: float, claim: Claim = Claim.NONE) -> list[Candidate]:
        promoted = [candidate for candidate in candidates if candidate.is_promoted]
        if not promoted:
            return policy(candidates, now)
        if claim is Claim.FIRST:
            # As of now, not of when the promoted will be done: the next event asks again.
            others = policy([candidate for candidate in candidates if not candidate.is_promoted], now)
            return sorted(promoted, key=_arrival) + others
        order = policy(candidates, now)
        return _behind_those_on_time(order, now, claim) if policy is feasible else order

    return aged


def _behind_those_on_time(order: list[Candidate], now: float, claim: Claim) -> list[Candidate]:
    """The promoted after those on time, with which ``feasible``'s order begins; before them in a gap that is as long as
    the oldest. A promoted one that is on time is one of those."""
    on_time, gap_s, ends_at = 0, inf, now
    for candidate in order:
        ends_at += candidate.remaining_s
        if candidate.deadline_at == inf or ends_at > candidate.deadline_at:
            break
        gap_s = min(gap_s, candidate.deadline_at - ends_at)
        on_time += 1
    late = [candidate for candidate in order[on_time:] if candidate.is_promoted]
    late.sort(key=_arrival)
    others = [candidate for candidate in order[on_time:] if not candidate.is_promoted]
    if late and claim is Claim.GAP and late[0].remaining_s <= gap_s:
        return late + order[:on_time] + others
    return order[:on_time] + late + others


def _arrival(candidate: Candidate) -> tuple[float, int]:
    return (candidate.arrived_at, candidate.key)
