"""An upper bound on the requests that anyone could serve in time, knowing the future.

Each job j has a release r, a deadline d and an amount of device time p that serving it takes at least. Relaxed to
fractions x in [0, 1] of jobs, on W preemptive machines that may even share one job: maximise Σ x_j such that what must
be done within an interval fits it, for every interval from a release s to a deadline t::

    Σ { p_j · x_j : s ≤ r_j, d_j ≤ t }  ≤  W · (t − s)

**Solved without a solver.** The amounts y_j = p_j · x_j that satisfy all intervals are those for which a preemptive
schedule exists, and these form a polymatroid: a set of jobs can be given as much time as its windows cover, which is a
submodular function. So greedy is optimal for any weights: take jobs by what a second earns, 1/p, the shortest
first, and give each as much as the tightest interval around it still has room for. Its value is that of the linear
program (tests compare it with an LP solver), in O(n²) memory and O(n³) additions that NumPy does in blocks: 2,000 jobs
take about two seconds. ``whole_jobs`` then does without parts of jobs.

**What serving takes at least.** Alone, a job's forward takes ``alone_s``. In a batch it shares the overhead, so there a
job is charged its tokens' part of the largest forward that it can be in. The cost of a token in a forward never
rises with the forward's size (see ``least_token_s``), the shares of a forward's members add up to no more than the
forward takes, and attention is each job's own; so what any schedule of such batches does in an interval is at least the
sum of the charges. A job still has to fit its window alone, since a forward that contains it takes no less.

**The largest forward that a job can be in** (``largest_batches``). All its members have arrived when it begins and are
due when it ends or later; a late member only makes it longer, so the best schedule has none. Between the last release
and the first deadline there must be room for it. So it has no more tokens than those whose windows hold that interval,
and no more than fit into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flowprefill_sglang.core.prefill_cost import CostModel, Extent
from flowprefill_sglang.sim.intervals import ROUNDING_S, Intervals, Job
from flowprefill_sglang.sim.machine import Machine
from flowprefill_sglang.sim.whole_jobs import bracket
from flowprefill_sglang.workload.trace import TraceRequest


def most_in_time(jobs: Iterable[Job], workers: int = 1) -> float:
    """The linear program's value: no schedule of these jobs has more of them in time."""
    intervals = Intervals(jobs, workers)
    return intervals.fill(intervals.shortest_first(), is_whole=False).value


def least_token_s(cost: CostModel, batch_tokens: int) -> float:
    """The least that one token costs in a forward of up to ``batch_tokens`` tokens, overhead included.

    Overhead and token cost over the number of tokens fall up to the knee and are monotone beyond, so they are least at
    the knee or at the end.
    """
    sizes = {batch_tokens, min(batch_tokens, max(1, cost.knee_tokens))}
    without_requests = ((size, sum(cost.parts((Extent(size),))[:2]) - cost.request_s) for size in sizes)
    return min(seconds / size for size, seconds in without_requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Charges:
    """What jobs are charged, for schedules that make forwards of these sizes."""

    machine: Machine
    batch_tokens: int | None
    """The largest forward of several requests; None: every forward computes one."""
    is_chunked: bool = False
    """Whether a prompt may be cut. The KV of all but its last chunk is then handed over meanwhile."""

    def jobs(self, rows: Sequence[TraceRequest], objectives_s: Mapping[str, float]) -> list[Job]:
        """The jobs of requests that only each other may share forwards with."""
        alone = [self._alone(row, objectives_s[row.class_name]) for row in rows]
        if self.batch_tokens is None:
            return alone
        tokens = [row.input_tokens for row in rows]
        if self.is_chunked:  # a forward has parts of prompts, so it may end before any of them is due
            largest = [max(self.batch_tokens, one) for one in tokens]
        else:
            largest = largest_batches(alone, tokens, self.machine.cost, self.batch_tokens)
        return [
            replace(job, work_s=self._shared_s(one, most))
            for job, one, most in zip(alone, tokens, largest, strict=True)
        ]

    def _alone(self, row: TraceRequest, slo_s: float) -> Job:
        machine, tokens = self.machine, row.input_tokens
        alone_s = machine.alone_s(tokens)
        if self.is_chunked:  # where overhead is small and tokens up to the knee are cheap, small chunks are cheaper
            alone_s = min(alone_s, self._shared_s(tokens, tokens))
        return Job(
            released_at=row.arrival_s,
            deadline_at=row.arrival_s + slo_s - machine.handoff_s(1 if self.is_chunked else tokens),
            work_s=alone_s,
            alone_s=alone_s,
        )

    def _shared_s(self, tokens: int, batch_tokens: int) -> float:
        """The least part of forwards of up to ``batch_tokens`` tokens that so many of one request can have."""
        cost = self.machine.cost
        pairs_s = cost.parts((Extent(tokens),))[2]
        return cost.request_s + least_token_s(cost, batch_tokens) * tokens + pairs_s


def largest_batches(jobs: Sequence[Job], tokens: Sequence[int], cost: CostModel, batch_tokens: int) -> list[int]:
    """For each job the most tokens of a forward that it can be in and that has nobody late; of itself at least.

    ``tokens``: of each job. ``batch_tokens``: of a forward of several requests at most; more runs alone.
    """
    releases, deadlines = (np.array([getattr(job, name) for job in jobs]) for name in ("released_at", "deadline_at"))
    sizes = np.array(tokens)
    is_possible = deadlines - releases >= np.array([job.alone_s for job in jobs]) - ROUNDING_S
    sums_s = np.array([sum(cost.parts((Extent(size),))[:2]) for size in range(1, batch_tokens + 1)])
    found = []
    for job, own in zip(jobs, tokens, strict=True):
        overlap = (releases < job.deadline_at) & (deadlines > job.released_at)
        near = np.nonzero(overlap & is_possible & (sizes <= batch_tokens - own))[0]
        largest = own
        for start_at in np.unique(np.maximum(releases[near], job.released_at)):
            there = near[releases[near] <= start_at]
            ends_at = np.minimum(deadlines[there], job.deadline_at)
            latest_first = np.argsort(-ends_at)
            # Of those that are due at the end or later. The job itself is among them, unless it is too long to be.
            together = np.cumsum(sizes[there][latest_first]) + (own if 2 * own > batch_tokens else 0)
            fit = np.searchsorted(sums_s, ends_at[latest_first] - start_at + ROUNDING_S, side="right")
            largest = max(largest, int(np.minimum(np.minimum(together, batch_tokens), fit).max(initial=0)))
            if largest >= batch_tokens:
                break
        found.append(largest)
    return found


def bound(
    parts: Iterable[Sequence[TraceRequest]],
    objectives_s: Mapping[str, float],
    charges: Charges,
    workers: int,
    *,
    whole_s: float | None = None,
) -> float:
    """The most of all requests that can be in time, as a share.

    ``parts``: consecutive windows of the workload. Each is solved as if it had the workers to itself, so the sum bounds
    the whole, and a little more loosely than one solution would. ``whole_s``: seconds to spend on each for a bound that
    counts whole jobs only; None: the linear program's.
    """
    most, requests = 0.0, 0
    for part in parts:
        requests += len(part)
        jobs = charges.jobs(part, objectives_s)
        most += most_in_time(jobs, workers) if whole_s is None else bracket(Intervals(jobs, workers), whole_s).most
    return most / requests
