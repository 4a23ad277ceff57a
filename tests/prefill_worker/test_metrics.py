"""What each event does to the worker's metrics."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from flowprefill_sglang.observe.events import (
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
from flowprefill_sglang.prefill_worker.metrics import MAX_CLASSES, SchedulerMetrics
from flowprefill_sglang.prefill_worker.reporter import Batch


class Metrics(SchedulerMetrics):
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        super().__init__(self.registry)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"flowprefill_{name}", labels)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def arrived(rid: str, at: float = 10.0, slo_class: str = "text", received_at: float | None = None) -> RequestArrived:
    received_at = at if received_at is None else received_at
    return RequestArrived(at=at, rid=rid, tokens=1, slo_class=slo_class, received_at=received_at, deadline_at=at + 1)


def started(*rids: str, at: float, predicted_s: float = 1.0, rest_s: float = 0.0) -> TaskStarted:
    costs = {"predicted_s": predicted_s, "rest_s": rest_s}
    return TaskStarted(at=at, task=1, rids=list(rids), new_tokens=1, cached_tokens=0, deadline_at=at + 1, **costs)


def ended(rid: str, outcome: Outcome = Outcome.PREFILLED, slo_class: str = "text") -> RequestEnded:
    return RequestEnded(at=1, rid=rid, outcome=outcome, slo_class=slo_class, first_token_s=0.2, is_in_time=True)


def preempted(victim: str, by: str) -> TaskPreempted:
    return TaskPreempted(at=1, task=1, rids=["a"], victim_class=victim, by_class=by, blocking_s=0.0002)


def test_preemptions(metrics: Metrics) -> None:
    for _ in range(3):
        metrics.update(preempted("file", "text"))
        metrics.update(TaskResumed(at=1, task=1, rids=["a"], suspended_s=0.5))
    assert metrics.value("preemption_total", victim_class="file", by_class="text") == 3
    assert metrics.value("preemption_blocking_seconds_count") == 3
    assert metrics.value("preemption_blocking_seconds_bucket", le="0.0003") == 3
    assert metrics.value("preemption_blocking_seconds_bucket", le="0.0001") == 0
    assert metrics.value("preempted_suspend_seconds_sum") == 1.5


def test_tasks_that_were_started_over(metrics: Metrics) -> None:
    for executed_s in (0.5, 0.25):
        metrics.update(TaskRetracted(at=1, task=1, rids=["a"], executed_s=executed_s))
    assert metrics.value("retraction_total") == 2
    assert metrics.value("retracted_seconds_total") == 0.75


def test_rounds(metrics: Metrics) -> None:
    for trigger in (Trigger.ARRIVAL, Trigger.ARRIVAL, Trigger.KV_POOL):
        metrics.update(
            RoundDone(at=1, trigger=trigger, duration_s=1e-4, waiting=0, suspended=2, suspended_bytes=1024, promoted=1)
        )
    assert metrics.value("scheduling_rounds_total", event="arrival") == 2
    assert metrics.value("scheduling_rounds_total", event="kv_pool") == 1
    assert metrics.value("scheduling_round_seconds_count") == 3
    assert (metrics.value("suspended_tasks"), metrics.value("suspended_bytes")) == (2, 1024)
    assert metrics.value("starvation_promotion_total") == 3


def test_tokens_and_the_predictors_error(metrics: Metrics) -> None:
    metrics.update(
        TaskFinished(at=1, task=1, rids=["a"], new_tokens=70, executed_s=1.0, predicted_s=0.96, preemptions=0)
    )
    for executed_s, predicted_s in ((0.0, 0.96), (1.0, 0.0)):
        metrics.update(
            TaskFinished(
                at=1, task=1, rids=["a"], new_tokens=15, executed_s=executed_s, predicted_s=predicted_s, preemptions=0
            )
        )
    assert metrics.value("prefill_tokens_total") == 100
    assert metrics.value("predictor_error_ratio_count") == 1, (
        "one aborted before it ran, or not predicted, says nothing"
    )
    assert metrics.value("predictor_error_ratio_bucket", le="0.05") == 1
    assert metrics.value("predictor_error_ratio_bucket", le="0.02") == 0


def test_a_request_waits_once_however_many_chunks_it_has(metrics: Metrics) -> None:
    metrics.update(arrived("a", at=10.0))
    metrics.update(arrived("b", at=11.0, slo_class="file"))
    metrics.update(started("a", "b", at=12.0))
    metrics.update(started("b", at=50.0))
    assert metrics.value("prefill_queue_wait_seconds_sum", **{"class": "text"}) == 2.0
    assert metrics.value("prefill_queue_wait_seconds_sum", **{"class": "file"}) == 1.0


def test_the_predicted_ttft_is_that_of_the_whole_prompt_and_told_once(metrics: Metrics) -> None:
    metrics.update(arrived("a", at=10.0, received_at=9.5))
    metrics.update(started("a", at=10.5, predicted_s=0.25, rest_s=0.75))  # a chunk, and what will follow it
    metrics.update(started("a", at=20.0, predicted_s=0.75))
    assert metrics.value("request_predicted_ttft_seconds_sum") == 2.0
    metrics.update(arrived("b"))
    metrics.update(started("b", at=10.5, predicted_s=0.0))
    assert metrics.value("request_predicted_ttft_seconds_count") == 1, "where nothing was predicted"


def test_only_those_with_a_first_token_count_as_such_and_nothing_is_remembered(metrics: Metrics) -> None:
    for rid, outcome in (("a", Outcome.PREFILLED), ("b", Outcome.ABORTED), ("c", Outcome.FAILED)):
        metrics.update(arrived(rid))
        metrics.update(ended(rid, outcome))
        assert metrics.value("prefill_requests_total", outcome=outcome.value) == 1
    assert metrics.value("prefill_first_token_seconds_count", **{"class": "text"}) == 1
    assert not metrics._waiting, "one that ended before it started would be held for ever"


def test_classes_beyond_the_limit_share_a_label(metrics: Metrics) -> None:
    for number in range(MAX_CLASSES + 10):
        metrics.update(ended("a", slo_class=f"class-{number}"))
    metrics.update(ended("a", slo_class="class-0"))
    metrics.update(ended("a", slo_class="yet another"))
    assert metrics.value("prefill_first_token_seconds_count", **{"class": "class-0"}) == 2
    assert metrics.value("prefill_first_token_seconds_count", **{"class": "other"}) == 11


def test_requests_without_a_class_have_a_label(metrics: Metrics) -> None:
    metrics.update(ended("a", slo_class=""))
    assert metrics.value("prefill_first_token_seconds_count", **{"class": "none"}) == 1


def test_names_are_the_conventions(metrics: Metrics) -> None:
    names = {metric.name for metric in metrics.registry.collect()}
    assert all(re.fullmatch(r"flowprefill_[a-z_]+", name) for name in names)
    assert {
        f"flowprefill_{name}"
        for name in (
            "request_predicted_ttft_seconds",
            "preemption",  # counters are exposed with _total
            "preemption_blocking_seconds",
            "preempted_suspend_seconds",
            "scheduling_rounds",
            "scheduling_round_seconds",
            "suspended_tasks",
            "suspended_bytes",
            "prefill_tokens",
            "starvation_promotion",
            "predictor_error_ratio",
        )
    } <= names


def test_lost_events_are_counted_once(metrics: Metrics) -> None:
    for lost in (0, 5, 5, 7):
        metrics.count(Batch([preempted("file", "text")], lost))
    assert metrics.value("events_lost_total") == 7
    assert metrics.value("preemption_total", victim_class="file", by_class="text") == 4


def test_a_request_whose_end_was_lost_is_not_remembered_for_ever(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowprefill_sglang.prefill_worker.metrics._MAX_WAITING", 10)
    for number in range(20):
        metrics.update(arrived(f"r{number}"))
    assert list(metrics._waiting) == [f"r{number}" for number in range(10, 20)]


def test_metrics_are_those_of_all_of_sglangs_processes(tmp_path: Path) -> None:
    """As in a worker: the modules that the server needs are imported first, then SGLang sets the variable."""
    script = """
        import os, sys
        from flowprefill_sglang.integration import serve
        from flowprefill_sglang.observe.events import RoundDone, Trigger
        from flowprefill_sglang.prefill_worker.event_feed import EventFeed
        from flowprefill_sglang.prefill_worker.reporter import Batch

        os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]
        feed = EventFeed("ipc://unused")
        serve.count_metrics(feed)
        event = RoundDone(at=1.0, trigger=Trigger.ARRIVAL, duration_s=1e-4, waiting=0, suspended=3)
        (count,) = feed._listeners
        count(Batch([event], 0))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], check=True, timeout=60)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    assert registry.get_sample_value("flowprefill_scheduling_rounds_total", {"event": "arrival"}) == 1
    assert registry.get_sample_value("flowprefill_suspended_tasks") == 3, "without a label for the process"
