"""What becomes of the requests, in memory that does not grow with their number: counts, sums and histograms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

_PER_DOUBLING: Final = 32
"""Buckets for each doubling of time: a quantile is off by at most 2.2%."""
_SHORTEST_S: Final = 1e-5
_BUCKETS: Final = 34 * _PER_DOUBLING
"""From ten microseconds to two days."""


@dataclass(slots=True)
class Durations:
    """Lengths of time: their number, mean and maximum exactly, quantiles from a histogram of fixed size."""

    count: int = 0
    total_s: float = 0.0
    longest_s: float = 0.0
    _buckets: list[int] = field(default_factory=lambda: [0] * _BUCKETS)

    def add(self, seconds: float) -> None:
        """One of at least 0 seconds."""
        self.count += 1
        self.total_s += seconds
        if seconds > self.longest_s:
            self.longest_s = seconds
        bucket = int(math.log2(seconds / _SHORTEST_S) * _PER_DOUBLING) if seconds > _SHORTEST_S else 0
        self._buckets[min(bucket, _BUCKETS - 1)] += 1

    @property
    def mean_s(self) -> float | None:
        return self.total_s / self.count if self.count else None

    def quantile_s(self, part: float) -> float | None:
        """The upper end of the bucket that holds the quantile, never above the longest; None of nothing."""
        rank, seen = part * self.count, 0
        for bucket, number in enumerate(self._buckets):
            seen += number
            if number and seen >= rank:
                return min(self.longest_s, _SHORTEST_S * 2 ** ((bucket + 1) / _PER_DOUBLING))
        return None


@dataclass(slots=True)
class ClassTally:
    """Of one SLO class."""

    slo_s: float
    arrived: int = 0
    attained: int = 0
    ttft: Durations = field(default_factory=Durations)

    def ended(self, ttft_s: float) -> None:
        """One request has its first token."""
        self.ttft.add(ttft_s)
        self.attained += ttft_s <= self.slo_s + 1e-9  # for rounding: times are sums of many parts

    @property
    def attainment(self) -> float:
        return self.attained / self.arrived if self.arrived else 0.0


@dataclass(slots=True, kw_only=True)
class Tally:
    """Of one run."""

    classes: dict[str, ClassTally]
    preemptions: int = 0
    retractions: int = 0
    """Tasks that were started over."""
    forwards: int = 0
    rounds: int = 0
    events: int = 0
    """Arrivals, wake-ups of workers, and answers."""
    busy_s: float = 0.0
    """Of all workers together."""
    last_arrival_at: float = 0.0
    last_ended_at: float = 0.0
    blocking: Durations = field(default_factory=Durations)
    """From an arrival at a busy worker until the worker could decide."""

    @property
    def arrived(self) -> int:
        return sum(one.arrived for one in self.classes.values())

    @property
    def ended(self) -> int:
        return sum(one.ttft.count for one in self.classes.values())

    @property
    def attained(self) -> int:
        return sum(one.attained for one in self.classes.values())

    @property
    def attainment(self) -> float:
        return self.attained / self.arrived

    @property
    def mean_ttft_s(self) -> float:
        return sum(one.ttft.total_s for one in self.classes.values()) / self.ended

    @property
    def goodput_rps(self) -> float:
        """Requests in time for each second from the clock's zero to the last arrival."""
        return self.attained / self.last_arrival_at if self.last_arrival_at else 0.0
