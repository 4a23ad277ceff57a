"""Which candidate runs next: the scheduling policies, as pure functions.

A policy is asked at every event (an arrival, a completion, …) and never in between. It returns all candidates, best
first, and the scheduler runs the first that can get memory. The model is one preemptive machine: to suspend a task
costs microseconds, so no policy charges for a switch. A started task is not given up when another runs: it keeps what
it has computed, and its memory, until ``core.aging`` makes it go on.

A task of several requests is one candidate with the earliest of their deadlines. That is an approximation: its other
requests may have more time.

None of these policies bounds a request's waiting time; ``core.aging`` does, around any of them.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf
from operator import attrgetter
from types import MappingProxyType
from typing import Final

from flowprefill_sglang.core.candidate import Candidate, Standing

Policy = Callable[[Sequence[Candidate], float], list[Candidate]]
"""``(candidates, now) -> candidates``: takes them in deadline order (sorted by ``Candidate.order``) with finite
``remaining_s``, and returns each of them once, best first. ``now`` in seconds of the candidates' clock."""

# Bound once: looking a member up in its Enum takes longer than all else in these loops.
_WAITING: Final = Standing.WAITING
_arrived_at = attrgetter("arrived_at")
_deadline_at = attrgetter("deadline_at")
_remaining_s = attrgetter("remaining_s")


# Every sort below is stable and starts from deadline order, so equals stay ordered by priority, then arrival.


def fcfs(candidates: Sequence[Candidate], now: float) -> list[Candidate]:
    """First come, first served: in order of receipt, so nothing that is being computed gives way to something newer."""
    return sorted(candidates, key=_arrived_at)


def edf(candidates: Sequence[Candidate], now: float) -> list[Candidate]:
    """Earliest deadline first. Optimal while everything can be on time; when not, it spends its time on the latest."""
    return list(candidates)


def sedf(candidates: Sequence[Candidate], now: float) -> list[Candidate]:
    """FlowPrefill's S-EDF (arXiv 2602.16603): highest sign(slack) / deadline first, deadline as a point in time.

    So those whose slack is not negative come first, earliest deadline first; then those that can no longer be on time,
    whose quotient is negative and nearest to zero for the *latest* deadline: latest deadline first. Slack of exactly
    zero counts as on time; the formula's zero would put it between the two groups. Slack is each candidate's own: that
    all of them together have none is not seen, as ``feasible`` sees it. The order is that of the quotients for
    deadlines after the clock's zero, but none is computed, so it does not depend on where that zero is.
    """
    return list(in_sedf_order(candidates, now))


def in_sedf_order(candidates: Sequence[Candidate], now: float) -> Iterator[Candidate]:
    """``sedf``, one by one: for a caller that needs only the first few."""
    late: list[Candidate] = []
    for candidate in candidates:
        if candidate.deadline_at - now >= candidate.remaining_s:
            yield candidate
        else:
            late.append(candidate)
    late.sort(key=_deadline_at, reverse=True)  # keeps the order of equals, as reverse=True does and reversed() does not
    yield from late


def on_time_first(order: Iterable[Candidate], now: float) -> Iterator[Candidate]:
    """Those on time with which a ranking begins, if they run in its order: under ``feasible`` all that it counts on.
    The ones behind them were given up."""
    ends_at = now
    for candidate in order:
        ends_at += candidate.remaining_s
        if ends_at > candidate.deadline_at:
            return
        yield candidate


def srpt(candidates: Sequence[Candidate], now: float) -> list[Candidate]:
    """Shortest remaining processing time first: the least mean TTFT, blind to deadlines.

    It does not thrash: what runs gets ever shorter. Of equals a started one goes first, since it holds memory.
    """
    started: list[Candidate] = []
    waiting: list[Candidate] = []
    for candidate in candidates:
        (waiting if candidate.standing is _WAITING else started).append(candidate)
    started += waiting
    started.sort(key=_remaining_s)
    return started


def feasible(candidates: Sequence[Candidate], now: float) -> list[Candidate]:
    """The most requests on time: the largest set that can be, in deadline order, then the others, shortest first.

    The set is Moore and Hodgson's (``split_on_time``), found anew at each event, in two steps. First go those that can
    be on time even if shorter ones keep coming as they lately did, i.e. in what ``Candidate.set_aside`` leaves of their
    time; then those that can be if nobody comes. The others run when there is none of these: they are late whatever
    we do, and the shortest first gets the most of them out of the way. Those with no deadline (infinite) are on time in
    any order, so they make nobody wait who has one that can be met, and take their place among the others by length.
    """
    finite = candidates
    if candidates and candidates[-1].deadline_at == inf:
        finite = candidates[: bisect_left(candidates, inf, key=_deadline_at)]
    on_time, rest = split_on_time(finite, now)
    likely: list[Candidate] = []
    if rest:  # else all can be, and what comes will show who cannot
        likely = _in_spite_of_arrivals(finite, now)
        taken = set(map(id, likely))
        on_time = [one for one in on_time if id(one) not in taken]
        rest = [one for one in rest if id(one) not in taken]
    rest.extend(candidates[len(finite) :])
    return likely + on_time + srpt(rest, now)


def _in_spite_of_arrivals(candidates: Sequence[Candidate], now: float) -> list[Candidate]:
    """The largest set that can be on time in what is not set aside, in deadline order."""
    due_at = [one.deadline_at - (one.deadline_at - now) * one.set_aside for one in candidates]
    alive = [index for index, at in enumerate(due_at) if at > now]
    likely = _largest_set(candidates, due_at, sorted(alive, key=due_at.__getitem__), now)[0]
    return [candidates[index] for index in likely]


def split_on_time(candidates: Sequence[Candidate], now: float) -> tuple[list[Candidate], list[Candidate]]:
    """The largest set of candidates that can all be on time, and the others, both in deadline order.

    Moore and Hodgson's algorithm (J. M. Moore, Management Science 15(1), 1968) on the remaining times: add candidates
    in deadline order; whenever one would be late, drop the longest so far. O(n log n). All are available now, so
    preemption cannot make the set larger. A task of several requests is as long as it is for each of them: to give it
    up is to give up all. With such tasks the set is a good one and not always the largest, which is a knapsack problem.
    Of equally long ones a waiting one is dropped before a started one, which holds memory, then the earlier
    deadline, since a later one leaves more room for arrivals to come, then the lower priority and the later arrival.
    """
    on_time, dropped = _largest_set(candidates, list(map(_deadline_at, candidates)), range(len(candidates)), now)
    return [candidates[index] for index in on_time], [candidates[index] for index in dropped]


def _largest_set(
    candidates: Sequence[Candidate], due_at: Sequence[float], in_order: Iterable[int], now: float
) -> tuple[list[int], list[int]]:
    """Indices of the set and of the others. ``due_at``: when each is due; ``in_order``: indices in order of that."""
    finish_at = now
    kept: list[tuple[float, bool, float, int]] = []  # a heap: first the one to drop first; ends with the negated index
    dropped: list[int] = []
    for index in in_order:
        candidate = candidates[index]
        remaining_s, deadline_at = candidate.remaining_s, due_at[index]
        is_too_much = finish_at + remaining_s > deadline_at
        each_s = remaining_s / candidate.promises
        if is_too_much and (not kept or -each_s < kept[0][0]):
            dropped.append(index)  # the longest itself: with many late that is the rule, and spares the heap
            continue
        entry = (-each_s, candidate.standing is not _WAITING, deadline_at, -index)
        finish_at += remaining_s
        if is_too_much:
            longest = heapq.heappushpop(kept, entry)
            finish_at -= candidates[-longest[-1]].remaining_s
            dropped.append(-longest[-1])
        else:
            heapq.heappush(kept, entry)
    dropped.sort()
    return sorted(-entry[-1] for entry in kept), dropped


POLICIES: Final[Mapping[str, Policy]] = MappingProxyType(
    {"fcfs": fcfs, "edf": edf, "sedf": sedf, "srpt": srpt, "feasible": feasible}
)
DEFAULT_POLICY: Final = "feasible"
