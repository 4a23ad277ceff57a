"""The default workload: the paper's four classes, Poisson arrivals, the same bytes for a seed."""

from __future__ import annotations

import math
import random

from flowprefill_sglang.workload.classes import CLASSES, RequestClass
from flowprefill_sglang.workload.trace import MIN_PROMPT_TOKENS, Trace, TraceRequest


def generate_workload(*, requests: int, rate_rps: float, seed: int, output_tokens: int = 64) -> Trace:
    """``requests`` requests at ``rate_rps`` on average, with lengths for the reference model (scale them to yours).

    The classes' shares hold exactly, up to rounding: a short run would otherwise often lack the rare long prompts that
    it is about. Lengths are log-normal, cut at the class's maximum. No two prompts share a prefix.
    """
    rng = random.Random(f"flowprefill workload {seed}")
    drawn = [c for c, count in zip(CLASSES, _counts(requests), strict=True) for _ in range(count)]
    rng.shuffle(drawn)
    arrival_s, rows = 0.0, []
    for request_class in drawn:
        rows.append(
            TraceRequest(
                arrival_s=round(arrival_s, 6),
                input_tokens=_length(request_class, rng),
                output_tokens=output_tokens,
                class_name=request_class.name,
            )
        )
        arrival_s += rng.expovariate(rate_rps)
    return Trace(name=f"generated, seed {seed}", requests=tuple(rows))


def _counts(requests: int) -> list[int]:
    """Requests per class by largest remainder, so that they add up."""
    exact = [c.share * requests for c in CLASSES]
    counts = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(CLASSES)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: requests - sum(counts)]:
        counts[i] += 1
    return counts


def _length(request_class: RequestClass, rng: random.Random) -> int:
    length = round(rng.lognormvariate(math.log(request_class.median_input_tokens), request_class.sigma))
    return min(max(MIN_PROMPT_TOKENS, length), request_class.max_input_tokens)
