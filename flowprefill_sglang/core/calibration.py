"""Which forwards to measure for a cost model, within a limit of time. Pure: what runs them is passed in.

A calibration first climbs: prompts of growing length, until the next would take more than its share of the time. What
these took says what the rest of the grid (cached prefixes, several requests in a batch) will cost at most. What fits of
it is measured, cheapest first, and then all again, round after round and in another order each time, until the time is
used up. Of each batch the shortest time counts: whatever disturbs a device makes it slower, never faster.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np

from flowprefill_sglang.core.cost_fit import Sample, fit
from flowprefill_sglang.core.prefill_cost import CostModel, Extent

Batch = tuple[Extent, ...]
RunBatch = Callable[[Sequence[Extent]], float]
"""Runs one forward of made-up prompts and returns its seconds."""

WARM_UP_RUNS: Final = 2
"""Not counted at all, nor in the time: the first forward may compile kernels for many seconds."""
CLIMB_SHARE: Final = 0.15
"""Of the time, for the longest prompt's first run: the climb as a whole then takes about twice that."""
MIN_LENGTHS: Final = 3
MAX_ROUNDS: Final = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a calibration may use."""

    max_new_tokens: int
    """Of one forward: the chunk size, or the context."""
    max_request_tokens: int
    """Of one request, with its cached prefix: the context."""
    max_batch_tokens: int
    """Of all requests of a batch together, with their prefixes: the KV pool."""
    max_requests: int = 16
    budget_s: float = 1.5
    """Seconds of all forwards together, but for the warm-up. The shortest three lengths are measured in any case."""
    length_factor: float = 4.0
    """Between one length of the grid and the next."""
    min_new_tokens: int = 16

    def allow(self, batch: Batch) -> bool:
        """Whether such a batch can be run."""
        return (
            len(batch) <= self.max_requests
            and sum(extent.new_tokens for extent in batch) <= self.max_new_tokens
            and all(extent.new_tokens + extent.cached_tokens <= self.max_request_tokens for extent in batch)
            and sum(extent.new_tokens + extent.cached_tokens for extent in batch) <= self.max_batch_tokens
        )


@dataclass(frozen=True, slots=True)
class Measurement:
    """All runs of one batch, in seconds."""

    batch: Batch
    seconds: tuple[float, ...]

    @property
    def sample(self) -> Sample:
        """What it says about the device."""
        return Sample(self.batch, min(self.seconds))


def calibrate(run_batch: RunBatch, limits: Limits) -> CostModel:
    """A cost model from forwards that take about ``limits.budget_s`` together. Raises what ``run_batch`` raises, and
    ValueError when the limits leave nothing to measure."""
    samples = [measurement.sample for measurement in measure(run_batch, limits)]
    try:
        return fit(samples)
    except ValueError:
        # A machine so disturbed that no sum of costs describes it. In proportion to the tokens, as its median forward:
        # wrong, but of the right order, and corrected by the first requests.
        token_s = median(sample.seconds / sum(extent.new_tokens for extent in sample.extents) for sample in samples)
        return CostModel(base_s=0.0, short_token_s=token_s, long_token_s=token_s, pair_s=0.0)


def measure(
    run_batch: RunBatch,
    limits: Limits,
    others: Sequence[Batch] | None = None,
    on_run: Callable[[float], None] = lambda seconds: None,
) -> list[Measurement]:
    """Measure single prompts of growing length, then ``others`` (default: ``grid``) as far as they fit into the time.

    ``others`` must be within the limits. ``on_run`` is told the seconds of each run.
    """
    runs: dict[Batch, list[float]] = {}
    spent_s = 0.0

    def run(batch: Batch) -> float:
        nonlocal spent_s
        seconds = run_batch(batch)
        spent_s += seconds
        on_run(seconds)
        return seconds

    lengths = _climb(limits)
    for _ in range(WARM_UP_RUNS if lengths else 0):
        on_run(run_batch(lengths[0]))
    for batch in lengths:
        runs[batch] = [seconds := run(batch)]
        if seconds * limits.length_factor > CLIMB_SHARE * limits.budget_s and len(runs) >= MIN_LENGTHS:
            break
    if not runs:
        raise ValueError(f"no prompt can be measured within {limits}")
    bound = _upper_bound(runs)
    rest = [b for b in (grid(limits) if others is None else others) if b not in runs]
    for batch in sorted(rest, key=bound):
        if bound(batch) <= CLIMB_SHARE * limits.budget_s and spent_s + bound(batch) <= limits.budget_s:
            runs[batch] = [run(batch)]
    order = list(runs)
    shuffle = random.Random(len(order)).shuffle  # the same order for the same grid
    for _ in range(MAX_ROUNDS - 1):
        shuffle(order)
        for batch in order:
            if spent_s + min(runs[batch]) <= limits.budget_s:
                runs[batch].append(run(batch))
    return [Measurement(batch, tuple(seconds)) for batch, seconds in runs.items()]


def grid(limits: Limits) -> list[Batch]:
    """Cached prefixes of several lengths under new tokens of several lengths, and batches of two requests and more."""
    factor = limits.length_factor**2
    lengths = _lengths(limits.min_new_tokens, limits.max_new_tokens, factor)
    prefixes = _lengths(4 * limits.min_new_tokens, limits.max_request_tokens, factor)
    batches: list[Batch] = [(Extent(new, cached),) for new in lengths for cached in prefixes]
    batches += [
        (Extent(length),) * requests
        for requests in _lengths(2, limits.max_requests, limits.length_factor)
        for length in _lengths(limits.min_new_tokens, limits.max_new_tokens // requests, factor)
    ]
    return [batch for batch in batches if limits.allow(batch)]


def held_out(limits: Limits, count: int, rng: random.Random) -> list[Batch]:
    """Batches as a worker gets them, of lengths that no grid has: log-uniform, every other one with a cached prefix,
    every third of several requests."""
    batches: list[Batch] = []
    for index in range(count):
        requests = rng.choice((2, 3, 5)) if index % 3 == 2 else 1
        extents = []
        for _ in range(requests):
            new = _log_uniform(rng, limits.min_new_tokens, limits.max_new_tokens // requests)
            room = limits.max_request_tokens - new
            has_prefix = index % 2 == 1 and room > limits.min_new_tokens
            extents.append(Extent(new, _log_uniform(rng, limits.min_new_tokens, room) if has_prefix else 0))
        batches.append(tuple(extents))
    return [batch for batch in batches if limits.allow(batch)]


def _climb(limits: Limits) -> list[Batch]:
    lengths = _lengths(limits.min_new_tokens, limits.max_new_tokens, limits.length_factor)
    batches: Iterable[Batch] = ((Extent(length),) for length in lengths)
    return [batch for batch in batches if limits.allow(batch)]


def _upper_bound(runs: dict[Batch, list[float]]) -> Callable[[Batch], float]:
    """Seconds of a batch at most, from single prompts without a prefix: as if every request computed its prefix too.

    Between two measured lengths on the straight line, which lies above a cost that grows faster and faster; beyond the
    longest quadratically, as attention grows.
    """
    measured = sorted((batch[0].new_tokens, min(seconds)) for batch, seconds in runs.items())
    lengths, seconds = zip(*measured, strict=True)

    def bound(batch: Batch) -> float:
        tokens = np.array([extent.new_tokens + extent.cached_tokens for extent in batch])
        beyond = np.maximum(1.0, tokens / lengths[-1]) ** 2
        return float(np.sum(np.interp(tokens, lengths, seconds) * beyond))

    return bound


def _lengths(first: int, last: int, factor: float) -> list[int]:
    lengths, length = [], float(first)
    while round(length) <= last:
        lengths.append(round(length))
        length *= factor
    return lengths


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(max(low, high)))))
