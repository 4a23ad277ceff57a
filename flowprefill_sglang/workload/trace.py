"""Traces: when requests arrive and how long they are. Pure values and pure transformations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from flowprefill_sglang.errors import BadInput

MIN_PROMPT_TOKENS = 2
"""``<bos>`` and one byte: SGLang refuses an empty prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRequest:
    """One row of a trace."""

    arrival_s: float
    """Seconds after the trace's first request."""
    input_tokens: int
    output_tokens: int
    class_name: str = ""
    """``text``, ``image``, ``search``, ``file``, or empty where the trace does not say."""
    hash_ids: tuple[int, ...] = ()
    """Ids of the prompt's blocks in order, where the trace has them: equal ids are equal tokens."""
    hash_block_tokens: float = 0.0
    """Tokens that one id stands for; a fraction once lengths were scaled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """Requests in order of arrival, and where they came from."""

    name: str
    requests: tuple[TraceRequest, ...]
    sha256: str | None = None
    """Of the file's bytes; None for a generated workload."""
    skipped_rows: int = 0
    """Broken rows left out (``--skip-bad-rows``)."""
    left_out_rows: int = 0
    """Rows that are no request by the format's own rules: a conversation without an answer, for example."""
    has_arrivals: bool = True
    """Whether the source says when requests arrive. If not, ``arrival_s`` is 0 throughout: see ``poisson_arrivals``."""


def window(requests: Sequence[TraceRequest], start_s: float, duration_s: float | None) -> tuple[TraceRequest, ...]:
    """The requests that arrive in ``[start_s, start_s + duration_s)``, with arrivals counted from ``start_s``."""
    end_s = float("inf") if duration_s is None else start_s + duration_s
    return tuple(replace(r, arrival_s=r.arrival_s - start_s) for r in requests if start_s <= r.arrival_s < end_s)


def scale_rate(requests: Sequence[TraceRequest], factor: float) -> tuple[TraceRequest, ...]:
    """``factor`` times the request rate: every interval between arrivals is divided by it."""
    _check_factor("rate scale", factor)
    return tuple(replace(r, arrival_s=r.arrival_s / factor) for r in requests)


def at_rate(requests: Sequence[TraceRequest], rate_rps: float) -> tuple[TraceRequest, ...]:
    """Arrivals stretched or compressed to a mean rate; their pattern stays.

    Raises BadInput for several requests that all arrive at once, which have no rate to start from.
    """
    if len(requests) < 2:
        return tuple(requests)
    return scale_rate(requests, rate_rps / mean_rate(requests))


def mean_rate(requests: Sequence[TraceRequest]) -> float:
    """Requests per second from the first arrival to the last. Raises BadInput when there is no time between them."""
    span_s = requests[-1].arrival_s - requests[0].arrival_s if requests else 0.0
    if span_s <= 0:
        raise BadInput("all requests arrive at the same time, so that they have no rate")
    return (len(requests) - 1) / span_s


def poisson_arrivals(requests: Sequence[TraceRequest], rate_rps: float, seed: int) -> tuple[TraceRequest, ...]:
    """For sources without times: independent arrivals at ``rate_rps`` on average, the first at 0 s, in their order."""
    _check_factor("rate", rate_rps)
    rng = random.Random(f"poisson arrivals {seed}")
    gaps = [0.0, *(rng.expovariate(rate_rps) for _ in requests[1:])]
    return tuple(replace(r, arrival_s=at) for r, at in zip(requests, accumulate(gaps), strict=True))


def spread_ties(requests: Sequence[TraceRequest], seed: int) -> tuple[TraceRequest, ...]:
    """For traces with coarse times: rows of equal arrival are spread at random over the time until the next other one.

    Mooncake's published traces know arrivals to three seconds, some ten requests each. Played as they are, all ten
    arrive in the same instant however much the trace is stretched. The last rows of equal time stay where they are.
    """
    rng = random.Random(seed)
    times = sorted({r.arrival_s for r in requests})
    room_s = {earlier: later - earlier for earlier, later in pairwise(times)}
    spread = [replace(r, arrival_s=r.arrival_s + rng.random() * room_s.get(r.arrival_s, 0.0)) for r in requests]
    return tuple(sorted(spread, key=lambda r: r.arrival_s))


def scale_lengths(requests: Sequence[TraceRequest], factor: float) -> tuple[TraceRequest, ...]:
    """Prompts and answers of ``factor`` times the length, rounded; prefix sharing scales along.

    A shorter prompt never becomes the longer of two. Prompts keep at least ``MIN_PROMPT_TOKENS``, answers one token.
    """
    _check_factor("length scale", factor)
    return tuple(
        replace(
            r,
            input_tokens=max(MIN_PROMPT_TOKENS, round(r.input_tokens * factor)),
            output_tokens=max(1, round(r.output_tokens * factor)),
            hash_block_tokens=r.hash_block_tokens * factor,
        )
        for r in requests
    )


def cap_outputs(requests: Sequence[TraceRequest], max_tokens: int) -> tuple[TraceRequest, ...]:
    """Answers of one to ``max_tokens`` tokens: where TTFT is measured, long answers only cost time."""
    return tuple(replace(r, output_tokens=min(max(1, r.output_tokens), max_tokens)) for r in requests)


def fitting_length_factor(requests: Sequence[TraceRequest], context_tokens: int, max_output_tokens: int) -> float:
    """The largest factor up to 1, in steps of 1/1000, with which every prompt and its answer fit the context.

    Answers are counted with at most ``max_output_tokens``. Eight tokens stay free, since engines reserve a few. Raises
    BadInput when no such factor exists.
    """
    room = context_tokens - 8 - max_output_tokens
    if room < MIN_PROMPT_TOKENS:
        raise BadInput(f"a context of {context_tokens} tokens has no room for answers of {max_output_tokens} tokens")
    longest = max((r.input_tokens for r in requests), default=1)
    factor = min(1.0, int(1000 * room / longest) / 1000)
    if factor <= 0:
        raise BadInput(f"a prompt of {longest} tokens cannot be scaled to a context of {context_tokens} tokens")
    return factor


def _check_factor(what: str, factor: float) -> None:
    if not 0 < factor < float("inf"):
        raise BadInput(f"{what} must be a positive number, got {factor}")
