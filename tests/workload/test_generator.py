from __future__ import annotations

from collections import Counter
from itertools import pairwise
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.workload.classes import CLASSES
from flowprefill_sglang.workload.generator import generate_workload


@given(count=st.integers(0, 300), seed=st.integers(0, 10))
def test_shares_hold_up_to_rounding(count: int, seed: int) -> None:
    trace = generate_workload(requests=count, rate_rps=2, seed=seed)
    assert len(trace.requests) == count
    counted = Counter(r.class_name for r in trace.requests)
    for request_class in CLASSES:
        assert abs(counted[request_class.name] - request_class.share * count) < 1


def test_the_seed_decides_everything() -> None:
    first = generate_workload(requests=50, rate_rps=2, seed=7)
    assert first == generate_workload(requests=50, rate_rps=2, seed=7)
    assert first.requests != generate_workload(requests=50, rate_rps=2, seed=8).requests


def test_lengths_and_arrivals_are_as_stated() -> None:
    requests = generate_workload(requests=20_000, rate_rps=5, seed=0).requests
    assert requests[0].arrival_s == 0
    assert requests[-1].arrival_s == pytest.approx(20_000 / 5, rel=0.03)
    gaps = [b.arrival_s - a.arrival_s for a, b in pairwise(requests)]
    assert min(gaps) >= 0
    assert sum(g > 1 / 5 for g in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.02)  # exponential: exp(-1)
    for request_class in CLASSES:
        lengths = [r.input_tokens for r in requests if r.class_name == request_class.name]
        assert median(lengths) == pytest.approx(request_class.median_input_tokens, rel=0.05)
        assert max(lengths) <= request_class.max_input_tokens


def test_shares_add_up_and_patience_grows_with_length() -> None:
    assert sum(c.share for c in CLASSES) == pytest.approx(1)
    for shorter, longer in pairwise(CLASSES):
        assert shorter.slo_s < longer.slo_s
        assert shorter.median_input_tokens < longer.median_input_tokens
