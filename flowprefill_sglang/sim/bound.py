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
take about two seconds.

**What serving takes at least.** Alone, a job's forward takes ``alone_s``. In a batch it shares the overhead, so there a
job is charged its tokens' part of the largest forward that the policy may make. The cost of a token in a forward never
rises with the forward's size (see ``least_token_s``), the shares of a forward's members add up to no more than the
forward takes, and attention is each job's own; so what any schedule of such batches does in an interval is at least the
sum of the charges. A job still has to fit its window alone, since a forward that contains it takes no less.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flowprefill_sglang.core.prefill_cost import CostModel, Extent
from flowprefill_sglang.sim.machine import Machine
from flowprefill_sglang.workload.trace import TraceRequest

_ROUNDING_S = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request, as the bound sees it."""

    released_at: float
    deadline_at: float
    work_s: float
    """Device time that serving it takes at least, positive."""
    alone_s: float
    """Its window must be at least so long."""


def most_in_time(jobs: Iterable[Job], workers: int = 1) -> float:
    """The linear program's value: no schedule of these jobs has more of them in time."""
    return _greedy(jobs, workers, is_whole=False)


def surely_in_time(jobs: Iterable[Job]) -> int:
    """How many one preemptive machine that knows the future can have in time for sure: the same greedy, which takes a
    job only if all of it fits. The best lies between this and ``most_in_time``."""
    return round(_greedy(jobs, 1, is_whole=True))


def _greedy(jobs: Iterable[Job], workers: int, *, is_whole: bool) -> float:
    possible = [job for job in jobs if job.deadline_at - job.released_at >= job.alone_s - _ROUNDING_S]
    if not possible:
        return 0.0
    releases, release_of = np.unique([job.released_at for job in possible], return_inverse=True)
    deadlines, deadline_of = np.unique([job.deadline_at for job in possible], return_inverse=True)
    # Room left in the interval from release i to deadline k. Intervals that hold no job are in it and never looked at.
    room_s = workers * (deadlines[np.newaxis, :] - releases[:, np.newaxis])
    value = 0.0
    for index in sorted(range(len(possible)), key=lambda one: possible[one].work_s):
        work_s = possible[index].work_s
        around = room_s[: release_of[index] + 1, deadline_of[index] :]  # every interval that holds the job's window
        given_s = min(work_s, float(around.min()))
        if given_s > (work_s - _ROUNDING_S if is_whole else 0.0):
            around -= given_s
            value += 1.0 if is_whole else given_s / work_s
    return value


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

    def job(self, row: TraceRequest, slo_s: float) -> Job:
        """The job of a request."""
        machine, tokens = self.machine, row.input_tokens
        work_s = alone_s = machine.alone_s(tokens)
        if self.is_chunked:  # where overhead is small and tokens up to the knee are cheap, small chunks are cheaper
            work_s = alone_s = min(alone_s, self._shared_s(tokens, tokens))
        if self.batch_tokens is not None:
            work_s = self._shared_s(tokens, max(self.batch_tokens, tokens))
        return Job(
            released_at=row.arrival_s,
            deadline_at=row.arrival_s + slo_s - machine.handoff_s(1 if self.is_chunked else tokens),
            work_s=work_s,
            alone_s=alone_s,
        )

    def _shared_s(self, tokens: int, batch_tokens: int) -> float:
        """The least part of forwards of up to ``batch_tokens`` tokens that so many of one request can have."""
        cost = self.machine.cost
        pairs_s = cost.parts((Extent(tokens),))[2]
        return cost.request_s + least_token_s(cost, batch_tokens) * tokens + pairs_s


def bound(
    parts: Iterable[Sequence[TraceRequest]], objectives_s: Mapping[str, float], charges: Charges, workers: int
) -> float:
    """The most of all requests that can be in time, as a share.

    ``parts``: consecutive windows of the workload. Each is solved as if it had the workers to itself, so the sum bounds
    the whole, and a little more loosely than one solution would.
    """
    most, requests = 0.0, 0
    for part in parts:
        requests += len(part)
        most += most_in_time((charges.job(row, objectives_s[row.class_name]) for row in part), workers)
    return most / requests
