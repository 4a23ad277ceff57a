from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.bench.goodput import EXTRA_PROBES, Estimate, GoodputSearch, Probe, estimate


def probe(rate_rps: float, attained: int, requests: int = 100) -> Probe:
    return Probe(rate_rps=rate_rps, attained=attained, requests=requests)


def test_the_crossing_is_interpolated_in_the_logarithm_of_the_rate() -> None:
    found = estimate([probe(16, 80), probe(4, 100)])
    assert found.rate_rps == pytest.approx(8)
    assert found.passed_rps == 4
    assert found.is_bracketed


def test_probes_on_one_side_give_a_bound() -> None:
    above, below = estimate([probe(2, 50), probe(3, 40)]), estimate([probe(2, 99), probe(3, 95)])
    assert (above.rate_rps, above.passed_rps, above.is_bracketed) == (2, 0, False)
    assert (below.rate_rps, below.passed_rps, below.is_bracketed) == (3, 3, False)


def test_a_lucky_probe_at_a_high_rate_does_not_decide() -> None:
    """92% at 10 after 84% at 9 is noise: together they are 88%."""
    found = estimate([probe(8, 96), probe(9, 84), probe(10, 92)])
    assert 8 < found.rate_rps < 9
    assert found.passed_rps == 8


def test_no_probes_no_estimate() -> None:
    with pytest.raises(ValueError, match="at least one probe"):
        estimate([])


@given(
    st.lists(
        st.tuples(st.floats(0.1, 100), st.integers(0, 50), st.integers(1, 50)).filter(lambda row: row[1] <= row[2]),
        min_size=1,
        max_size=8,
        unique_by=lambda row: row[0],
    )
)
def test_an_estimate_lies_within_the_probed_rates(rows: list[tuple[float, int, int]]) -> None:
    found = estimate([probe(*row) for row in rows])
    rates = [row[0] for row in rows]
    assert min(rates) * 0.999 <= found.rate_rps <= max(rates) * 1.001
    assert found.passed_rps <= found.rate_rps * 1.001


@given(st.floats(0.5, 50), st.floats(0.4, 2.5), st.floats(0.15, 1.0))
def test_six_probes_find_the_crossing(true_rps: float, off_by: float, slope: float) -> None:
    """Of attainment that falls linearly in log rate, as near the target; the guess is up to 2.5 times off."""
    search = GoodputSearch(guess_rps=true_rps * off_by)
    for _ in range(6):
        rate = search.next_rate()
        attainment = min(1.0, max(0.0, 0.9 - slope * math.log(rate / true_rps)))
        search.probes.append(probe(rate, round(10_000 * attainment), 10_000))
    found = estimate(search.probes)
    assert found.is_bracketed
    assert found.rate_rps == pytest.approx(true_rps, rel=0.12)


def test_no_rate_is_offered_twice_while_the_crossing_is_open() -> None:
    search = GoodputSearch(guess_rps=10)
    for attained in (95, 60, 90, 89, 91):
        rate = search.next_rate()
        assert all(abs(math.log(rate / known.rate_rps)) > 0.001 for known in search.probes)
        search.probes.append(probe(rate, attained))


@given(st.floats(0.01, 100))
def test_a_guess_that_is_far_off_is_soon_bracketed(off_by: float) -> None:
    """The more probes lie on one side, the longer the steps."""
    search = GoodputSearch(guess_rps=10 * off_by)
    while not search.is_done(4):
        rate = search.next_rate()
        search.probes.append(probe(rate, 100 if rate <= 10 else 50))
    assert len(search.probes) <= 8
    assert estimate(search.probes).is_bracketed


def test_a_server_that_passes_at_every_rate_ends_the_search() -> None:
    search = GoodputSearch(guess_rps=1)
    while not search.is_done(2):
        search.probes.append(probe(search.next_rate(), 100))
    assert len(search.probes) == 2 + EXTRA_PROBES
    assert not estimate(search.probes).is_bracketed


def test_a_server_that_fails_at_the_least_rate_ends_the_search_there() -> None:
    search = GoodputSearch(guess_rps=8.0, least_rps=1.0)
    while not search.is_done(3):
        search.probes.append(Probe(rate_rps=search.next_rate(), attained=20, requests=100))
    rates = [probe.rate_rps for probe in search.probes]
    assert min(rates) == rates[-1] == 1.0
    assert rates.count(1.0) == 1
    assert estimate(search.probes) == Estimate(rate_rps=1.0, passed_rps=0.0, is_bracketed=False)


def test_a_search_at_the_least_rate_goes_up_where_that_passes() -> None:
    search = GoodputSearch(guess_rps=0.5, least_rps=1.0)
    search.probes.append(Probe(rate_rps=search.next_rate(), attained=100, requests=100))
    assert search.probes[0].rate_rps == 1.0
    assert not search.is_done(1)
    assert search.next_rate() > 1.0
