"""The scheduler of a prefill worker as a state machine: events in, what to run next out. Pure: no SGLang, no clock.

Requests and tasks, and where they go::

    request   WAITING ──started──▶ IN_TASK ──finished──▶ (gone)
                 │                  │   ▲
                 │   chunk finished │   │ started
                 │                  ▼   │
                 └─withdrawn─▶ HALF_PREFILLED ──withdrawn──▶ (gone)

    task      RUNNING ◀──preempted / resumed──▶ SUSPENDED ──▶ (gone: finished, discarded or retracted)

A *task* is one batch's forward pass. At most one is RUNNING. The requests of one that is retracted are WAITING again. A
round asks ``ranking`` for everything that could run, best first, and runs the first that memory admits; ``batch_of``
adds small requests to the batch of a new head.

Who drives it: ``integration.prefill.loop`` with SGLang's scheduler, on that process's main thread, and the simulator.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from flowprefill_sglang.core.aging import AgingLimits, Promotions, with_aging
from flowprefill_sglang.core.batching import BatchLimits, fill_batch
from flowprefill_sglang.core.candidate import Candidate, Standing
from flowprefill_sglang.core.forecast import Forecast
from flowprefill_sglang.core.policies import POLICIES, feasible, in_sedf_order, on_time_first
from flowprefill_sglang.core.prefill_cost import Extent, Predictor
from flowprefill_sglang.errors import InternalError
from flowprefill_sglang.prefill_worker.run_ahead import Cost

MIN_REMAINING_SHARE = 0.02
"""A task that has run longer than predicted still has this share of its prediction to go, as far as anyone knows."""

FORECAST_INTERVAL_S = 1.0
"""How old the waiting requests' ``set_aside`` may be: it follows arrivals of a minute, and a round is to be short."""
RATIO_STEP = 0.02
"""Predictions of waiting requests are made anew when the predictor's correction has moved by this much."""

_keys = count()


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One request from its arrival until its prompt is computed. Owned by ``PrefillScheduler``."""

    rid: str
    slo_class: str
    new_tokens: int
    """Of the prompt, what is still to be computed."""
    cached_tokens: int
    """Of the prompt, what is computed already: a cached prefix, or its own earlier chunks."""
    arrived_at: float
    deadline_at: float
    priority: int = 0
    candidate: Candidate = field(init=False)

    def __post_init__(self) -> None:
        self.candidate = Candidate(
            key=next(_keys),
            arrived_at=self.arrived_at,
            deadline_at=self.deadline_at,
            remaining_s=0.0,
            priority=self.priority,
        )

    @property
    def extent(self) -> Extent:
        """All that remains of it, as one forward would see it."""
        return Extent(self.new_tokens, self.cached_tokens)


@dataclass(slots=True, eq=False, kw_only=True)
class Task:
    """One forward pass under way. Owned by ``PrefillScheduler``."""

    requests: Sequence[Request]
    extents: Sequence[Extent]
    """What this pass computes of each request; less than the request's own extent for a chunk."""
    predicted_s: float
    """Of this pass."""
    rest_s: float
    """Predicted time of the chunks that will follow it."""
    candidate: Candidate
    cost: Cost
    """``predicted_s`` in parts."""
    is_first: bool
    """Of none of its requests anything was computed before, so it can be retracted."""
    executed_s: float = 0.0
    charged_s: float = 0.0
    """Of its running time, what the aging rule has been told of."""
    preemptions: int = 0
    runs_since: float | None = None

    @property
    def number(self) -> int:
        """Unique in this process."""
        return self.candidate.key

    @property
    def new_tokens(self) -> int:
        """Tokens that this pass computes."""
        return sum(extent.new_tokens for extent in self.extents)

    @property
    def cached_tokens(self) -> int:
        """Tokens before those, whose KV this pass reads."""
        return sum(extent.cached_tokens for extent in self.extents)

    def executed_until(self, now: float) -> float:
        """Seconds it has run, the current stretch included."""
        return self.executed_s + (0.0 if self.runs_since is None else now - self.runs_since)


@dataclass(frozen=True, slots=True)
class Ranking:
    """What a round decides from."""

    order: list[Candidate]
    """Everything that could run, best first."""
    promoted: int
    """Those that the aging rule has promoted in this round."""


class PrefillScheduler:
    """What is waiting, what is under way, and what should run. Owned by the scheduler's thread; every ``now`` is a
    monotonic time in seconds."""

    def __init__(
        self,
        predictor: Predictor,
        *,
        policy: str,
        aging: AgingLimits,
        batching: BatchLimits,
        now: float,
    ) -> None:
        self.predictor = predictor
        self.running: Task | None = None
        self._batching = batching
        self._joins_in_sedf_order = POLICIES[policy] is feasible
        self._policy = with_aging(POLICIES[policy])
        self._promotions = Promotions(aging, now)
        self._forecast = Forecast(now)
        self._forecast_at = now
        self._in_deadline_order: list[Candidate] = []
        self._requests: dict[Candidate, Request] = {}
        self._tasks: dict[Candidate, Task] = {}
        self._predicted_with_ratio = predictor.ratio

    # ---- the picture ------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> Iterable[Task]:
        """Every task begun and not ended."""
        return self._tasks.values()

    @property
    def waiting(self) -> int:
        """Requests that are not in a task."""
        return len(self._requests)

    @property
    def suspended(self) -> int:
        """Tasks that are stopped at a boundary."""
        return len(self._tasks) - (self.running is not None)

    def task_of(self, candidate: Candidate) -> Task | None:
        """The task that a candidate stands for, or None for one that stands for a request."""
        return self._tasks.get(candidate)

    def request_of(self, candidate: Candidate) -> Request:
        """The request that a candidate stands for."""
        return self._requests[candidate]

    # ---- events -----------------------------------------------------------------------------------------------

    def arrived(self, request: Request) -> None:
        """A request can be prefilled from now on."""
        self._wait(request, is_new=True)

    def withdrawn(self, request: Request) -> None:
        """A request that is in no task will never be prefilled: aborted, or its decode side is gone."""
        del self._requests[request.candidate]
        self._remove(request.candidate)

    def started(self, requests: Sequence[Request], extents: Sequence[Extent], now: float) -> Task:
        """A forward pass over ``extents`` of ``requests`` begins, and runs from now on. Nothing else may be running."""
        is_first = all(request.candidate.standing is Standing.WAITING for request in requests)
        for request in requests:
            self.withdrawn(request)
            request.candidate.standing = Standing.RUNNING
        overhead_s, tokens_s, attention_s = self.predictor.parts(extents)
        cost = Cost(attention_s, overhead_s + tokens_s)
        predicted_s = sum(cost)
        rests = [
            Extent(request.new_tokens - extent.new_tokens, request.cached_tokens + extent.new_tokens)
            for request, extent in zip(requests, extents, strict=True)
            if request.new_tokens > extent.new_tokens
        ]
        rest_s = self.predictor.seconds(rests) if rests else 0.0
        task = Task(
            requests=requests,
            extents=extents,
            predicted_s=predicted_s,
            rest_s=rest_s,
            candidate=Candidate(
                key=next(_keys),
                arrived_at=min(request.arrived_at for request in requests),
                deadline_at=min(request.deadline_at for request in requests),
                remaining_s=predicted_s + rest_s,
                promises=len(requests),
                priority=max(request.priority for request in requests),
                is_promoted=any(request.candidate.is_promoted for request in requests),
            ),
            cost=cost,
            is_first=is_first,
        )
        self._tasks[task.candidate] = task
        self._insert(task.candidate)
        self._run(task, now)
        return task

    def preempted(self, now: float) -> Task:
        """The running task stays suspended: something else goes first."""
        task = self._pause(now)
        task.preemptions += 1
        task.candidate.standing = Standing.SUSPENDED
        task.candidate.suspended_at = now
        return task

    def resumed(self, task: Task, now: float) -> float:
        """A suspended task goes on; returns how long it was suspended."""
        since = task.candidate.suspended_at
        if since is None:
            raise InternalError(f"task {task.number} is not suspended")
        task.candidate.suspended_at = None
        self._run(task, now)
        return now - since

    def finished(self, now: float) -> Task:
        """The running task's forward pass has ended. Requests of which a part remains are HALF_PREFILLED again."""
        task = self._pause(now)
        self._drop(task)
        self.predictor.observe_batch(task.extents, task.executed_s)
        if abs(self.predictor.ratio / self._predicted_with_ratio - 1.0) > RATIO_STEP:
            self._predict_anew()
        for request, extent in zip(task.requests, task.extents, strict=True):
            if request.new_tokens > extent.new_tokens:
                request.new_tokens -= extent.new_tokens
                request.cached_tokens += extent.new_tokens
                request.candidate.standing = Standing.HALF_PREFILLED
                self._wait(request)
        return task

    def retracted(self, task: Task) -> None:
        """A suspended task was undone. Its requests wait again, with the extents that they have now."""
        if task is self.running or not task.is_first or task.candidate.is_promoted:
            raise InternalError(f"task {task.number} cannot be retracted")
        self._drop(task)
        for request in task.requests:
            request.candidate.standing = Standing.WAITING
            self._wait(request)

    def discarded(self, task: Task, now: float) -> None:
        """A task was ended before its time; none of its requests goes on."""
        if task is self.running:
            self._pause(now)
        self._drop(task)

    # ---- decisions --------------------------------------------------------------------------------------------

    def ranking(self, now: float) -> Ranking:
        """Rank everything that could run; once a round."""
        if self.running is not None:
            self._charge(self.running, now)
        for task in self._tasks.values():
            done_s = task.executed_until(now)
            left_s = max(task.predicted_s - done_s, task.predicted_s * MIN_REMAINING_SHARE)
            task.candidate.remaining_s = left_s + task.rest_s
            task.candidate.set_aside = self._forecast.set_aside(task.candidate.remaining_s / task.candidate.promises)
        if now - self._forecast_at > FORECAST_INTERVAL_S:
            self._forecast_at = now
            for candidate in self._requests:
                candidate.set_aside = self._forecast.set_aside(candidate.remaining_s)
        promoted = self._promotions.promote(self._in_deadline_order, now)
        return Ranking(self._policy(self._in_deadline_order, now, self._promotions.claim), promoted)

    def batch_of(self, head: Request, others: Iterable[Candidate], now: float, kv_room_tokens: int) -> list[Request]:
        """The requests of the head's forward pass: itself, and small waiting ones from ``others``, which is the rest of
        the ranking. ``kv_room_tokens``: free KV for the new tokens of all.

        Under ``feasible``, others join in S-EDF order: that policy counts each request at what it takes alone, so it
        has put some behind that a batch carries in time (docs/scheduling.md has the figures). Those on time come first
        in its ranking.
        """
        limits = self._batching
        # Where nobody can join, as fill_batch would find too, nobody needs to be put in order.
        if limits.max_requests == 1 or head.new_tokens >= limits.max_new_tokens or len(self._requests) == 1:
            return [head]
        kept: set[Candidate] | None = None
        if self._joins_in_sedf_order:
            kept = set(on_time_first(others, now + head.candidate.remaining_s))
            others = in_sedf_order(self._in_deadline_order, now)
        batch = fill_batch(
            head.candidate,
            others,
            now,
            extent_of=self._extent_if_waiting,
            predict=self.predictor.seconds,
            kv_room_tokens=kv_room_tokens,
            limits=limits,
            kept=kept,
        )
        return [self._requests[candidate] for candidate in batch.members]

    def first_begun(self, *, half_prefilled: bool) -> Candidate | None:
        """The running task, or else a suspended one, or else with ``half_prefilled`` a half-prefilled request: its next
        chunk may need what tasks hold."""
        if self.running is not None:
            return self.running.candidate
        half: Candidate | None = None
        for candidate in self._in_deadline_order:
            if candidate in self._tasks:
                return candidate
            if half is None and half_prefilled and candidate.standing is Standing.HALF_PREFILLED:
                half = candidate
        return half

    def claims(self) -> Iterator[int]:
        """Tokens that each begun prompt still needs after its current forward pass; those that need none left out."""
        for candidate, request in self._requests.items():
            if candidate.standing is Standing.HALF_PREFILLED:
                yield request.new_tokens
        for task in self._tasks.values():
            for request, extent in zip(task.requests, task.extents, strict=True):
                if request.new_tokens > extent.new_tokens:
                    yield request.new_tokens - extent.new_tokens

    # ---- inside -----------------------------------------------------------------------------------------------

    def _wait(self, request: Request, *, is_new: bool = False) -> None:
        candidate = request.candidate
        candidate.remaining_s = self.predictor.seconds((request.extent,))
        if is_new:
            added_s = self._batching.added_s(request.extent, self.predictor.parts)
            self._forecast.arrived(candidate.remaining_s, added_s, request.arrived_at)
        candidate.set_aside = self._forecast.set_aside(candidate.remaining_s)
        self._requests[candidate] = request
        self._insert(candidate)

    def _run(self, task: Task, now: float) -> None:
        if self.running is not None:
            raise InternalError(f"task {task.number} cannot run while task {self.running.number} does")
        task.runs_since = now
        task.candidate.standing = Standing.RUNNING
        self.running = task

    def _pause(self, now: float) -> Task:
        task = self.running
        if task is None:
            raise InternalError("no task is running")
        self._charge(task, now)
        task.executed_s = task.executed_until(now)
        task.runs_since = None
        self.running = None
        return task

    def _charge(self, task: Task, now: float) -> None:
        """Tell the aging rule of the time that the running task has had since it was last told."""
        executed_s = task.executed_until(now)
        if task.candidate.is_promoted:
            self._promotions.ran(executed_s - task.charged_s)
        task.charged_s = executed_s

    def _drop(self, task: Task) -> None:
        del self._tasks[task.candidate]
        self._remove(task.candidate)

    def _insert(self, candidate: Candidate) -> None:
        insort(self._in_deadline_order, candidate, key=Candidate.order)

    def _remove(self, candidate: Candidate) -> None:
        at = bisect_left(self._in_deadline_order, candidate.order(), key=Candidate.order)
        if self._in_deadline_order[at] is not candidate:
            raise InternalError(f"candidate {candidate.key} is not where its order says")
        del self._in_deadline_order[at]

    def _predict_anew(self) -> None:
        self._predicted_with_ratio = self.predictor.ratio
        for request in self._requests.values():
            request.candidate.remaining_s = self.predictor.seconds((request.extent,))

    def _extent_if_waiting(self, candidate: Candidate) -> Extent | None:
        return self._requests[candidate].extent if candidate.standing is Standing.WAITING else None
