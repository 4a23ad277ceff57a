"""Histograms of fixed size."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.sim.tally import ClassTally, Durations


@given(st.lists(st.floats(0.0, 1e5), min_size=1, max_size=50), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_quantiles_are_within_a_bucket(values: list[float], part: float) -> None:
    durations = Durations()
    for value in values:
        durations.add(value)
    exact = sorted(values)[max(0, math.ceil(part * len(values)) - 1)]
    found = durations.quantile_s(part)
    assert found is not None
    assert exact * 0.999 <= found <= max(exact * 1.023, 1.1e-5)
    assert durations.count == len(values)
    assert durations.longest_s == max(values)


def test_nothing_has_no_quantile() -> None:
    assert Durations().quantile_s(0.5) is None
    assert Durations().mean_s is None


def test_in_time_includes_the_deadline_itself() -> None:
    tally = ClassTally(slo_s=0.25, arrived=4)
    for ttft_s in (0.1, 0.25, 0.2500001, 3.0):
        tally.ended(ttft_s)
    assert (tally.attained, tally.attainment) == (2, 0.5)
