from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.bench.objectives import (
    median_prompts,
    reference_ttft_s,
    scaled_objectives,
    unscaled_objectives,
)
from flowprefill_sglang.workload.classes import CLASSES
from flowprefill_sglang.workload.trace import TraceRequest


def test_on_the_reference_itself_objectives_are_the_papers() -> None:
    medians = {c.name: c.median_input_tokens for c in CLASSES}
    alone = {name: [reference_ttft_s(tokens)] for name, tokens in medians.items()}
    for name, objective in scaled_objectives(medians, alone, 1.0).items():
        assert objective.slo_ms == pytest.approx(unscaled_objectives()[name].slo_ms)
        assert objective.factor == pytest.approx(1)


@given(st.floats(0.01, 100), st.sampled_from([0.25, 0.5, 1.0]))
def test_objectives_grow_with_the_measured_time_and_know_the_length_factor(slower: float, factor: float) -> None:
    medians = {c.name: round(c.median_input_tokens * factor) for c in CLASSES}
    alone = {c.name: [9e9, 0.0, slower * reference_ttft_s(c.median_input_tokens)] for c in CLASSES}  # median counts
    objectives = scaled_objectives(medians, alone, factor)
    assert list(objectives) == [c.name for c in CLASSES]
    for request_class in CLASSES:
        objective = objectives[request_class.name]
        assert objective.factor == pytest.approx(slower)
        assert objective.slo_ms == pytest.approx(1_000 * slower * request_class.slo_s)


def test_objectives_leave_room_on_the_reference() -> None:
    for request_class in CLASSES:  # otherwise the classes' assumed lengths do not belong to the paper's objectives
        assert 2 < request_class.slo_s / reference_ttft_s(request_class.median_input_tokens) < 12


def test_medians_are_per_class() -> None:
    rows = [
        TraceRequest(arrival_s=0, input_tokens=tokens, output_tokens=1, class_name=name)
        for name, tokens in (("text", 10), ("text", 30), ("text", 500), ("file", 7))
    ]
    assert median_prompts(rows) == {"file": 7, "text": 30}
