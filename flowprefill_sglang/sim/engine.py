"""The event core: one heap, one virtual clock, routers and workers.

Requests come from outside in order of arrival, so only what workers will do is on the heap: at most one wake-up a
worker that counts (an older one that was brought forward stays and is passed over) and one answer for each request
whose KV is on its way. Memory is that of the requests in the system, whatever the length of the trace.

Where the machine has a host core (``Machine.host_before_s``), requests pass it in order, once on their way to a router
and once on their way back; those that have not reached a router yet are on the heap too.

A load balancer hands requests to routers in turn; each router chooses among its own workers, since a worker joins one
router, by the product's policy over what it has assigned and not seen answered.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from math import inf
from typing import Final

from flowprefill_sglang.errors import InternalError
from flowprefill_sglang.prefill_worker.scheduler import Request
from flowprefill_sglang.router.policies import POLICIES as DISPATCH_POLICIES
from flowprefill_sglang.router.policies import Policy as DispatchPolicy
from flowprefill_sglang.sim.tally import ClassTally, Tally
from flowprefill_sglang.sim.workers import SimWorker, WorkerSettings, make_worker
from flowprefill_sglang.workload.trace import TraceRequest

_WAKE: Final = 0  # in place of an answer's tokens, of which there is at least one
_ADMIT: Final = -1  # likewise: a request has passed the host core


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """One simulated cluster."""

    worker: WorkerSettings
    workers: int = 1
    routers: int = 1
    dispatch: str = "least_work"
    """A name in ``router.policies.POLICIES``."""
    seed: int = 0


@dataclass(slots=True)
class _Router:
    workers: list[SimWorker]
    choose: DispatchPolicy[SimWorker]
    turn: int = 0

    def dispatch(self, tokens: int) -> SimWorker:
        worker = self.choose(self.workers, tokens, self.turn)
        self.turn += 1
        worker.outstanding_tokens += tokens
        return worker


def run(
    requests: Iterable[TraceRequest],
    objectives_s: Mapping[str, float],
    settings: ClusterSettings,
    on_ended: Callable[[Request, float], None] | None = None,
) -> Tally:
    """Serve all requests, which come in order of arrival, and return what became of them.

    ``on_ended`` is told of each request and when its first token was there.
    """
    tally = Tally(classes={name: ClassTally(slo_s) for name, slo_s in objectives_s.items()})
    engine = _Engine(settings, tally, on_ended)
    for number, row in enumerate(requests):
        at = row.arrival_s
        engine.run_until(at)
        of_class = tally.classes[row.class_name]
        of_class.arrived += 1
        request = Request(
            rid=str(number),
            slo_class=row.class_name,
            new_tokens=row.input_tokens,
            cached_tokens=0,
            arrived_at=at,
            deadline_at=at + of_class.slo_s,
        )
        engine.arrive(request, at)
        tally.last_arrival_at = at
    engine.run_until(inf)
    if tally.ended != tally.arrived:
        raise InternalError(f"{tally.arrived} requests arrived and {tally.ended} ended")
    return tally


class _Engine:
    def __init__(
        self, settings: ClusterSettings, tally: Tally, on_ended: Callable[[Request, float], None] | None
    ) -> None:
        self._tally = tally
        self._machine = settings.worker.machine
        self._on_ended = on_ended
        workers = [make_worker(settings.worker, tally, settings.seed, number) for number in range(settings.workers)]
        choose = DISPATCH_POLICIES[settings.dispatch]
        self._routers = [_Router(workers[first :: settings.routers], choose) for first in range(settings.routers)]
        self._turn = 0
        self._heap: list[tuple[float, int, SimWorker | Request, int]] = []
        self._numbers = count(1)
        self._host_free_at = 0.0

    def arrive(self, request: Request, now: float) -> None:
        if self._machine.host_before_s:
            admitted_at = self._on_host(now, self._machine.host_before_s)
            heapq.heappush(self._heap, (admitted_at, next(self._numbers), request, _ADMIT))
        else:
            self._admit(request, now)

    def _on_host(self, now: float, seconds: float) -> float:
        """When the host core has done so much more for a request that comes to it now."""
        self._host_free_at = max(now, self._host_free_at) + seconds
        return self._host_free_at

    def _admit(self, request: Request, now: float) -> None:
        self._tally.events += 1
        router = self._routers[self._turn % len(self._routers)]
        self._turn += 1
        worker = router.dispatch(request.new_tokens)
        worker.arrive(request, now)
        self._schedule(worker)

    def run_until(self, now: float) -> None:
        """Let everything happen that is due before ``now``; what is due then waits for arrivals of that instant."""
        heap = self._heap
        while heap and heap[0][0] < now:
            at, number, worker, answered_tokens = heapq.heappop(heap)
            if isinstance(worker, Request):
                self._admit(worker, at)
                continue
            if answered_tokens != _WAKE:
                worker.outstanding_tokens -= answered_tokens
            elif number == worker.wake_number:
                worker.scheduled_at = inf
                for request, last_tokens in worker.wake(at):
                    self._end(worker, request, last_tokens, at)
                self._schedule(worker)
            else:
                continue
            self._tally.events += 1

    def _schedule(self, worker: SimWorker) -> None:
        if worker.wake_at != worker.scheduled_at:
            worker.scheduled_at, worker.wake_number = worker.wake_at, next(self._numbers)
            if worker.wake_at < inf:
                heapq.heappush(self._heap, (worker.wake_at, worker.wake_number, worker, _WAKE))

    def _end(self, worker: SimWorker, request: Request, last_tokens: int, now: float) -> None:
        machine = self._machine
        passed_at = self._on_host(now, machine.host_after_s) if machine.host_after_s else now
        answered_at = passed_at + machine.handoff_s(last_tokens)
        tokens = request.new_tokens + request.cached_tokens
        heapq.heappush(self._heap, (answered_at, next(self._numbers), worker, tokens))
        self._tally.last_ended_at = now
        self._tally.classes[request.slo_class].ended(answered_at - request.arrived_at)
        if self._on_ended is not None:
            self._on_ended(request, answered_at)
