"""How much of the device shorter requests to come will take: what is left of it for a longer one until it is due.

Moore and Hodgson's set is the best for those who are there. Under overload it takes long requests in that shorter ones
push out again later, and the time that they had until then is lost. Knowing who will come would show which; knowing how
much work of which lengths came lately shows it on average.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Final

MEMORY_S: Final = 60.0
"""An arrival counts for 1/e of one that comes now when it is so old: some dozens of the slowest class's arrivals."""
PART: Final = 0.2
"""Of the time that shorter ones are expected to take, so much is set aside. Less than all, since some of them come when
there is room anyway, or are given up themselves (docs/scheduling.md)."""
_SHORTEST_S: Final = 1e-3
_PER_DOUBLING: Final = 2
_BUCKETS: Final = 20 * _PER_DOUBLING
"""Up to a quarter of an hour of work."""


class Forecast:
    """Work that arrived lately, by the length of the request. Owned by the scheduler's state machine."""

    def __init__(self, now: float, part: float = PART) -> None:
        self._part = part
        self._began_at = self._at = now
        self._work_s = [0.0] * _BUCKETS
        self._set_aside = [0.0] * (_BUCKETS + 1)

    def arrived(self, alone_s: float, added_s: float, now: float) -> None:
        """One request came, which takes ``alone_s`` alone and ``added_s`` as a part of a batch. One that came before
        the last counts as if it came with it."""
        now = max(now, self._at)
        kept = math.exp((self._at - now) / MEMORY_S)
        self._at = now
        self._work_s = [kept * before_s for before_s in self._work_s]
        self._work_s[_bucket(alone_s)] += added_s
        window_s = MEMORY_S * -math.expm1((self._began_at - now) / MEMORY_S)
        if window_s > 0:
            factor = self._part / max(window_s, MEMORY_S / 6)  # a few first arrivals are no rate
            self._set_aside = list(accumulate((factor * seconds for seconds in self._work_s), initial=0.0))

    def set_aside(self, work_s: float) -> float:
        """The share of the time until its deadline that one of this length leaves to shorter ones, in [0, 1]."""
        return min(1.0, self._set_aside[_bucket(work_s)])


def _bucket(work_s: float) -> int:
    if work_s <= _SHORTEST_S:
        return 0
    return min(_BUCKETS - 1, int(math.log2(work_s / _SHORTEST_S) * _PER_DOUBLING))
