from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.wire.versions import Side, Versions, newest_common, stated, why_not

NUMBERS = st.integers(-2, 6)
RANGES = st.builds(Versions, NUMBERS, NUMBERS)


@given(RANGES, RANGES)
def test_the_newest_common_version_is_the_largest_number_that_both_hold(one: Versions, other: Versions) -> None:
    both = set(range(one.oldest, one.newest + 1)) & set(range(other.oldest, other.newest + 1))
    assert newest_common(one, other) == newest_common(other, one) == max(both, default=None)


def test_a_peer_that_states_one_version_speaks_that_one() -> None:
    assert stated(3, None) == Versions(3, 3)
    assert stated(3, 1) == Versions(1, 3)


def test_a_refusal_names_both_sides_their_versions_and_the_older_one() -> None:
    worker = Side(what="worker p0", software="0.3.0", versions=Versions(3, 4))
    router = Side(what="router", software="", versions=Versions(2, 2))
    expected = (
        "no common version of the router-worker protocol: worker p0 (FlowPrefill 0.3.0) speaks versions 3 to 4, "
        "router speaks version 2; upgrade router"
    )
    assert why_not("router-worker", worker, router) == expected
    assert why_not("router-worker", router, worker).endswith("; upgrade router")
