"""What the validation reads from a live worker's events: ``benchmarks/live_machine.py``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flowprefill_sglang.core.prefill_cost import CostModel
from flowprefill_sglang.observe.events import (
    Event,
    RequestArrived,
    TaskFinished,
    TaskPreempted,
    TaskResumed,
    TaskStarted,
)

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "live_machine.py"


@pytest.fixture(scope="module")
def live_machine() -> ModuleType:
    pytest.importorskip("scipy")  # comes with SGLang
    pytest.importorskip("psutil")
    spec = importlib.util.spec_from_file_location("live_machine", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def started(at: float, task: int) -> TaskStarted:
    return TaskStarted(
        at=at, task=task, rids=[str(task)], new_tokens=10, cached_tokens=0, predicted_s=1.0, deadline_at=99.0
    )


def preempted(at: float, task: int) -> TaskPreempted:
    return TaskPreempted(at=at, task=task, rids=[str(task)], victim_class="file", by_class="text", blocking_s=0.0)


def resumed(at: float, task: int) -> TaskResumed:
    return TaskResumed(at=at, task=task, rids=[str(task)], suspended_s=1.0)


def finished(at: float, task: int) -> TaskFinished:
    return TaskFinished(
        at=at, task=task, rids=[str(task)], new_tokens=10, executed_s=1.0, predicted_s=1.0, preemptions=0
    )


def played(live_machine: ModuleType, events: Sequence[Event]) -> Any:
    seconds = {"began_at": 0.0, "took_s": 9.0, "scheduler_cpu_s": 1.0, "host_cpu_s": 1.0}
    return live_machine.Played(records=[], events=list(events), **seconds)


def fitted(live_machine: ModuleType, events: Sequence[Event]) -> float:
    return live_machine.fit_preemption(played(live_machine, events))


def measured(live_machine: ModuleType, *, base_s: float, forward_s: float) -> Any:
    return live_machine.Measured(
        forward=CostModel(base_s=base_s, short_token_s=0.0, long_token_s=0.0, pair_s=0.0),
        gap=live_machine.Gap(forward_s=forward_s, request_s=0.0, token_s=0.0),
        preempt_s=0.25,
        host_before_s=0.0,
        host_after_s=0.0,
        way_s=0.0,
    )


def test_from_a_stop_to_the_next_start_or_resumption(live_machine: ModuleType) -> None:
    events = [
        *(started(0.0, 1), preempted(1.0, 1), started(1.25, 2), finished(2.0, 2)),
        *(resumed(2.5, 1), preempted(3.0, 1), resumed(3.75, 3), finished(4.0, 3)),
        *(resumed(5.0, 1), finished(6.0, 1)),
    ]
    assert fitted(live_machine, events) == 0.5, "what follows an end is a gap, and none of this"


def test_one_that_something_stretched_counts_three_usual_ones(live_machine: ModuleType) -> None:
    times = [(1.0, 1.25), (2.0, 2.25), (3.0, 7.0)]
    events = [event for at, then in times for event in (preempted(at, 1), started(then, 2))]
    assert fitted(live_machine, events) == pytest.approx((0.25 + 0.25 + 0.75) / 3)


def test_nothing_was_preempted(live_machine: ModuleType) -> None:
    assert fitted(live_machine, [started(0.0, 1), finished(1.0, 1)]) == 0.0


def test_where_the_time_was_beside_what_is_modelled(live_machine: ModuleType) -> None:
    arrivals = [
        RequestArrived(at=0.0, rid=str(task), tokens=10, slo_class="text", received_at=0.0, deadline_at=99.0)
        for task in (1, 2, 3)
    ]
    events = [
        *arrivals,
        *(started(0.0, 1), preempted(0.5, 1), started(0.75, 2), finished(2.0, 2)),  # which ran 1 s by its own account
        *(resumed(3.0, 1), finished(3.5, 1), started(5.0, 3), finished(6.0, 3)),
    ]
    its = measured(live_machine, base_s=0.8, forward_s=0.5).against(played(live_machine, events))
    assert its["forwards_over_modelled"] == pytest.approx(3.0 / (3 * 0.8))
    assert (its["gaps"], its["gaps_over_modelled"]) == (2, pytest.approx(2.5 / (2 * 0.5)))
    assert (its["preemptions"], its["preemption_mean_ms"]) == (1, 250.0)


def test_the_simulators_machine_has_it(live_machine: ModuleType) -> None:
    machine = measured(live_machine, base_s=1.0, forward_s=0.5).machine(layers=4)
    assert machine.preempt_s == 0.25
    assert machine.cost.base_s == 1.5
