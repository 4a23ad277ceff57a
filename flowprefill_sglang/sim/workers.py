"""Simulated prefill workers: the product's scheduler, and SGLang's own, on a virtual clock.

A worker is driven by the engine alone. ``arrive`` tells it of a request; ``wake`` is called at ``wake_at``, the next
point in time at which something happens there: its forward ends, it reaches the boundary at which it stops for news,
or it is idle and has news. Arrivals of one instant are all told before the worker is woken, as one message after the
other is taken in before a round.

``PreemptiveWorker`` follows ``integration.prefill.loop`` turn by turn: it asks the same state machine
(``prefill_worker.scheduler``) for its ranking and batches, with the same admission rule. Memory is never short here,
but tasks are limited in number.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import inf
from typing import Final, Protocol

from flowprefill_sglang.core.aging import AgingLimits
from flowprefill_sglang.core.batching import BatchLimits
from flowprefill_sglang.core.candidate import Candidate, Standing
from flowprefill_sglang.core.prefill_cost import Extent, Predictor
from flowprefill_sglang.prefill_worker.retraction import Outlook
from flowprefill_sglang.prefill_worker.scheduler import PrefillScheduler, Request, Task
from flowprefill_sglang.sim.boundaries import next_boundary_s
from flowprefill_sglang.sim.configuration import STOCK_BATCH_TOKENS, Configuration
from flowprefill_sglang.sim.machine import Machine
from flowprefill_sglang.sim.stock import StockQueue
from flowprefill_sglang.sim.tally import Tally

_UNLIMITED_KV_TOKENS: Final = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What all workers of a run have in common."""

    machine: Machine
    configuration: Configuration
    aging: AgingLimits
    batching: BatchLimits
    is_batching: bool = True
    """False: every forward computes one request."""
    max_tasks: int = 64
    """Tasks begun and not ended, as the product's ``SchedulerSettings`` has it."""
    switch_s: float = 0.0
    """Device time lost whenever another task starts or goes on."""
    error: float = 0.0
    """Standard deviation of the logarithm of real over predicted seconds, drawn for each forward."""


@dataclass(slots=True, kw_only=True)
class Forward:
    """A forward pass under way, as the device has it."""

    parts: tuple[float, float, float]
    total_s: float
    executed_s: float = 0.0
    """Up to when it last stopped."""
    runs_from: float = 0.0

    @property
    def ends_at(self) -> float:
        """If it is not stopped."""
        return self.runs_from + (self.total_s - self.executed_s)


class SimWorker(Protocol):
    """A worker as the engine and the routers' policies see it."""

    wake_at: float
    scheduled_at: float
    """The engine's: when its pending event is, and which one it is."""
    wake_number: int
    outstanding_tokens: int
    """The router's picture: assigned and not yet answered."""

    def arrive(self, request: Request, now: float) -> None:
        """A request is there."""

    def wake(self, now: float) -> Sequence[tuple[Request, int]]:
        """Do what is due at ``wake_at``; returns the requests whose prefill ended, with their last forward's tokens."""


def make_worker(settings: WorkerSettings, tally: Tally, seed: int, number: int) -> SimWorker:
    """The kind of worker that the configuration asks for."""
    device = Device(settings, tally, random.Random(f"device {seed} {number}"))
    if settings.configuration.is_stock:
        return StockWorker(settings, tally, device)
    return PreemptiveWorker(settings, tally, device)


class Device:
    """Makes forwards: the cost model's seconds, with an error if one is asked for."""

    def __init__(self, settings: WorkerSettings, tally: Tally, rng: random.Random) -> None:
        self._cost = settings.machine.cost
        self._error = settings.error
        self._tally = tally
        self._rng = rng

    def forward(self, extents: Sequence[Extent], runs_from: float) -> Forward:
        parts = self._cost.parts(extents)
        if self._error:
            factor = math.exp(self._rng.gauss(0.0, self._error))
            parts = (parts[0] * factor, parts[1] * factor, parts[2] * factor)
        total_s = sum(parts)
        self._tally.forwards += 1
        self._tally.busy_s += total_s
        return Forward(parts=parts, total_s=total_s, runs_from=runs_from)


class StockWorker:
    """SGLang's own scheduler: what runs is never interrupted."""

    def __init__(self, settings: WorkerSettings, tally: Tally, device: Device) -> None:
        self.wake_at = self.scheduled_at = inf
        self.wake_number = 0
        self.outstanding_tokens = 0
        self._device = device
        self._tally = tally
        self._queue = StockQueue(
            batch_tokens=STOCK_BATCH_TOKENS,
            chunk_tokens=settings.configuration.chunk_tokens,
            is_batching=settings.is_batching,
        )
        self._running: list[tuple[Request, Extent]] = []
        self._news_at: list[float] = []

    def arrive(self, request: Request, now: float) -> None:
        self._queue.waiting.append(request)
        if not self._running:
            self.wake_at = now
        else:
            self._news_at.append(now)

    def wake(self, now: float) -> Sequence[tuple[Request, int]]:
        ended = []
        for request, extent in self._running:
            if extent.new_tokens == request.new_tokens:
                ended.append((request, extent.new_tokens))
            else:
                request.new_tokens -= extent.new_tokens
                request.cached_tokens += extent.new_tokens
        for at in self._news_at:
            self._tally.blocking.add(now - at)
        self._news_at.clear()
        self._tally.rounds += 1
        requests, extents = self._queue.next_batch()
        self._running = list(zip(requests, extents, strict=True))
        self.wake_at = self._device.forward(extents, now).ends_at if requests else inf
        return ended


class PreemptiveWorker:
    """The product's scheduler."""

    def __init__(self, settings: WorkerSettings, tally: Tally, device: Device) -> None:
        self.wake_at = self.scheduled_at = inf
        self.wake_number = 0
        self.outstanding_tokens = 0
        self._settings = settings
        self._tally = tally
        self._device = device
        configuration = settings.configuration
        self._core = PrefillScheduler(
            Predictor(settings.machine.cost),
            policy=configuration.policy,
            aging=settings.aging,
            batching=settings.batching if settings.is_batching else replace(settings.batching, max_requests=1),
            now=0.0,
        )
        self._chunk_tokens = configuration.chunk_tokens or _UNLIMITED_KV_TOKENS
        self._forwards: dict[Task, Forward] = {}
        self._news_at: list[float] = []

    def arrive(self, request: Request, now: float) -> None:
        self._core.arrived(request)
        task = self._core.running
        if task is None:
            self.wake_at = now
            return
        self._news_at.append(now)
        if len(self._news_at) == 1:
            self.wake_at = self._next_stop_at(self._forwards[task], now)

    def wake(self, now: float) -> Sequence[tuple[Request, int]]:
        for at in self._news_at:
            self._tally.blocking.add(now - at)
        self._news_at.clear()
        ended: Sequence[tuple[Request, int]] = ()
        task = self._core.running
        if task is not None:
            forward = self._forwards[task]
            if now >= forward.ends_at:
                ended = self._finish(task, now)
            elif now > forward.runs_from:  # else it has not begun: the switch to it takes until then
                forward.executed_s += now - forward.runs_from
                forward.runs_from = now
        self._round(now)
        task = self._core.running
        self.wake_at = inf if task is None else self._forwards[task].ends_at
        return ended

    def _next_stop_at(self, forward: Forward, now: float) -> float:
        settings = self._settings
        executed_s = forward.executed_s + max(0.0, now - forward.runs_from)
        boundary_s = next_boundary_s(settings.machine, forward.parts, executed_s, settings.configuration.granularity)
        if boundary_s == inf:
            return forward.ends_at
        return max(now, forward.runs_from + (boundary_s - forward.executed_s))

    def _finish(self, task: Task, now: float) -> list[tuple[Request, int]]:
        del self._forwards[task]
        ended = [
            (request, extent.new_tokens)
            for request, extent in zip(task.requests, task.extents, strict=True)
            if request.new_tokens == extent.new_tokens
        ]
        self._core.finished(now)
        return ended

    def _round(self, now: float) -> None:
        self._tally.rounds += 1
        order = self._core.ranking(now).order
        has_room = len(self._forwards) < self._settings.max_tasks
        outlook: Outlook | None = None
        for place, candidate in enumerate(order):
            task = self._core.task_of(candidate)
            if task is not None:
                self._go_on(task, now)
                return
            if not has_room:
                outlook = outlook or Outlook.of(order, now)
                has_room = candidate in outlook.on_time and self._retract_one(outlook, now)
                if has_room:  # the retracted task's requests have another place
                    order = self._core.ranking(now).order
                    place = order.index(candidate)
            if has_room:
                self._start(candidate, islice(order, place + 1, None), now)
                return

    def _retract_one(self, outlook: Outlook, now: float) -> bool:
        for candidate in outlook.given_up:
            task = self._core.task_of(candidate)
            if task is not None and task.is_first:
                if task is self._core.running:
                    self._core.preempted(now)
                    self._tally.preemptions += 1
                forward = self._forwards.pop(task)
                self._tally.busy_s -= forward.total_s - forward.executed_s
                self._tally.retractions += 1
                self._core.retracted(task)
                return True
        return False

    def _go_on(self, task: Task, now: float) -> None:
        if task is self._core.running:
            return
        runs_from = self._switched_at(now)
        self._core.resumed(task, now)
        self._forwards[task].runs_from = runs_from

    def _start(self, candidate: Candidate, others: Iterable[Candidate], now: float) -> None:
        head = self._core.request_of(candidate)
        requests = [head]
        if candidate.standing is Standing.WAITING:
            requests = self._core.batch_of(head, others, now, _UNLIMITED_KV_TOKENS)
        runs_from = self._switched_at(now)
        extents = [Extent(min(one.new_tokens, self._chunk_tokens), one.cached_tokens) for one in requests]
        task = self._core.started(requests, extents, now)
        self._forwards[task] = self._device.forward(extents, runs_from)

    def _switched_at(self, now: float) -> float:
        """When another task can run. What runs is stopped for it."""
        if self._core.running is None:
            return now + self._settings.switch_s
        self._core.preempted(now)
        self._tally.preemptions += 1
        return now + self._settings.switch_s + self._settings.machine.preempt_s
