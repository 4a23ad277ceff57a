"""Parts of a trace that are measured one after another, each at whatever rate is asked for. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.workload.trace import TraceRequest, mean_rate

LEAST_REQUESTS = 2
"""Fewer have no rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A part of a trace: so many requests in a row."""

    number: int
    first_row: int
    requests: tuple[TraceRequest, ...]

    def of_size(self, requests: int) -> Window:
        """Its first requests."""
        return replace(self, requests=self.requests[:requests])

    def to_document(self) -> dict[str, Any]:
        """A JSON object that describes it."""
        return {
            "first_row": self.first_row,
            "requests": len(self.requests),
            "classes": dict(Counter(r.class_name for r in self.requests)),
            "mean_input_tokens": round(fmean(r.input_tokens for r in self.requests), 1),
            "own_rate_rps": round(mean_rate(self.requests), 3),
        }


def cut_windows(requests: Sequence[TraceRequest], count: int, size: int) -> list[Window]:
    """``count`` windows of up to ``size`` requests from the middles of as many equal parts of the trace.

    Not from its beginning, which is often not like the rest. They do not overlap. Raises BadInput when there are too
    few requests for that.
    """
    size = min(size, len(requests) // count)
    if size < LEAST_REQUESTS:
        raise BadInput(f"{len(requests)} requests are too few for {count} windows; each needs {LEAST_REQUESTS} or more")
    windows = []
    for number in range(count):
        part_ends = (number + 1) * len(requests) // count
        first = min((2 * number + 1) * len(requests) // (2 * count), part_ends - size)
        part = requests[first : first + size]
        shifted = tuple(replace(r, arrival_s=r.arrival_s - part[0].arrival_s) for r in part)
        windows.append(Window(number=number, first_row=first, requests=shifted))
    return windows
