"""Writes the events of ``observe.events`` from the scheduler's own objects. Whoever drives the state machine, a
worker's loop or the simulator, keeps a journal beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flowprefill_sglang.observe.events import (
    Event,
    Outcome,
    RequestArrived,
    RequestEnded,
    RoundDone,
    TaskFinished,
    TaskPreempted,
    TaskResumed,
    TaskRetracted,
    TaskStarted,
    Trigger,
)
from flowprefill_sglang.prefill_worker.scheduler import PrefillScheduler, Request, Task


class Journal:
    """``record`` takes each event at once. Every ``now`` is the time of what is written down."""

    def __init__(self, record: Callable[[Event], None]) -> None:
        self._record = record

    def arrived(self, request: Request, dispatch_rid: str, now: float) -> None:
        """A request can be prefilled."""
        self._record(
            RequestArrived(
                at=now,
                rid=request.rid,
                tokens=request.new_tokens + request.cached_tokens,
                slo_class=request.slo_class,
                received_at=request.arrived_at,
                deadline_at=request.deadline_at,
                dispatch_rid=dispatch_rid,
            )
        )

    def ended(self, request: Request, outcome: Outcome, now: float) -> None:
        """A request is prefilled, or will not be."""
        self._record(
            RequestEnded(
                at=now,
                rid=request.rid,
                outcome=outcome,
                slo_class=request.slo_class,
                first_token_s=now - request.arrived_at,
                is_in_time=outcome is Outcome.PREFILLED and now <= request.deadline_at,
            )
        )

    def started(self, task: Task, now: float) -> None:
        """A task runs for the first time."""
        self._record(
            TaskStarted(
                at=now,
                task=task.number,
                rids=_rids(task),
                new_tokens=task.new_tokens,
                cached_tokens=task.cached_tokens,
                predicted_s=task.predicted_s,
                deadline_at=task.candidate.deadline_at,
                rest_s=task.rest_s,
            )
        )

    def preempted(self, task: Task, by: Sequence[Request], blocking_s: float, now: float) -> None:
        """A task was stopped for these requests, ``blocking_s`` after the event that led to it."""
        self._record(
            TaskPreempted(
                at=now,
                task=task.number,
                rids=_rids(task),
                victim_class=task.requests[0].slo_class,
                by_class=by[0].slo_class,
                blocking_s=blocking_s,
            )
        )

    def resumed(self, task: Task, suspended_s: float, now: float) -> None:
        """A suspended task goes on."""
        self._record(TaskResumed(at=now, task=task.number, rids=_rids(task), suspended_s=suspended_s))

    def retracted(self, task: Task, now: float) -> None:
        """A suspended task was undone; its requests wait again."""
        self._record(TaskRetracted(at=now, task=task.number, rids=_rids(task), executed_s=task.executed_s))

    def finished(self, task: Task, now: float) -> None:
        """A task's forward pass has ended."""
        self._record(
            TaskFinished(
                at=now,
                task=task.number,
                rids=_rids(task),
                new_tokens=task.new_tokens,
                executed_s=task.executed_s,
                predicted_s=task.predicted_s,
                preemptions=task.preemptions,
            )
        )

    def round(
        self,
        core: PrefillScheduler,
        trigger: Trigger,
        *,
        duration_s: float,
        suspended_bytes: int,
        promoted: int,
        now: float,
    ) -> None:
        """A scheduling decision was taken."""
        self._record(
            RoundDone(
                at=now,
                trigger=trigger,
                duration_s=duration_s,
                waiting=core.waiting,
                suspended=core.suspended,
                suspended_bytes=suspended_bytes,
                promoted=promoted,
            )
        )


def _rids(task: Task) -> list[str]:
    return [request.rid for request in task.requests]
