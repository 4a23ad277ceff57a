"""The supervisor on a clock that the test moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.cluster.supervision import (
    Drain,
    Ended,
    Member,
    MemberState,
    Patience,
    Remove,
    Running,
    Scaled,
    Start,
    Supervisor,
    Tick,
    Waiting,
)

PATIENCE = Patience(start_s=30, sick_s=10, drain_s=20, first_pause_s=1, longest_pause_s=8, steady_s=60)


def pool(prefill: int = 1, decode: int = 1) -> Supervisor:
    """A pool whose members are all ready at time 0."""
    supervisor = Supervisor(PATIENCE)
    supervisor.handle(Scaled(prefill, decode), 0.0)
    for name in list(supervisor.members):
        supervisor.handle(Running(name, 1, takes_requests=True), 0.0)
    return supervisor


def test_scaling_up_starts_what_is_missing() -> None:
    supervisor = Supervisor(PATIENCE)
    assert supervisor.handle(Scaled(2, 1), 0.0) == [
        Start("prefill-0", "prefill", 1),
        Start("prefill-1", "prefill", 1),
        Start("decode-0", "decode", 1),
    ]
    assert supervisor.handle(Scaled(2, 1), 1.0) == []


def test_a_member_waits_loads_and_is_ready() -> None:
    supervisor = Supervisor(PATIENCE)
    supervisor.handle(Scaled(1, 0), 0.0)
    member = supervisor.members["prefill-0"]
    supervisor.handle(Waiting("prefill-0", 1, "no GPU is free"), 500.0)
    assert (member.state, member.reason) == (MemberState.STARTING, "no GPU is free")
    assert supervisor.handle(Tick(), 1_000.0) == [], "a place may come late: its time has not begun"
    supervisor.handle(Running("prefill-0", 1, takes_requests=False), 1_000.0)
    assert (member.state, member.reason) == (MemberState.LOADING, "")
    supervisor.handle(Running("prefill-0", 1, takes_requests=True), 1_010.0)
    assert member.state is MemberState.READY


def test_one_that_ends_is_removed_and_started_again_after_a_pause() -> None:
    supervisor = pool()
    assert supervisor.handle(Ended("prefill-0", 1, "was killed by SIGKILL"), 5.0) == [Remove("prefill-0", 1)]
    member = supervisor.members["prefill-0"]
    assert (member.state, member.last_failure) == (MemberState.BACKING_OFF, "was killed by SIGKILL")
    assert supervisor.handle(Tick(), 5.9) == []
    assert supervisor.handle(Tick(), 6.0) == [Start("prefill-0", "prefill", 2)]


def test_the_pause_doubles_up_to_its_limit_and_a_steady_life_forgives() -> None:
    supervisor, now, pauses = pool(), 0.0, []
    member = supervisor.members["prefill-0"]
    for start in range(1, 7):
        supervisor.handle(Ended("prefill-0", start, "crashed"), now)
        pauses.append(member.retry_at - now)
        now = member.retry_at
        supervisor.handle(Tick(), now)
    assert pauses == [1, 2, 4, 8, 8, 8]
    supervisor.handle(Running("prefill-0", 7, takes_requests=True), now)
    supervisor.handle(Running("prefill-0", 7, takes_requests=True), now + 60)
    assert member.failures == 0


def test_late_news_of_a_former_process_is_ignored() -> None:
    supervisor = pool()
    supervisor.handle(Ended("prefill-0", 1, "crashed"), 1.0)
    supervisor.handle(Tick(), 2.0)
    supervisor.handle(Running("prefill-0", 1, takes_requests=True), 2.1)
    assert supervisor.members["prefill-0"].state is MemberState.STARTING
    assert supervisor.handle(Ended("prefill-0", 1, "crashed"), 2.2) == []


def test_one_that_hangs_is_replaced() -> None:
    supervisor = pool(decode=0)
    supervisor.handle(Running("prefill-0", 1, takes_requests=False, reason="the router says dead"), 1.0)
    assert supervisor.handle(Tick(), 10.0) == []
    assert supervisor.handle(Tick(), 10.1) == [Remove("prefill-0", 1)]
    assert "failed its health checks for 10 s: the router says dead" in supervisor.members["prefill-0"].last_failure


def test_nobody_is_replaced_because_the_router_says_nothing() -> None:
    supervisor = pool(decode=0)
    for now in range(1, 60):
        supervisor.handle(Running("prefill-0", 1, takes_requests=None, reason="the router does not answer"), now)
        assert supervisor.handle(Tick(), now) == []
    assert supervisor.members["prefill-0"].reason == "the router does not answer"
    supervisor.handle(Running("prefill-0", 1, takes_requests=False, reason="the router says dead"), 60.0)
    assert supervisor.handle(Tick(), 69.1) == [Remove("prefill-0", 1)]


def test_one_that_does_not_come_up_is_replaced() -> None:
    supervisor = Supervisor(PATIENCE)
    supervisor.handle(Scaled(1, 0), 0.0)
    supervisor.handle(Running("prefill-0", 1, takes_requests=False), 5.0)
    assert supervisor.handle(Tick(), 35.0) == []
    assert supervisor.handle(Tick(), 35.1) == [Remove("prefill-0", 1)]


def test_scaling_down_drains_and_then_removes() -> None:
    supervisor = pool(prefill=3)
    assert supervisor.handle(Scaled(1, 1), 1.0) == [Drain("prefill-2"), Drain("prefill-1")]
    assert supervisor.handle(Ended("prefill-2", 1, "ended with status 0"), 3.0) == [Remove("prefill-2", 1)]
    assert "prefill-2" not in supervisor.members
    for name in supervisor.members:
        supervisor.handle(Running(name, 1, takes_requests=True), 21.0)
    assert supervisor.handle(Tick(), 21.1) == [Remove("prefill-1", 1)], "it took too long"
    assert [*supervisor.members] == ["prefill-0", "decode-0"]


def test_scaling_down_takes_those_that_serve_nobody_first() -> None:
    supervisor = pool(prefill=2)
    supervisor.handle(Ended("prefill-0", 1, "crashed"), 1.0)
    assert supervisor.handle(Scaled(1, 1), 2.0) == []
    assert [*supervisor.members] == ["prefill-1", "decode-0"]


def test_scaling_up_while_one_drains_starts_another_name() -> None:
    supervisor = pool(prefill=2)
    supervisor.handle(Scaled(1, 1), 1.0)
    assert supervisor.handle(Scaled(2, 1), 2.0) == [Start("prefill-2", "prefill", 1)]


def test_an_illegal_transition_raises() -> None:
    with pytest.raises(ValueError, match="cannot go from starting to ready"):
        Member(name="prefill-0", kind="prefill").enter(MemberState.READY, 0.0)


NAMES = st.sampled_from(["prefill-0", "prefill-1", "prefill-2", "prefill-3", "decode-0", "decode-1"])
STARTS = st.integers(1, 4)
EVENTS = st.one_of(
    st.builds(Scaled, st.integers(0, 3), st.integers(0, 2)),
    st.builds(Waiting, NAMES, STARTS, st.just("no place")),
    st.builds(Running, NAMES, STARTS, st.booleans(), st.just("why")),
    st.builds(Ended, NAMES, STARTS, st.just("crashed")),
    st.just(Tick()),
)


@given(st.lists(st.tuples(EVENTS, st.floats(0, 40)), max_size=60))
def test_any_events_leave_the_pool_at_its_size_and_every_process_accounted_for(events: list) -> None:
    supervisor, now = Supervisor(PATIENCE), 0.0
    alive: set[tuple[str, int]] = set()

    def do(event: object) -> None:
        for action in supervisor.handle(event, now):
            match action:
                case Start(name, _, start):
                    assert not any(other == name for other, _ in alive), "two processes under one name"
                    alive.add((name, start))
                case Remove(name, start):
                    alive.discard((name, start))
                case Drain(name):
                    assert supervisor.members[name].state is MemberState.DRAINING

    for event, passed_s in events:
        now += passed_s
        do(event)
        members = supervisor.members.values()
        assert alive == {(m.name, m.start) for m in members if m.state is not MemberState.BACKING_OFF}
        for kind, desired in supervisor.desired.items():
            staying = [m for m in members if m.kind == kind and m.state is not MemberState.DRAINING]
            assert len(staying) == desired
    # Left alone with processes that come up, the pool becomes whole.
    for _ in range(60):
        now += 1
        do(Tick())
        for member in list(supervisor.members.values()):
            do(Running(member.name, member.start, takes_requests=True))
    assert all(member.state is MemberState.READY for member in supervisor.members.values())
