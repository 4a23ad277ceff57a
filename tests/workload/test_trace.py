from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.workload.classes import CLASS_NAMES, assign_classes, class_for_length
from flowprefill_sglang.workload.trace import (
    TraceRequest,
    at_rate,
    cap_outputs,
    fitting_length_factor,
    mean_rate,
    poisson_arrivals,
    scale_lengths,
    scale_rate,
    spread_ties,
    window,
)

requests = st.lists(
    st.builds(
        TraceRequest,
        arrival_s=st.floats(0, 1e4),
        input_tokens=st.integers(1, 200_000),
        output_tokens=st.integers(0, 5_000),
        class_name=st.sampled_from(["", "text", "file", "coder"]),
    ),
    min_size=1,
    max_size=20,
)
factors = st.floats(1e-3, 1e3)


@given(requests, factors)
def test_scaling_keeps_the_order_of_lengths(rows: list[TraceRequest], factor: float) -> None:
    scaled = scale_lengths(rows, factor)
    assert len(scaled) == len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: rows[i].input_tokens)
    lengths = [scaled[i].input_tokens for i in by_length]
    assert lengths == sorted(lengths)
    assert min(lengths) >= 2
    assert all(r.output_tokens >= 1 for r in scaled)


@given(requests, st.integers(40, 100_000), st.integers(1, 16))
def test_the_automatic_factor_makes_every_request_fit(rows: list[TraceRequest], context: int, answer: int) -> None:
    try:
        factor = fitting_length_factor(rows, context, answer)
    except BadInput:
        assert max(r.input_tokens for r in rows) > 100 * (context - answer)
        return
    fitted = cap_outputs(scale_lengths(rows, factor), answer)
    assert all(r.input_tokens + r.output_tokens <= context for r in fitted)
    assert factor == 1 or 1.1 * factor * max(r.input_tokens for r in rows) > 0.1 * (context - answer - 8)


def test_what_fits_is_not_scaled() -> None:
    rows = [TraceRequest(arrival_s=0, input_tokens=1_000, output_tokens=10)]
    assert fitting_length_factor(rows, 2_000, 10) == 1.0
    assert fitting_length_factor(rows, 518, 10) == 0.5


@given(requests, factors)
def test_rate_scaling_divides_intervals_and_keeps_the_rest(rows: list[TraceRequest], factor: float) -> None:
    for before, after in zip(rows, scale_rate(rows, factor), strict=True):
        assert after.arrival_s == pytest.approx(before.arrival_s / factor)
        assert after.input_tokens == before.input_tokens


@pytest.mark.parametrize("factor", [0, -1, float("inf"), float("nan")])
@pytest.mark.parametrize("scale", [scale_lengths, scale_rate])
def test_nonsense_factors_are_refused(scale, factor: float) -> None:
    with pytest.raises(BadInput, match="scale must be a positive number"):
        scale([], factor)


@given(requests, st.floats(0, 1e4), st.floats(0, 1e4))
def test_a_window_holds_what_arrives_in_it(rows: list[TraceRequest], start: float, length: float) -> None:
    inside = window(rows, start, length)
    assert len(inside) == sum(start <= r.arrival_s < start + length for r in rows)
    assert all(0 <= r.arrival_s <= length + 1e-6 for r in inside)
    assert sum(map(len, (window(rows, 0, start), window(rows, start, None)))) == len(rows)


@given(requests)
def test_every_request_gets_one_of_the_four_classes(rows: list[TraceRequest]) -> None:
    assigned = assign_classes(rows)
    for before, after in zip(rows, assigned, strict=True):
        assert after.class_name in CLASS_NAMES
        if before.class_name in CLASS_NAMES:
            assert after.class_name == before.class_name
        else:
            assert after.class_name == class_for_length(before.input_tokens)


def test_longer_prompts_belong_to_more_patient_classes() -> None:
    assert [class_for_length(n) for n in (1, 800, 801, 2_000, 2_001, 6_000, 6_001, 10**6)] == [
        "text", "text", "image", "image", "search", "search", "file", "file",
    ]  # fmt: skip


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(BadInput, match="no room"):
        fitting_length_factor([], 20, 16)


def test_rows_of_equal_time_are_spread_until_the_next_time() -> None:
    rows = [TraceRequest(arrival_s=at, input_tokens=n, output_tokens=1) for n, at in enumerate([0, 0, 0, 3, 3, 9], 2)]
    spread = spread_ties(rows, seed=1)
    assert spread == spread_ties(rows, seed=1) != spread_ties(rows, seed=2)
    assert sorted(r.input_tokens for r in spread) == [r.input_tokens for r in rows]
    assert [r.arrival_s for r in spread] == sorted({r.arrival_s for r in spread}), "no two at once, in order"
    room = {2: (0, 3), 3: (0, 3), 4: (0, 3), 5: (3, 9), 6: (3, 9), 7: (9, 9)}
    assert all(room[r.input_tokens][0] <= r.arrival_s <= room[r.input_tokens][1] for r in spread)


def test_a_rate_keeps_the_pattern_of_arrivals() -> None:
    rows = [TraceRequest(arrival_s=at, input_tokens=9, output_tokens=1) for at in (0, 1, 4, 10)]
    faster = at_rate(rows, 3)
    assert mean_rate(faster) == pytest.approx(3)
    assert [r.arrival_s for r in faster] == pytest.approx([0, 0.1, 0.4, 1.0])
    assert at_rate(rows[:1], 3) == (rows[0],)
    with pytest.raises(BadInput, match="arrive at the same time"):
        at_rate([rows[0], rows[0]], 3)


def test_poisson_arrivals_have_their_rate_and_repeat_for_a_seed() -> None:
    rows = [TraceRequest(arrival_s=0, input_tokens=n, output_tokens=1) for n in range(2, 4_002)]
    timed = poisson_arrivals(rows, 5, seed=1)
    assert timed == poisson_arrivals(rows, 5, seed=1) != poisson_arrivals(rows, 5, seed=2)
    assert timed[0].arrival_s == 0
    assert mean_rate(timed) == pytest.approx(5, rel=0.05)
    assert [r.input_tokens for r in timed] == [r.input_tokens for r in rows]
    with pytest.raises(BadInput, match="rate must be a positive number"):
        poisson_arrivals(rows, 0, seed=1)


def test_classes_by_length_or_with_names_of_ones_own() -> None:
    rows = [TraceRequest(arrival_s=0, input_tokens=9_000, output_tokens=1, class_name=n) for n in ("text", "coder")]
    assert [r.class_name for r in assign_classes(rows)] == ["text", "file"]
    assert [r.class_name for r in assign_classes(rows, by="length")] == ["file", "file"]
    assert [r.class_name for r in assign_classes(rows, names={"coder"})] == ["file", "coder"]
