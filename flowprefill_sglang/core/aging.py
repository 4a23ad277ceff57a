"""Nobody waits for ever: promotion of those that the policy keeps putting off.

A request older than ``max_wait_s``, or a task suspended longer than ``max_suspend_s``, is *promoted*: it runs before
all others, the promoted among themselves in order of arrival, so nothing that arrived later preempts it again.

**Promotion is a mark, not a condition** that each round looks at anew. A task promoted for being suspended is not
suspended once it runs; without the mark the next arrival would preempt it, and it would flip between the two. The mark
stays until the candidate has ended, through all chunks of its prompt, and a task inherits it from its requests.

**Promotions have a budget**: ``max_share`` of the device's time, as a credit that grows with the clock and is charged
the predicted remaining time of each promoted one. While few are overdue, the credit is there when it is needed, and one
is promoted at the next event. Under lasting overload, where ever more work becomes overdue, an unlimited rule would
hand the whole device to requests that are late already, first come, first served, and make all others late too
(docs/scheduling.md has the figures).

**The bound.** Let W be the work that had arrived and was not done when a request arrived, its own included, and P the
longest remaining time of any candidate, at most ``max_wait_s``. Then it has ended no later than
``max(max_wait_s, objective) + (W + P) / max_share + P + W`` after its arrival, whatever arrives later: it becomes
overdue; credit is earned for a debt of at most P and for those overdue that arrived earlier; what runs ends, since
rounds happen at events and there is no timer; they and it run. Memory is supposed to be had, and predictions to hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from flowprefill_sglang.core.candidate import Candidate
from flowprefill_sglang.core.policies import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class AgingLimits:
    max_wait_s: float = 60.0
    """Since arrival. Long past any objective for a first token, and still within the patience of HTTP clients."""
    max_suspend_s: float = 30.0
    """At a stretch. Shorter than the wait, since a suspended task holds memory that others wait for."""
    max_share: float = 0.05
    """Of the device's time, for promoted ones, in (0, 1]. 1 promotes at once whatever the load."""

    def __post_init__(self) -> None:
        if self.max_wait_s <= 0 or self.max_suspend_s <= 0 or not 0 < self.max_share <= 1:
            raise ValueError(f"max_wait_s and max_suspend_s must be positive, max_share in (0, 1]: {self}")


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
    """Who is promoted, within the budget. Owned by the scheduler's state machine, which calls it once in each round
    before the policy; the one writer of ``Candidate.is_promoted`` apart from whoever makes a task's candidate."""

    def __init__(self, limits: AgingLimits, now: float) -> None:
        self._limits = limits
        self._most_credit_s = limits.max_share * limits.max_wait_s
        self._credit_s = self._most_credit_s
        self._credited_at = now

    def promote(self, candidates: Iterable[Candidate], now: float) -> int:
        """Mark those whose turn has come. Returns how many, for ``starvation_promotion_total``."""
        earned_s = self._limits.max_share * (now - self._credited_at)
        self._credit_s = min(self._most_credit_s, self._credit_s + earned_s)
        self._credited_at = now
        promoted = 0
        for candidate in overdue(candidates, now, self._limits):
            if self._credit_s <= 0:
                break
            self._credit_s -= candidate.remaining_s
            candidate.is_promoted = True
            promoted += 1
        return promoted


def with_aging(policy: Policy) -> Policy:
    """The policy, behind the promoted ones in order of arrival."""

    def aged(candidates: Sequence[Candidate], now: float) -> list[Candidate]:
        promoted = [candidate for candidate in candidates if candidate.is_promoted]
        if not promoted:
            return policy(candidates, now)
        promoted.sort(key=_arrival)
        others = [candidate for candidate in candidates if not candidate.is_promoted]
        # As of now, not of when the promoted will be done: they matter only if none of those can get memory.
        return promoted + policy(others, now)

    return aged


def _arrival(candidate: Candidate) -> tuple[float, int]:
    return (candidate.arrived_at, candidate.key)
