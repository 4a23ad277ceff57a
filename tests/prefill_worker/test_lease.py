"""Ranks of a group stop at the same boundary, whoever is late and whenever something happens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowprefill_sglang.errors import InternalError, PeerFault
from flowprefill_sglang.prefill_worker.lease import FollowerLease, LeaderLease, Patience, words_for
from flowprefill_testing.lease_ranks import Group, LeaseOf, Outcome, Plan


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    ranks = draw(st.integers(2, 4))
    return Plan(
        seed=draw(st.integers(0, 2**32)),
        ranks=ranks,
        lookahead=draw(st.integers(0, 3)),
        tasks=draw(st.lists(st.integers(1, 60), min_size=1, max_size=6)),
        collective_every=draw(st.integers(1, 4)),
        event_chance=draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])),
        unstoppable_chance=draw(st.sampled_from([0.0, 0.0, 0.2])),
        laziness=draw(st.lists(st.sampled_from([0.05, 0.3, 1.0]), min_size=ranks, max_size=ranks)),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(plans())
def test_all_ranks_stop_at_the_same_boundary(plan: Plan) -> None:
    assert_together(plan)


@pytest.mark.parametrize("ranks", [2, 4])
def test_thousands_of_preemptions(ranks: int) -> None:
    plan = Plan(
        5, ranks, 0, tasks=[900] * 4, collective_every=2, event_chance=0.9, laziness=[1.0, 0.1, 0.5, 1.0][:ranks]
    )
    assert len(assert_together(plan).stops[0]) > 2_000


def assert_together(plan: Plan, lease_of: LeaseOf | None = None) -> Outcome:
    outcome = Group(plan, lease_of).run()
    for rank in range(plan.ranks):
        assert outcome.stops[rank] == outcome.stops[0]
        assert outcome.operators[rank] == outcome.operators[0]
        assert len(outcome.operators[rank]) == sum(plan.tasks), "each operator runs once"
    assert outcome.overruns == [], "nobody goes beyond the grant"
    assert outcome.latest_stop <= plan.lookahead
    return outcome


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_stop_comes_as_soon_as_the_grants_allow(lookahead: int) -> None:
    plan = Plan(1, 2, lookahead, tasks=[40], collective_every=2, event_chance=1.0)
    outcome = Group(plan).run()
    assert outcome.latest_stop == lookahead
    # Nothing is granted before the first boundary of a stretch, so an event that is there already stops it at once.
    assert {boundaries for _, _, boundaries in outcome.stops[0]} == {1, 2 + lookahead}


def test_ranks_that_stop_by_themselves_are_stuck_sooner_or_later() -> None:
    """The simulation sees what the lease is for: without it, the same plan ends in two different collectives."""

    class OnItsOwn:
        def __init__(self, rank: int) -> None:
            self._rank = rank
            self._crossed = 0

        def begin(self) -> None: ...

        def end(self) -> None: ...

        def cannot_stop(self) -> None: ...

        def cross(self, wants_stop: bool, kind: int) -> bool:
            self._crossed += 1
            return self._crossed % (7 + self._rank) == 0

    plan = Plan(3, 2, 0, tasks=[30, 30], collective_every=2, event_chance=0.1)
    with pytest.raises(AssertionError):  # Stuck is one
        assert_together(plan, lambda rank, memory, wait: OnItsOwn(rank))


# ---- what a rank says of another ----------------------------------------------------------------------------------


class GaveUp(Exception):
    pass


def give_up(tries: int) -> None:
    if tries > 5:
        raise GaveUp


@pytest.fixture
def pair() -> tuple[LeaderLease, FollowerLease, list[int]]:
    words = [0] * words_for(1)
    return LeaderLease(words, 1, give_up, lookahead=0), FollowerLease(words, 1, give_up), words


Pair = tuple[LeaderLease, FollowerLease, list[int]]


def test_a_follower_waits_for_the_grant(pair: Pair) -> None:
    leader, follower, _ = pair
    leader.begin()
    follower.begin()
    with pytest.raises(GaveUp):
        follower.cross(False, 1)


def test_a_followers_own_events_stop_nothing(pair: Pair) -> None:
    leader, follower, _ = pair
    leader.begin()
    follower.begin()
    assert not leader.cross(False, 1)
    assert not follower.cross(True, 1)


def test_the_leader_waits_for_the_last_stretch_to_end_everywhere(pair: Pair) -> None:
    leader, follower, _ = pair
    leader.begin()
    follower.begin()
    assert leader.cross(True, 1)
    leader.end()
    with pytest.raises(GaveUp):
        leader.begin()
    assert follower.cross(False, 1)
    follower.end()
    leader.begin()


@pytest.mark.parametrize(("kinds", "why"), [([1, 3], "other operators"), ([1], "fewer"), ([2, 1], "another order")])
def test_a_rank_that_has_run_something_else_is_found_out(pair: Pair, kinds: list[int], why: str) -> None:
    leader, follower, _ = pair
    leader.begin()
    follower.begin()
    for kind in (1, 2):
        leader.cross(False, kind)
    for kind in kinds:
        follower.cross(False, kind)
    leader.end()
    follower.end()
    with pytest.raises(InternalError, match="different operators"):
        leader.begin()


def test_a_follower_that_was_left_behind_says_so(pair: Pair) -> None:
    _, follower, words = pair
    follower.begin()
    words[0] = 2 << 32 | 1  # a grant of the next stretch
    with pytest.raises(InternalError, match="without this rank"):
        follower.cross(False, 1)


def test_a_follower_ahead_of_the_leader_is_found_out(pair: Pair) -> None:
    leader, follower, _ = pair
    follower.begin()
    follower.end()
    with pytest.raises(InternalError, match="ahead of the leader"):
        leader.begin()


# ---- waiting -------------------------------------------------------------------------------------------------------


class Time:
    def __init__(self) -> None:
        self.now = 50.0
        self.slept: list[float] = []
        self.gone = False
        self.given_way = 0

    def patience(self) -> Patience:
        def sleep(seconds: float) -> None:
            self.slept.append(seconds)
            self.now += seconds

        def give_way() -> None:
            self.given_way += 1

        def check() -> None:
            if self.gone:
                raise PeerFault("gone")

        return Patience(
            timeout_s=2.0,
            check=check,
            clock=lambda: self.now,
            give_way=give_way,
            sleep=sleep,
            too_late=lambda: PeerFault("too late"),
        )


def wait_for_ever(patience: Patience) -> None:
    tries = 0
    while True:
        patience(tries)
        tries += 1


def test_a_short_wait_does_not_sleep_and_a_long_one_sleeps_more_and_more() -> None:
    time = Time()
    with pytest.raises(PeerFault, match="too late"):
        wait_for_ever(time.patience())
    assert time.given_way == Patience.LOOKS
    assert time.slept == sorted(time.slept)
    assert (time.slept[0], time.slept[-1]) == (Patience.SHORTEST_S, Patience.LONGEST_S)
    assert 2.0 < time.now - 50.0 < 2.0 + 2 * Patience.LONGEST_S


def test_a_rank_that_is_gone_is_not_waited_for() -> None:
    time = Time()
    time.gone = True
    with pytest.raises(PeerFault, match="gone"):
        wait_for_ever(time.patience())
    assert time.slept == []
