from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.bench.windows import cut_windows
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.workload.trace import TraceRequest


def trace(count: int) -> list[TraceRequest]:
    return [
        TraceRequest(arrival_s=2.0 * n, input_tokens=n + 2, output_tokens=1, class_name="text") for n in range(count)
    ]


@given(st.integers(2, 200), st.integers(1, 6), st.integers(2, 60))
def test_windows_lie_apart_and_begin_at_zero(rows: int, count: int, size: int) -> None:
    if rows // count < 2:
        with pytest.raises(BadInput, match="too few"):
            cut_windows(trace(rows), count, size)
        return
    windows = cut_windows(trace(rows), count, size)
    assert len(windows) == count
    taken = [r.input_tokens for window in windows for r in window.requests]
    assert len(taken) == len(set(taken)) == count * min(size, rows // count)
    assert all(window.requests[0].arrival_s == 0 for window in windows)
    assert all(trace(rows)[w.first_row].input_tokens == w.requests[0].input_tokens for w in windows)


def test_a_window_describes_itself() -> None:
    (window,) = cut_windows(trace(10), 1, 4)
    assert window.to_document() == {
        "first_row": 5,
        "requests": 4,
        "classes": {"text": 4},
        "mean_input_tokens": 8.5,
        "own_rate_rps": 0.5,
    }
