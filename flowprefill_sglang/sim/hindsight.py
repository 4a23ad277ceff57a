"""A schedule that knows the future and makes batches: the product's own scheduler, told whom to leave out.

Who is left out is never played, so the time that an online policy spends on requests that it gives up later is saved.
Which ones to leave out is found by local search: let some that were left out come after all, far apart from each other,
so that their effects do not mix; keep each where more are on time around it. What is found is a run of the simulator,
so it is a schedule for certain, and the best there can be is no worse. It is no bound: there may be a better one.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from math import inf
from typing import Final

Play = Callable[[set[int]], set[int]]
"""Serve the requests of these numbers and no others; returns which of them were on time."""
SETTLING_ROUNDS: Final = 3


def best_found(
    play: Play,
    arrivals: Sequence[float],
    shortest_first: Sequence[int],
    starts: Iterable[set[int]],
    *,
    rounds: int,
    apart_s: float,
    seed: int,
) -> set[int]:
    """The largest set of requests found that are on time in one run of ``play``.

    ``arrivals``: of each request, ascending. ``shortest_first``: those that may be added. ``starts``: sets to begin
    with, of which the best is taken. Each round costs two runs.
    """
    best = max((_settled(play, one) for one in starts), key=len)
    tried: Counter[int] = Counter()
    rng = random.Random(seed)
    for _ in range(rounds):
        left_out = [one for one in shortest_first if one not in best]
        newcomers = _far_apart(sorted(left_out, key=tried.__getitem__), arrivals, apart_s)
        if not newcomers:
            break
        tried.update(newcomers)
        with_them = play(best | set(newcomers))
        borders = [-inf, *(_middle(arrivals, *pair) for pair in pairwise(newcomers)), inf]
        merged: set[int] = set()
        for first_at, end_at in pairwise(borders):
            before, after = (_between(some, arrivals, first_at, end_at) for some in (best, with_them))
            is_taken = len(after) > len(before) or (len(after) == len(before) and rng.random() < 0.5)
            merged.update(after if is_taken else before)
        kept = play(merged)
        if len(kept) >= len(best):
            best = kept
    return best


def _settled(play: Play, start: set[int]) -> set[int]:
    """Without those that are late, and again without those that are late then."""
    best = play(start)
    for _ in range(SETTLING_ROUNDS):
        again = play(best)
        if len(again) < len(best):
            break
        best = again
    return best


def _far_apart(some: Sequence[int], arrivals: Sequence[float], apart_s: float) -> list[int]:
    """The first of them that are so far from each other, in order of arrival."""
    chosen: list[int] = []
    for one in some:
        if all(abs(arrivals[one] - arrivals[other]) >= apart_s for other in chosen):
            chosen.append(one)
    return sorted(chosen)


def _middle(arrivals: Sequence[float], one: int, other: int) -> float:
    return (arrivals[one] + arrivals[other]) / 2


def _between(some: set[int], arrivals: Sequence[float], first_at: float, end_at: float) -> set[int]:
    """Those that arrived from ``first_at`` on and before ``end_at``."""
    first, end = bisect_left(arrivals, first_at), bisect_left(arrivals, end_at)
    return {one for one in range(first, end) if one in some}
