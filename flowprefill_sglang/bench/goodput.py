"""Maximum goodput: the highest request rate at which enough requests meet their TTFT objective. Pure.

A probe offers one rate and counts. Attainment falls with the rate, apart from noise, so a few probes around the
crossing with the target find it: each next rate is where the probes so far say that the crossing is, or, while they
all lie on one side of it, a step to the other side that is the longer the further attainment is from the target, and
the more steps there have been.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

TARGET = 0.9
"""Share of requests within their objective: the paper's, and the usual one."""
_ATTAINMENT_PER_LOG_RATE = 0.25
"""How steeply attainment falls near the target, about: for the length of steps only, never in a result."""
_SHORTEST_STEP, _LONGEST_STEP = math.log(1.12), math.log(2.5)
EXTRA_PROBES = 4
"""Tried beyond the number asked for, while all probes lie on one side: a bound says little, and nothing in a ratio."""
_SAME_RATE = math.log(1.02)
"""Rates closer than this are one rate: a probe there would tell nothing new."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One rate, offered once."""

    rate_rps: float
    attained: int
    """Requests that met their objective; of a probe that was cut short, the most that still could have."""
    requests: int

    @property
    def attainment(self) -> float:
        """Share of all its requests."""
        return self.attained / self.requests


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What the probes say about the highest rate."""

    rate_rps: float
    """Where attainment crosses the target, interpolated in the logarithm of the rate."""
    passed_rps: float
    """The highest rate whose attainment, smoothed to fall with the rate, was the target or more; 0 if none was."""
    is_bracketed: bool
    """Whether probes lie on both sides. If not, ``rate_rps`` is a bound, of the side on which they all lie."""


def estimate(probes: Sequence[Probe], target: float = TARGET) -> Estimate:
    """The crossing of the attainment that falls with the rate and is closest to the probes (isotonic regression).

    Raises ValueError without probes.
    """
    if not probes:
        raise ValueError("an estimate needs at least one probe")
    ordered = sorted(probes, key=lambda probe: probe.rate_rps)
    smooth = falling([p.attainment for p in ordered], [float(p.requests) for p in ordered])
    passing = [index for index, value in enumerate(smooth) if value >= target]
    if not passing:
        return Estimate(rate_rps=ordered[0].rate_rps, passed_rps=0.0, is_bracketed=False)
    last = passing[-1]
    passed_rps = ordered[last].rate_rps
    if last == len(ordered) - 1:
        return Estimate(rate_rps=passed_rps, passed_rps=passed_rps, is_bracketed=False)
    part = (smooth[last] - target) / (smooth[last] - smooth[last + 1])
    rate_rps = passed_rps * (ordered[last + 1].rate_rps / passed_rps) ** part
    return Estimate(rate_rps=rate_rps, passed_rps=passed_rps, is_bracketed=True)


@dataclass(slots=True)
class GoodputSearch:
    """Chooses the rates of one search."""

    guess_rps: float
    target: float = TARGET
    least_rps: float = 0.0
    """No rate below it is tried: where it fails at this one, the estimate is that bound."""
    probes: list[Probe] = field(default_factory=list)

    def is_done(self, probes: int) -> bool:
        """Whether so many probes, or more while they all lie on one side, are made, or the least rate has failed."""
        made = len(self.probes)
        if any(p.rate_rps <= self.least_rps and p.attainment < self.target for p in self.probes):
            return True
        return made >= probes and (made >= probes + EXTRA_PROBES or estimate(self.probes, self.target).is_bracketed)

    def next_rate(self) -> float:
        """The rate to offer next, in requests per second."""
        if not self.probes:
            return max(self.guess_rps, self.least_rps)
        found = estimate(self.probes, self.target)
        if not found.is_bracketed:
            edge = min(self.probes, key=lambda p: p.rate_rps)
            if found.passed_rps:
                edge = max(self.probes, key=lambda p: p.rate_rps)
            return max(self.least_rps, edge.rate_rps * math.exp(self._step(edge.attainment)))
        return self._between(found.rate_rps, found.passed_rps)

    def _step(self, attainment: float) -> float:
        """Logarithm of the factor to the next rate: up from attainment at the target or above, else down."""
        length = abs(attainment - self.target) / _ATTAINMENT_PER_LOG_RATE * 2.0 ** (len(self.probes) - 1)
        length = min(max(float(length), _SHORTEST_STEP), _LONGEST_STEP)
        return length if attainment >= self.target else -length

    def _between(self, rate_rps: float, passed_rps: float) -> float:
        """The crossing, or the middle between the probes around it when it lies at one of them."""
        failed_rps = min(p.rate_rps for p in self.probes if p.rate_rps > passed_rps)
        is_known = any(abs(math.log(rate_rps / known)) < _SAME_RATE for known in (passed_rps, failed_rps))
        return math.sqrt(passed_rps * failed_rps) if is_known else rate_rps


def falling(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-increasing sequence closest to ``values`` in weighted squares (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] < block[0]:
            mean, before, length = blocks.pop()
            total = before + block[1]
            block = ((mean * before + block[0] * block[1]) / total, total, length + block[2])
        blocks.append(block)
    return [mean for mean, _, length in blocks for _ in range(length)]
