"""What is set aside for arrivals to come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.core.forecast import MEMORY_S, PART, Forecast


def steady(work_s: float, gap_s: float, until_s: float) -> tuple[Forecast, float]:
    """One request of this length every ``gap_s``."""
    forecast, now = Forecast(0.0), 0.0
    while now < until_s:
        now += gap_s
        forecast.arrived(work_s, work_s, now)
    return forecast, now


def test_of_a_steady_stream_a_part_of_its_share_for_longer_ones_and_nothing_for_shorter_ones() -> None:
    forecast, _ = steady(work_s=0.1, gap_s=0.25, until_s=600.0)
    assert forecast.set_aside(1.0) == pytest.approx(PART * 0.4, rel=0.01)
    assert forecast.set_aside(0.1) == 0.0
    assert forecast.set_aside(0.01) == 0.0


def test_it_is_right_long_before_a_minute_has_passed() -> None:
    forecast, _ = steady(work_s=0.1, gap_s=0.25, until_s=20.0)
    assert forecast.set_aside(1.0) == pytest.approx(PART * 0.4, rel=0.05)


def test_a_single_request_is_no_stream() -> None:
    forecast = Forecast(0.0)
    forecast.arrived(0.5, 0.5, 0.001)
    assert forecast.set_aside(5.0) <= PART * 0.5 / 10


def test_what_came_long_ago_is_forgotten_by_what_comes_now() -> None:
    forecast, now = steady(work_s=0.1, gap_s=0.25, until_s=120.0)
    forecast.arrived(3.0, 3.0, now + 5 * MEMORY_S)
    assert forecast.set_aside(1.0) < 0.01 * PART * 0.4


def test_one_that_comes_late_is_one_of_now() -> None:
    forecast, now = steady(work_s=0.1, gap_s=0.25, until_s=600.0)
    before = forecast.set_aside(1.0)
    forecast.arrived(0.1, 0.1, now - 1e6)
    assert forecast.set_aside(1.0) == pytest.approx(before, rel=0.01)


@given(st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.0, 1e5)), max_size=60))
def test_it_is_a_share_and_grows_with_length(arrivals: list[tuple[float, float]]) -> None:
    forecast, now = Forecast(0.0), 0.0
    for gap_s, work_s in arrivals:
        now += gap_s
        forecast.arrived(work_s, work_s, now)
    shares = [forecast.set_aside(length_s) for length_s in (0.0, 1e-3, 0.01, 0.1, 1.0, 10.0, 1e3, 1e6)]
    assert shares == sorted(shares)
    assert all(0.0 <= share <= 1.0 for share in shares)


def test_work_counts_at_what_it_adds_and_for_those_longer_than_it_is_alone() -> None:
    whole, shared = Forecast(0.0), Forecast(0.0)
    for second in range(1, 100):
        whole.arrived(0.5, 0.5, second)
        shared.arrived(0.5, 0.2, second)
    assert shared.set_aside(1.0) == pytest.approx(whole.set_aside(1.0) * 0.4)
    assert shared.set_aside(0.3) == 0.0
