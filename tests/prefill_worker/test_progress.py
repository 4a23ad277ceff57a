"""Events of the scheduler as changes of dispatches."""

from __future__ import annotations

import pytest

from flowprefill_sglang.observe.events import (
    Event,
    Outcome,
    RequestArrived,
    RequestEnded,
    RoundDone,
    TaskFinished,
    TaskPreempted,
    TaskResumed,
    TaskStarted,
    Trigger,
)
from flowprefill_sglang.prefill_worker.progress import ProgressReader
from flowprefill_sglang.wire.messages import Phase


def arrived(rid: str, dispatch_rid: str) -> Event:
    return RequestArrived(
        at=1, rid=rid, tokens=1, slo_class="", received_at=1, deadline_at=2, dispatch_rid=dispatch_rid
    )


def started(*rids: str) -> Event:
    return TaskStarted(at=1, task=1, rids=list(rids), new_tokens=1, cached_tokens=0, predicted_s=1, deadline_at=2)


def ended(rid: str) -> Event:
    return RequestEnded(at=1, rid=rid, outcome=Outcome.ABORTED, slo_class="", first_token_s=1, is_in_time=False)


def test_each_event_of_a_task_is_one_change_of_each_of_its_requests() -> None:
    events = [
        started("a", "b"),
        TaskPreempted(at=1, task=1, rids=["a", "b"], victim_class="", by_class="", blocking_s=0),
        TaskResumed(at=1, task=1, rids=["a", "b"], suspended_s=0),
        TaskFinished(at=1, task=1, rids=["a", "b"], new_tokens=1, executed_s=1, predicted_s=1, preemptions=1),
        RoundDone(at=1, trigger=Trigger.ARRIVAL, duration_s=0, waiting=0, suspended=0),
    ]
    phases = (Phase.STARTED, Phase.PREEMPTED, Phase.RESUMED)
    assert list(ProgressReader().read(events)) == [(rid, phase) for phase in phases for rid in ("a", "b")]


def test_a_prompt_of_a_batch_has_its_dispatchs_name_until_it_ends() -> None:
    reader = ProgressReader()
    assert list(reader.read([arrived("b_0", "b"), arrived("b_1", "b")])) == []
    assert list(reader.read([started("b_0", "b_1"), ended("b_0"), started("b_0", "b_1")])) == [
        (rid, Phase.STARTED) for rid in ("b", "b", "b_0", "b")
    ]


@pytest.mark.parametrize("dispatch_rid", ["", "a"])
def test_a_single_prompt_needs_no_memory(dispatch_rid: str) -> None:
    reader = ProgressReader()
    assert list(reader.read([arrived("a", dispatch_rid), started("a")])) == [("a", Phase.STARTED)]
    assert not reader._dispatch_of


def test_names_whose_end_was_lost_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowprefill_sglang.prefill_worker.progress._MAX_BATCHED_NAMES", 10)
    reader = ProgressReader()
    list(reader.read(arrived(f"b_{number}", "b") for number in range(20)))
    assert list(reader._dispatch_of) == [f"b_{number}" for number in range(10, 20)]
