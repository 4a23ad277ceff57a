"""One preemptive machine with all the memory in the world: what a policy does to a workload, without any worker.

Like the real scheduler it decides only when something arrives or completes. Its clock is its own.
"""

from __future__ import annotations

import random
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from flowprefill_sglang.core.aging import AgingLimits, Promotions, with_aging
from flowprefill_sglang.core.candidate import Candidate, Standing
from flowprefill_sglang.core.forecast import Forecast
from flowprefill_sglang.core.policies import Policy

Decide = Callable[[Sequence[Candidate], float], list[Candidate]]
Gather = Callable[[Candidate, Sequence[Candidate], float], tuple[list[Candidate], float]]
"""``(head, candidates, now)`` to the members of the head's batch, the head first, and how long the batch takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    arrived_at: float
    work_s: float
    objective_s: float = inf
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    job: Job
    ended_at: float

    @property
    def ttft_s(self) -> float:
        return self.ended_at - self.job.arrived_at

    @property
    def is_in_time(self) -> bool:
        return self.ttft_s <= self.job.objective_s + 1e-6  # for rounding: times are sums of many parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    served: list[Served]
    """In the order of the jobs."""
    busy_s: float
    preemptions: int

    @property
    def attainment(self) -> float:
        return sum(one.is_in_time for one in self.served) / len(self.served)

    @property
    def mean_ttft_s(self) -> float:
        return sum(one.ttft_s for one in self.served) / len(self.served)


def serve(jobs: Sequence[Job], decide: Decide, gather: Gather | None = None) -> Run:
    """Run all jobs (sorted by arrival) until the last has ended. A job's index is its candidate's key."""
    now, busy_s, preemptions, upcoming = 0.0, 0.0, 0, 0
    ended_at: dict[int, float] = {}
    present: list[Candidate] = []
    tasks: dict[int, list[int]] = {}
    running: Candidate | None = None
    while present or upcoming < len(jobs):
        if not present:
            now = max(now, jobs[upcoming].arrived_at)
        while upcoming < len(jobs) and jobs[upcoming].arrived_at <= now:
            insort(present, candidate_of(upcoming, jobs[upcoming]), key=Candidate.order)
            upcoming += 1
        chosen = decide(present, now)[0]
        if running is not None and running is not chosen:
            running.standing, running.suspended_at = Standing.SUSPENDED, now
            preemptions += 1
        if gather is not None and chosen.standing is Standing.WAITING:
            chosen = _start(present, tasks, *gather(chosen, present, now))
        chosen.standing, chosen.suspended_at, running = Standing.RUNNING, None, chosen
        next_at = jobs[upcoming].arrived_at if upcoming < len(jobs) else inf
        ran_s = min(chosen.remaining_s, next_at - now)
        busy_s += ran_s
        if now + chosen.remaining_s <= next_at:
            now += ran_s
            ended_at |= dict.fromkeys(tasks.pop(chosen.key, [chosen.key]), now)
            present.remove(chosen)
            running = None
        else:
            chosen.remaining_s -= ran_s
            now = next_at
    served = [Served(job=job, ended_at=ended_at[key]) for key, job in enumerate(jobs)]
    return Run(served=served, busy_s=busy_s, preemptions=preemptions)


def aged(policy: Policy, limits: AgingLimits) -> Decide:
    """Whole rounds of a scheduler, for one run without batches: charge what ran, promote, ask."""
    promotions, decide = Promotions(limits, now=0.0), with_aging(policy)
    last: tuple[Candidate, float, float] | None = None  # what was chosen, when, and what remained of it then

    def round_(candidates: Sequence[Candidate], now: float) -> list[Candidate]:
        nonlocal last
        if last is not None and last[0].is_promoted:
            promotions.ran(min(now - last[1], last[2]))
        promotions.promote(candidates, now)
        order = decide(candidates, now, promotions.claim)
        last = (order[0], now, order[0].remaining_s)
        return order

    return round_


def foreseeing(
    policy: Policy, part: float, added_s: Callable[[Candidate], float] = lambda candidate: candidate.remaining_s
) -> Decide:
    """Rounds of a scheduler that sets so much aside of what arrivals will take: ``added_s`` each."""
    forecast, seen = Forecast(0.0, part), -1

    def round_(candidates: Sequence[Candidate], now: float) -> list[Candidate]:
        nonlocal seen
        for candidate in sorted(candidates, key=lambda one: one.key):
            if candidate.key > seen:
                forecast.arrived(candidate.remaining_s, added_s(candidate), candidate.arrived_at)
                seen = candidate.key
        for candidate in candidates:
            candidate.set_aside = forecast.set_aside(candidate.remaining_s)
        return policy(candidates, now)

    return round_


def candidate_of(key: int, job: Job) -> Candidate:
    return Candidate(
        key=key,
        arrived_at=job.arrived_at,
        deadline_at=job.arrived_at + job.objective_s,
        remaining_s=job.work_s,
        priority=job.priority,
    )


def _start(
    present: list[Candidate], tasks: dict[int, list[int]], members: list[Candidate], seconds: float
) -> Candidate:
    """One candidate in place of the members."""
    task = Candidate(
        key=members[0].key,
        arrived_at=min(member.arrived_at for member in members),
        deadline_at=min(member.deadline_at for member in members),
        remaining_s=seconds,
        promises=len(members),
        is_promoted=any(member.is_promoted for member in members),
    )
    tasks[task.key] = [member.key for member in members]
    for member in members:
        present.remove(member)
    insort(present, task, key=Candidate.order)
    return task


@dataclass(frozen=True, slots=True, kw_only=True)
class JobClass:
    objective_s: float
    median: float
    """Of the work: seconds or tokens, as ``draw`` is told."""
    share: float


FOUR_CLASSES = (
    JobClass(objective_s=0.25, median=0.03, share=0.55),
    JobClass(objective_s=0.5, median=0.08, share=0.15),
    JobClass(objective_s=4.0, median=0.5, share=0.2),
    JobClass(objective_s=6.0, median=1.5, share=0.1),
)
"""The paper's four objectives, with seconds of work of our own choice."""


def draw(
    seed: int,
    *,
    load: float,
    count: int,
    classes: Sequence[JobClass] = FOUR_CLASSES,
    work_s_of: Callable[[float], float] = float,
) -> list[Job]:
    """Poisson arrivals, log-normal sizes. ``load``: the share of time that the work fills, one job at a time."""
    source = random.Random(seed)
    drawn = source.choices(classes, [one.share for one in classes], k=count)
    work = [work_s_of(source.lognormvariate(0, 0.8) * one.median) for one in drawn]
    mean_s = sum(work) / count
    at, jobs = 0.0, []
    for one, work_s in zip(drawn, work, strict=True):
        at += source.expovariate(load / mean_s)
        jobs.append(Job(arrived_at=at, work_s=work_s, objective_s=one.objective_s))
    return jobs
