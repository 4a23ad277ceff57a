"""The registry of prefill workers: whatever happens, each assigned request comes back exactly once."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang import __version__
from flowprefill_sglang.errors import InternalError
from flowprefill_sglang.router.registry import (
    FORGET_AFTER_S,
    Answered,
    Changed,
    Effect,
    Lost,
    PrefillRegistry,
    Send,
    TurnedAway,
)
from flowprefill_sglang.router.states import WorkerState
from flowprefill_sglang.wire.messages import (
    PROTOCOL_VERSION,
    Abort,
    Alive,
    Answer,
    Dispatch,
    Draining,
    Goodbye,
    Heartbeat,
    HelloAgain,
    Load,
    Phase,
    Progress,
    Refused,
    Welcome,
)
from flowprefill_sglang.wire.versions import Versions
from flowprefill_testing.stand_ins import hello


def registry() -> PrefillRegistry:
    return PrefillRegistry(router="r", heartbeat_interval_s=1.0, dead_after_s=3.0)


def joined(*names: str) -> PrefillRegistry:
    one = registry()
    for name in names:
        one.on_message(name.encode(), hello(name), 0.0)
    return one


def dispatch(rid: str) -> Dispatch:
    return Dispatch(rid=rid, path="/generate")


def sent(effects: list[Effect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def test_hello_is_welcomed_and_makes_ready() -> None:
    one = registry()
    effects = one.on_message(b"a", hello("a"), 5.0)
    expected = Welcome(
        protocol=PROTOCOL_VERSION, router="r", heartbeat_interval_s=1.0, dead_after_s=3.0, version=__version__
    )
    assert sent(effects) == [expected]
    assert [worker.name for worker in one.ready()] == ["a"]


def test_suspensions_are_counted_by_the_class_of_the_suspended_request() -> None:
    one = joined("a")
    one.assign("a", Dispatch(rid="1", path="/generate", slo_class="file"), tokens=10, now=0.0)
    for rid, phase in (
        ("1", Phase.STARTED),
        ("1", Phase.PREEMPTED),
        ("unknown", Phase.PREEMPTED),
        ("1", Phase.RESUMED),
    ):
        one.on_message(b"a", Progress(rid=rid, phase=phase), 0.0)
    assert one.workers["a"].assigned["1"].phase is Phase.RESUMED
    assert one.preemptions == {"file": 1}
    one.on_message(b"a", Progress(rid="1", phase=Phase.PREEMPTED), 0.0)
    one.on_message(b"a", Answer(rid="1", status=200), 0.0)
    one.on_message(b"a", Progress(rid="1", phase=Phase.PREEMPTED), 0.0)
    assert one.preemptions == {"file": 2}


def beat(silent_s: float) -> Heartbeat:
    return Heartbeat(load=Load(in_flight=0, silent_s=silent_s))


def test_a_worker_whose_scheduler_is_silent_gets_nothing_new_while_there_is_another() -> None:
    one = joined("a", "b")
    one.on_message(b"a", beat(3.0), 1.0)
    assert [worker.name for worker in one.ready()] == ["a", "b"], "as silent as a worker may be"
    one.on_message(b"a", beat(3.1), 2.0)
    assert [worker.name for worker in one.ready()] == ["b"]
    assert one.workers["a"].state is WorkerState.READY, "it may be one long operator"
    one.on_message(b"b", beat(9.0), 3.0)
    assert [worker.name for worker in one.ready()] == ["a", "b"], "better than nobody"
    one.on_message(b"b", beat(0.0), 4.0)
    assert [worker.name for worker in one.ready()] == ["b"]
    one.on_message(b"a", beat(0.0), 5.0)
    assert [worker.name for worker in one.ready()] == ["a", "b"]


def speaking(oldest: int, newest: int) -> PrefillRegistry:
    return PrefillRegistry(router="r", heartbeat_interval_s=1.0, dead_after_s=3.0, spoken=Versions(oldest, newest))


@pytest.mark.parametrize(
    ("worker", "agreed"),
    [((2, 4), 4), ((None, 4), 4), ((1, 2), 2), ((3, 3), 3), ((4, 9), 4), ((1, 9), 4), ((None, 2), 2)],
)
def test_the_newest_common_version_is_agreed(worker: tuple[int | None, int], agreed: int) -> None:
    one = speaking(2, 4)
    oldest, newest = worker
    (message,) = sent(one.on_message(b"a", hello("a", protocol=newest, oldest_protocol=oldest), 0.0))
    assert isinstance(message, Welcome)
    assert message.protocol == one.workers["a"].protocol == agreed


@pytest.mark.parametrize(
    ("worker", "words"),
    [
        ((None, 1), ("speaks version 1", "router (FlowPrefill", "speaks versions 2 to 4", "upgrade worker a")),
        ((5, 6), ("worker a (FlowPrefill test) speaks versions 5 to 6", "upgrade router")),
        ((4, 3), ("speaks versions 4 to 3",)),  # nonsense is refused like any other
    ],
)
def test_without_a_common_version_a_worker_is_refused_politely(worker: tuple, words: tuple[str, ...]) -> None:
    one = speaking(2, 4)
    oldest, newest = worker
    effects = one.on_message(b"a", hello("a", protocol=newest, oldest_protocol=oldest), 0.0)
    (message,) = sent(effects)
    assert isinstance(message, Refused)
    assert (message.protocol, message.oldest_protocol, message.version) == (4, 2, __version__)
    for part in words:
        assert part in message.reason
    assert effects[0] == TurnedAway("a", "test", message.reason)
    assert not one.workers


def test_a_refused_worker_does_not_displace_the_one_of_its_name() -> None:
    one = speaking(2, 4)
    one.on_message(b"a", hello("a", protocol=3), 0.0)
    (message,) = sent(one.on_message(b"b", hello("a", protocol=9, incarnation="other"), 1.0))
    assert isinstance(message, Refused)
    assert [worker.link for worker in one.ready()] == [b"a"]


def test_an_unknown_link_is_told_to_say_hello_again() -> None:
    one = registry()
    assert sent(one.on_message(b"x", Heartbeat(load=Load(in_flight=0)), 0.0)) == [HelloAgain()]
    assert one.on_message(b"x", Goodbye(reason=""), 0.0) == []


def test_an_answer_ends_the_request_once() -> None:
    one = joined("a")
    assert one.assign("a", dispatch("1"), tokens=10, now=0.0) == Send(b"a", dispatch("1"))
    assert one.workers["a"].outstanding_tokens == 10
    one.on_message(b"a", Progress(rid="1", phase=Phase.STARTED), 0.0)
    assert one.workers["a"].assigned["1"].phase is Phase.STARTED
    (effect,) = one.on_message(b"a", Answer(rid="1", status=200), 0.0)
    assert isinstance(effect, Answered)
    assert one.on_message(b"a", Answer(rid="1", status=200), 0.0) == []
    assert one.workers["a"].outstanding_tokens == 0
    assert one.abort("1") == []


def test_an_answer_of_another_worker_does_not_count() -> None:
    one = joined("a", "b")
    one.assign("a", dispatch("1"), tokens=1, now=0.0)
    assert one.on_message(b"b", Answer(rid="1", status=200), 0.0) == []
    assert one.holds("1")


def test_silence_kills_and_a_heartbeat_keeps_alive() -> None:
    one = joined("a", "b")
    one.assign("a", dispatch("1"), tokens=1, now=0.0)
    assert sent(one.on_message(b"b", Heartbeat(load=Load(in_flight=0)), 2.0)) == [Alive()]
    assert one.on_tick(2.9) == []
    effects = one.on_tick(3.1)
    assert [(effect.name, effect.state) for effect in effects if isinstance(effect, Changed)] == [("a", "dead")]
    assert [effect.rid for effect in effects if isinstance(effect, Lost)] == ["1"]
    assert [worker.name for worker in one.ready()] == ["b"]
    assert sent(one.on_message(b"a", Heartbeat(load=Load(in_flight=1)), 4.0)) == [HelloAgain()]
    one.on_message(b"a", hello("a"), 4.1)
    assert [worker.name for worker in one.ready()] == ["b", "a"] or len(one.ready()) == 2


def test_a_restarted_worker_replaces_its_former_self() -> None:
    one = joined("a")
    one.assign("a", dispatch("1"), tokens=1, now=0.0)
    effects = one.on_message(b"a2", hello("a", incarnation="second"), 1.0)
    assert [effect.rid for effect in effects if isinstance(effect, Lost)] == ["1"]
    assert one.workers["a"].link == b"a2"
    assert sent(one.on_message(b"a", Heartbeat(load=Load(in_flight=0)), 1.0)) == [HelloAgain()]


def test_a_repeated_hello_on_the_same_link_changes_nothing() -> None:
    one = joined("a")
    one.assign("a", dispatch("1"), tokens=1, now=0.0)
    (message,) = sent(one.on_message(b"a", hello("a"), 1.0))
    assert isinstance(message, Welcome)
    assert one.holds("1")


def test_a_reconnected_worker_has_lost_what_it_held() -> None:
    one = joined("a")
    one.assign("a", dispatch("1"), tokens=1, now=0.0)
    effects = one.on_message(b"other", hello("a"), 1.0)
    assert [effect.rid for effect in effects if isinstance(effect, Lost)] == ["1"]
    assert one.workers["a"].state is WorkerState.READY


def test_a_worker_that_holds_nothing_has_lost_old_requests_but_not_new_ones() -> None:
    one = joined("a")
    one.assign("a", dispatch("old"), tokens=1, now=0.0)
    one.assign("a", dispatch("new"), tokens=1, now=9.0)
    assert not [e for e in one.on_message(b"a", Heartbeat(load=Load(in_flight=1)), 10.0) if isinstance(e, Lost)]
    effects = one.on_message(b"a", Heartbeat(load=Load(in_flight=0)), 10.0)
    assert [effect.rid for effect in effects if isinstance(effect, Lost)] == ["old"]


def test_draining_keeps_what_is_running_and_takes_nothing_new() -> None:
    one = joined("a")
    one.assign("a", dispatch("1"), tokens=1, now=0.0)
    one.on_message(b"a", Draining(reason="asked"), 0.0)
    assert one.ready() == []
    assert one.holds("1")
    with pytest.raises(InternalError):
        one.assign("a", dispatch("2"), tokens=1, now=0.0)
    assert isinstance(one.on_message(b"a", Answer(rid="1", status=200), 0.0)[0], Answered)
    one.on_message(b"a", Goodbye(reason="done"), 0.0)
    assert one.workers["a"].state is WorkerState.DEAD


def test_a_dead_worker_is_forgotten_in_the_end() -> None:
    one = joined("a")
    one.on_tick(4.0)
    one.on_tick(FORGET_AFTER_S)
    assert "a" in one.workers
    one.on_tick(FORGET_AFTER_S + 1)
    assert "a" not in one.workers


names = st.sampled_from(["a", "b"])
rids = st.sampled_from([f"r{index}" for index in range(6)])
links = st.sampled_from([b"1", b"2", b"3"])
messages = st.one_of(
    st.builds(hello, names, incarnation=st.sampled_from(["x", "y"])),
    st.builds(lambda rid: Answer(rid=rid, status=200), rids),
    st.builds(lambda rid: Progress(rid=rid, phase=Phase.STARTED), rids),
    st.builds(lambda count: Heartbeat(load=Load(in_flight=count)), st.integers(0, 1)),
    st.just(Draining(reason="")),
    st.just(Goodbye(reason="")),
)
events = st.one_of(
    st.tuples(st.just("message"), links, messages),
    st.tuples(st.just("assign"), rids),
    st.tuples(st.just("abort"), rids),
    st.tuples(st.just("wait"), st.floats(0.1, 4.0)),
    st.tuples(st.just("unreachable"), links),
)


@given(st.lists(events, max_size=60))
def test_every_assigned_request_comes_back_exactly_once(sequence: list[tuple]) -> None:
    one, now = registry(), 0.0
    assigned: Counter[str] = Counter()
    back: Counter[str] = Counter()

    def take(effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Answered):
                back[effect.answer.rid] += 1
            elif isinstance(effect, Lost):
                back[effect.rid] += 1

    for event in sequence:
        match event:
            case ("message", link, message):
                take(one.on_message(link, message, now))
            case ("assign", rid) if one.ready() and not one.holds(rid):
                one.assign(one.ready()[-1].name, dispatch(rid), tokens=3, now=now)
                assigned[rid] += 1
            case ("abort", rid):
                assert all(message == Abort(rid=rid) for message in sent(one.abort(rid)))
            case ("wait", seconds):
                now += seconds
                take(one.on_tick(now))
            case ("unreachable", link):
                take(one.on_unreachable(link))
        assert all(assigned[rid] - back[rid] == one.holds(rid) for rid in assigned)
        for worker in one.workers.values():
            assert worker.outstanding_tokens == 3 * len(worker.assigned)
    take(one.on_tick(now + 100))
    assert assigned == back
