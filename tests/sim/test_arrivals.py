"""Workloads as streams, and what load means."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import pytest

from flowprefill_sglang.core.prefill_cost import CostModel
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.sim import arrivals
from flowprefill_sglang.sim.arrivals import at_load, generated, measure, replayed, windows
from flowprefill_sglang.sim.machine import LLAMA_LIKE, Machine
from flowprefill_sglang.workload.trace import TraceRequest

MACHINE = Machine(
    name="m",
    cost=CostModel(base_s=0.0, short_token_s=0.0, long_token_s=0.01, pair_s=0.0),
    layers=1,
    operators=LLAMA_LIKE,
)


def row(at: float, tokens: int = 100) -> TraceRequest:
    return TraceRequest(arrival_s=at, input_tokens=tokens, output_tokens=1, class_name="text")


def test_load_one_is_work_as_fast_as_it_can_be_computed() -> None:
    rows = [row(float(number)) for number in range(11)]  # one a second, of a second each
    size = measure(replayed(rows), MACHINE)
    assert (size.requests, size.span_s, size.work_s) == (11, 10.0, pytest.approx(11.0))
    assert size.interval_factor(1.0, workers=1) == pytest.approx(1.0)
    assert size.interval_factor(2.0, workers=1) == pytest.approx(0.5)
    assert size.interval_factor(1.0, workers=4) == pytest.approx(0.25)
    assert [r.arrival_s for r in islice(at_load(replayed(rows), 0.5), 3)] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("rows", [[row(0.0)], [row(0.0), row(0.0)]])
def test_no_rate_cannot_be_scaled(rows: list[TraceRequest]) -> None:
    with pytest.raises(BadInput, match="no rate to scale"):
        measure(replayed(rows), MACHINE).interval_factor(1.0, 1)


def test_the_generated_workload_is_a_stream_that_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "_BLOCK_REQUESTS", 100)
    workload = generated(250, seed=3)
    rows = list(workload())
    assert rows == list(workload())
    assert rows != list(generated(250, seed=4)())
    assert len(rows) == 250
    assert all(before.arrival_s <= after.arrival_s for before, after in pairwise(rows))
    assert Counter(r.class_name for r in rows[100:200]) == {"text": 60, "image": 20, "search": 12, "file": 8}
    assert rows[:100] != rows[100:200]
    shorter = list(generated(250, seed=3, length_scale=0.5)())
    assert sum(r.input_tokens for r in shorter) == pytest.approx(sum(r.input_tokens for r in rows) / 2, rel=0.01)


def test_windows_are_consecutive() -> None:
    rows = [row(float(number)) for number in range(5)]
    assert [[r.arrival_s for r in part] for part in windows(iter(rows), 2)] == [[0, 1], [2, 3], [4]]
