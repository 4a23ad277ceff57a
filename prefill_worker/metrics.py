"""A prefill worker's metrics, made from the scheduler's events in the HTTP process.

SGLang's ``/metrics`` collects from all its processes through files (prometheus_client's multiprocess mode): what is
created here appears there, provided that ``PROMETHEUS_MULTIPROC_DIR`` was set before prometheus_client was imported.
SGLang sets it late, while it launches its other processes, so nothing that is imported before may import this module.

The router counts requests and their attainment for the client's view; the names here say ``prefill`` where both would
have one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from flowprefill_sglang.observe.events import (
    Event,
    RequestArrived,
    RequestEnded,
    RoundDone,
    TaskFinished,
    TaskPreempted,
    TaskResumed,
    TaskRetracted,
    TaskStarted,
)
from flowprefill_sglang.prefill_worker.reporter import Batch

MAX_CLASSES: Final = 64
"""Distinct class labels; every further one is counted as ``other``. Classes come from the router's configuration, but
each costs a few files' worth of time series for ever."""
OTHER: Final = "other"

_MAX_WAITING: Final = 65_536

_SHORT_S: Final = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Buckets of what should take one operator or less."""
_LONG_S: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 10.0, 30.0, 60.0, 120.0)
"""Buckets of what a request waits; the paper's objectives are among them."""
_RATIOS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class SchedulerMetrics:
    """Owned by the event loop, as a listener of its ``EventFeed``."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"flowprefill_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            # One process writes it. The other modes add a label with its pid.
            return Gauge(f"flowprefill_{name}", text, registry=registry, multiprocess_mode="mostrecent")

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"flowprefill_{name}", text, labels, buckets=buckets, registry=registry)

        self._requests = counter("prefill_requests_total", "Requests by how they ended in the scheduler", "outcome")
        self._first_token = histogram(
            "prefill_first_token_seconds", "From receipt at the router to the end of the prefill", _LONG_S, "class"
        )
        self._queue_wait = histogram(
            "prefill_queue_wait_seconds", "From being ready on the worker to the start of the prefill", _LONG_S, "class"
        )
        self._predicted_ttft = histogram(
            "request_predicted_ttft_seconds",
            "From receipt at the router to the end of the prefill, as predicted when it began",
            _LONG_S,
        )
        self._preemptions = counter(
            "preemption_total", "Running tasks suspended in favour of another", "victim_class", "by_class"
        )
        self._blocking = histogram(
            "preemption_blocking_seconds", "From the event until the running task had stopped", _SHORT_S
        )
        self._suspend = histogram("preempted_suspend_seconds", "Lengths of suspensions", _LONG_S)
        self._retractions = counter("retraction_total", "Suspended tasks started over, for their memory")
        self._lost_s = counter("retracted_seconds_total", "Device time that tasks had run that were started over")
        self._rounds = counter("scheduling_rounds_total", "Scheduling decisions by what led to them", "event")
        self._round_s = histogram("scheduling_round_seconds", "Time of a scheduling decision", _SHORT_S)
        self._promotions = counter("starvation_promotion_total", "Requests promoted by the aging rule")
        self._suspended = gauge("suspended_tasks", "Tasks suspended now")
        self._suspended_bytes = gauge("suspended_bytes", "Activations that suspended tasks hold now")
        self._tokens = counter("prefill_tokens_total", "Prompt tokens computed, without those found in the cache")
        self._predictor_error = histogram(
            "predictor_error_ratio", "|executed - predicted| / executed, of tasks", _RATIOS
        )
        self._lost = counter("events_lost_total", "Events dropped because the HTTP process did not read them")
        self._labelled: dict[tuple[Any, ...], Any] = {}  # a metric's child by metric and labels
        self._suspended.set(0)  # shown from the start, as counters are
        self._suspended_bytes.set(0)
        self._lost_before = 0
        self._classes: set[str] = set()
        self._waiting: OrderedDict[str, RequestArrived] = OrderedDict()
        self._updates: dict[type[Event], Callable[[Any], None]] = {  # each takes the event of its key
            RequestArrived: self._arrived,
            TaskStarted: self._started,
            TaskPreempted: self._preempted,
            TaskResumed: self._resumed,
            TaskRetracted: self._retracted,
            TaskFinished: self._finished,
            RequestEnded: self._ended,
            RoundDone: self._round_done,
        }

    def update(self, event: Event) -> None:
        """Count one event."""
        self._updates[type(event)](event)

    def count(self, batch: Batch) -> None:
        """Count the events of a batch, and those that were lost before it."""
        for event in batch.events:
            self.update(event)
        if batch.lost > self._lost_before:
            self._lost.inc(batch.lost - self._lost_before)
            self._lost_before = batch.lost

    def _arrived(self, event: RequestArrived) -> None:
        self._waiting[event.rid] = event
        if len(self._waiting) > _MAX_WAITING:  # the event that would have removed the oldest was lost
            self._waiting.popitem(last=False)

    def _started(self, event: TaskStarted) -> None:
        for rid in event.rids:
            arrived = self._waiting.pop(rid, None)  # None: another chunk of a prompt that has started before
            if arrived is not None:
                self._of(self._queue_wait, self._class(arrived.slo_class)).observe(event.at - arrived.at)
                if event.predicted_s > 0:  # SGLang's own scheduler predicts nothing
                    left_s = event.predicted_s + event.rest_s
                    self._predicted_ttft.observe(event.at - arrived.received_at + left_s)

    def _preempted(self, event: TaskPreempted) -> None:
        self._of(self._preemptions, self._class(event.victim_class), self._class(event.by_class)).inc()
        self._blocking.observe(event.blocking_s)

    def _resumed(self, event: TaskResumed) -> None:
        self._suspend.observe(event.suspended_s)

    def _retracted(self, event: TaskRetracted) -> None:
        self._retractions.inc()
        self._lost_s.inc(event.executed_s)

    def _finished(self, event: TaskFinished) -> None:
        self._tokens.inc(event.new_tokens)
        if event.executed_s > 0 and event.predicted_s > 0:  # SGLang's own scheduler predicts nothing
            self._predictor_error.observe(abs(event.executed_s - event.predicted_s) / event.executed_s)

    def _ended(self, event: RequestEnded) -> None:
        self._waiting.pop(event.rid, None)
        self._of(self._requests, event.outcome.value).inc()
        if event.outcome == "prefilled":
            self._of(self._first_token, self._class(event.slo_class)).observe(event.first_token_s)

    def _round_done(self, event: RoundDone) -> None:
        self._of(self._rounds, event.trigger.value).inc()
        self._round_s.observe(event.duration_s)
        self._suspended.set(event.suspended)
        self._suspended_bytes.set(event.suspended_bytes)
        if event.promoted:
            self._promotions.inc(event.promoted)

    def _class(self, name: str) -> str:
        name = name or "none"
        if name in self._classes:
            return name
        if len(self._classes) >= MAX_CLASSES:
            return OTHER
        self._classes.add(name)
        return name

    def _of(self, metric: Any, *labels: str) -> Any:  # Counter or Histogram, and its child of the same kind
        """The child of ``metric`` for these labels; prometheus_client's own look-up costs more than an update."""
        key = (metric, *labels)
        child = self._labelled.get(key)
        if child is None:
            child = self._labelled[key] = metric.labels(*labels)
        return child
