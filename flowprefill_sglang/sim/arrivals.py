"""Workloads as streams that can be played again, so that a million requests need no memory; and what load means.

**Load** is offered work over capacity: the seconds that all prompts take, each alone and whole on one worker under the
cost model, divided by the workers times the time in which they arrive. At 1.0 work arrives as fast as it can be
computed one by one; batches can carry more. A load is set by stretching or compressing the intervals between arrivals.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.sim.machine import Machine
from flowprefill_sglang.workload.generator import generate_workload
from flowprefill_sglang.workload.trace import TraceRequest, scale_lengths

Workload = Callable[[], Iterator[TraceRequest]]
"""Each call plays the same requests from the start, in order of arrival, every one with a class."""

_BLOCK_REQUESTS: Final = 10_000
"""Generated at a time. The classes' shares hold exactly in each block."""
_GENERATED_RPS: Final = 1.0
"""Any: the load decides."""


def replayed(requests: Sequence[TraceRequest]) -> Workload:
    """A trace that was loaded."""
    return lambda: iter(requests)


def generated(requests: int, seed: int, length_scale: float = 1.0) -> Workload:
    """The generated workload of any number of requests, in blocks."""

    def stream() -> Iterator[TraceRequest]:
        rng = random.Random(f"flowprefill blocks {seed}")
        start_s = 0.0
        for first in range(0, requests, _BLOCK_REQUESTS):
            size = min(_BLOCK_REQUESTS, requests - first)
            block = generate_workload(requests=size, rate_rps=_GENERATED_RPS, seed=rng.getrandbits(63)).requests
            block = scale_lengths(block, length_scale)
            yield from (replace(row, arrival_s=start_s + row.arrival_s) for row in block)
            start_s += block[-1].arrival_s + rng.expovariate(_GENERATED_RPS)

    return stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A workload's size on a machine."""

    requests: int
    span_s: float
    """From the first arrival to the last, before any scaling."""
    work_s: float
    """Of all prompts, each alone and whole."""
    by_class: dict[str, int]

    def interval_factor(self, load: float, workers: int) -> float:
        """What intervals between arrivals are multiplied by for a load. Raises BadInput when nothing can be
        stretched."""
        if self.requests < 2 or self.span_s <= 0:
            raise BadInput(f"{self.requests} requests that all arrive at once have no rate to scale")
        # n arrivals stand for n intervals, of which the last one is not in the trace.
        span_s = self.span_s * self.requests / (self.requests - 1)
        return self.work_s / (load * workers * span_s)


def measure(workload: Workload, machine: Machine) -> Measure:
    """Play it once without simulating."""
    first_at, last_at, work_s, requests = 0.0, 0.0, 0.0, 0
    by_class: Counter[str] = Counter()
    for row in workload():
        if not requests:
            first_at = row.arrival_s
        last_at = row.arrival_s
        work_s += machine.alone_s(row.input_tokens)
        by_class[row.class_name] += 1
        requests += 1
    return Measure(requests=requests, span_s=last_at - first_at, work_s=work_s, by_class=dict(sorted(by_class.items())))


def at_load(workload: Workload, factor: float) -> Iterator[TraceRequest]:
    """The requests with their arrivals multiplied by ``factor``."""
    return (replace(row, arrival_s=row.arrival_s * factor) for row in workload())


def windows(requests: Iterator[TraceRequest], size: int) -> Iterator[list[TraceRequest]]:
    """Consecutive parts of ``size`` requests; the last may be shorter."""
    while part := list(islice(requests, size)):
        yield part
