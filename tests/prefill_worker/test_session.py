"""The worker's side of the protocol, without a socket: tables of events, and any order of them."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flowprefill_sglang.errors import InternalError
from flowprefill_sglang.prefill_worker.session import Cancel, Log, Prefill, Reconnect, Send, Session, State
from flowprefill_sglang.wire.messages import (
    PROTOCOL_VERSION,
    Abort,
    Alive,
    Answer,
    Dispatch,
    Drain,
    Draining,
    Goodbye,
    Heartbeat,
    HelloAgain,
    Phase,
    Progress,
    Refused,
    Welcome,
)
from flowprefill_testing.link_ends import HELLO

WELCOME = Welcome(protocol=PROTOCOL_VERSION, router="r", heartbeat_interval_s=1.0, dead_after_s=3.0)


def new_session(now: float = 0.0) -> Session:
    return Session(HELLO, hello_retry_s=0.5, refused_retry_s=30.0, leave_after_s=10.0, now=now)


def joined_session() -> Session:
    session = new_session()
    session.tick(0.0)
    session.receive(WELCOME, (), 0.1)
    return session


def sent(actions: list) -> list:
    return [action.message for action in actions if isinstance(action, Send)]


def test_greets_until_welcomed_then_beats() -> None:
    session = new_session()
    assert sent(session.tick(0.0)) == [HELLO]
    assert session.next_tick_at == 0.5
    assert sent(session.tick(0.5)) == [HELLO]
    session.receive(WELCOME, (), 0.6)
    assert session.state is State.JOINED
    assert session.next_tick_at == pytest.approx(1.6)
    (beat,) = sent(session.tick(1.6))
    assert isinstance(beat, Heartbeat)
    assert beat.load.in_flight == 0


def test_the_router_hears_of_a_silent_scheduler() -> None:
    (beat,) = sent(joined_session().tick(1.1, 7.5))
    assert beat.load.silent_s == 7.5


def test_a_request_is_queued_answered_and_forgotten() -> None:
    session = joined_session()
    dispatch = Dispatch(rid="a", path="/generate")
    actions = session.receive(dispatch, (b"body",), 1.0)
    assert actions == [Send(Progress(rid="a", phase=Phase.QUEUED)), Prefill(dispatch, b"body")]
    assert session.in_flight == {"a"}
    actions = session.answered("a", 200, "application/json", b"{}")
    assert sent(actions) == [
        Progress(rid="a", phase=Phase.FINISHED),
        Answer(rid="a", status=200, content_type="application/json"),
    ]
    assert session.answered("a", 200, "application/json", b"{}") == []


def test_a_failed_request_is_reported_as_failed() -> None:
    session = joined_session()
    session.receive(Dispatch(rid="a", path="/generate"), (b"",), 1.0)
    assert Progress(rid="a", phase=Phase.FAILED) in sent(session.answered("a", 400, "application/json", b""))


@pytest.mark.parametrize(
    ("happened", "told"),
    [
        ("started preempted resumed preempted resumed", "started preempted resumed preempted resumed"),
        ("started started started", "started"),  # chunks of one prompt, or prompts of one batch
        ("started preempted preempted resumed resumed", "started preempted resumed"),
        ("started preempted started", "started preempted resumed"),  # another prompt of the batch
        ("preempted started", "started"),  # the record of the first start was lost
        ("resumed", "resumed"),
    ],
)
def test_the_router_is_told_each_change_once(happened: str, told: str) -> None:
    session = joined_session()
    session.receive(Dispatch(rid="a", path="/generate"), (b"",), 1.0)
    actions = [action for word in happened.split() for action in session.progressed("a", Phase(word))]
    assert [message.phase for message in sent(actions)] == told.split()
    session.answered("a", 200, "application/json", b"")
    assert session.progressed("a", Phase.RESUMED) == [], "it has been answered"
    session.receive(Dispatch(rid="a", path="/generate"), (b"",), 2.0)
    assert sent(session.progressed("a", Phase.STARTED)) == [Progress(rid="a", phase=Phase.STARTED)]


def test_the_same_request_twice_runs_once() -> None:
    session = joined_session()
    session.receive(Dispatch(rid="a", path="/generate"), (b"",), 1.0)
    again = session.receive(Dispatch(rid="a", path="/generate"), (b"",), 1.0)
    assert [type(action) for action in again] == [Log]


def test_abort_cancels_only_what_is_in_flight() -> None:
    session = joined_session()
    assert session.receive(Abort(rid="a"), (), 1.0) == []
    session.receive(Dispatch(rid="a", path="/generate"), (b"",), 1.0)
    assert session.receive(Abort(rid="a"), (), 1.0) == [Cancel("a")]
    assert session.in_flight == {"a"}, "it is in flight until the engine has let go of it"


def test_a_silent_router_is_greeted_again_and_its_requests_are_dropped() -> None:
    session = joined_session()
    session.receive(Dispatch(rid="a", path="/generate"), (b"",), 1.0)
    assert [type(a) for a in session.tick(4.1)] == [Log, Cancel, Reconnect, Send]
    assert session.state is State.GREETING
    assert session.in_flight == set()
    assert session.answered("a", 200, "application/json", b"") == [], "nobody waits for this answer"


def test_a_router_that_answers_is_not_silent() -> None:
    session = joined_session()
    for second in range(1, 10):
        session.receive(Alive(), (), float(second))
        assert [type(m) for m in sent(session.tick(float(second)))] == [Heartbeat]


def test_a_router_that_restarted_is_greeted_at_once() -> None:
    session = joined_session()
    session.receive(Dispatch(rid="a", path="/generate"), (b"",), 1.0)
    assert session.receive(HelloAgain(), (), 1.0) == [Cancel("a"), Reconnect(), Send(HELLO)]


def test_a_worker_that_nobody_answers_says_so_now_and_then() -> None:
    session = new_session(100.0)
    logged = [
        (now, action.text)
        for now in (100.0, 129.9, 130.0, 140.0, 160.0)
        for action in session.tick(now)
        if isinstance(action, Log)
    ]
    assert logged == [
        (130.0, "no router has answered for 30 s; greeting on"),
        (160.0, "no router has answered for 60 s; greeting on"),
    ]
    session.receive(WELCOME, (), 160.5)
    session.receive(HelloAgain(), (), 1_000.0)
    assert not any(isinstance(action, Log) for action in session.tick(1_029.0)), "counted from the new greeting"


REFUSED = Refused(reason="no common version; upgrade router", protocol=7)


def test_a_refusal_is_said_once_and_the_router_is_asked_again_slowly_until_it_was_upgraded() -> None:
    session = new_session()
    session.tick(0.0)
    (said,) = session.receive(REFUSED, (), 0.1)
    assert said == Log(
        "refused by the router; asking again every 30 s: no common version; upgrade router", logging.ERROR
    )
    assert not session.is_over
    assert session.next_tick_at == pytest.approx(30.1)
    assert session.tick(30.1) == [Send(HELLO)]
    assert session.receive(REFUSED, (), 30.2) == [], "the same again is no news"
    assert session.next_tick_at == pytest.approx(60.2)
    assert len(session.receive(Refused(reason="another one", protocol=8), (), 40.0)) == 1
    assert session.receive(HelloAgain(), (), 50.0) == [], "it greets at its own pace"
    session.receive(WELCOME, (), 60.3)
    assert (session.state, session.refusal, session.protocol) == (State.JOINED, "", PROTOCOL_VERSION)


def test_a_refused_worker_that_is_told_to_stop_leaves_without_a_word() -> None:
    session = new_session()
    session.receive(REFUSED, (), 0.1)
    assert session.drain("the worker was told to stop", 1.0) == []
    assert session.state is State.LEFT


def test_a_welcome_in_a_version_that_is_not_spoken_is_no_welcome() -> None:
    session = new_session()
    said, goodbye = session.receive(replace(WELCOME, protocol=9, version="0.9"), (), 0.1)
    assert session.state is State.REFUSED
    assert "worker (FlowPrefill 1) speaks version 1, router (FlowPrefill 0.9) speaks version 9" in said.text
    assert said.text.endswith("upgrade worker")
    assert isinstance(goodbye.message, Goodbye), "or the router would send requests"


def test_the_agreed_version_may_be_older_than_the_newest() -> None:
    newer = replace(HELLO, protocol=PROTOCOL_VERSION + 2, oldest_protocol=PROTOCOL_VERSION)
    session = Session(newer, hello_retry_s=0.5, refused_retry_s=30.0, leave_after_s=10.0, now=0.0)
    session.receive(WELCOME, (), 0.1)
    assert (session.state, session.protocol) == (State.JOINED, PROTOCOL_VERSION)


def test_a_refusal_of_a_worker_that_was_welcomed_is_ignored() -> None:
    session = joined_session()
    assert [type(action) for action in session.receive(Refused(reason="no", protocol=1), (), 1.0)] == [Log]
    assert session.state is State.JOINED


def test_draining_takes_nothing_new_and_leaves_when_done() -> None:
    session = joined_session()
    session.receive(Dispatch(rid="a", path="/generate"), (b"",), 1.0)
    assert Draining(reason="asked by the router") in sent(session.receive(Drain(), (), 2.0))
    refused = session.receive(Dispatch(rid="b", path="/generate"), (b"",), 2.0)
    assert [m.status for m in sent(refused)] == [503]
    actions = session.answered("a", 200, "application/json", b"")
    assert isinstance(sent(actions)[-1], Goodbye)
    assert session.state is State.LEFT


def test_draining_gives_up_on_a_request_that_hangs() -> None:
    session = joined_session()
    session.receive(Dispatch(rid="a", path="/generate"), (b"",), 1.0)
    session.receive(Drain(), (), 2.0)
    session.receive(Alive(), (), 11.9)
    assert session.tick(11.9)[0] == Send(Heartbeat(load=sent(session.tick(11.9))[0].load))
    assert session.tick(12.0) == [Cancel("a"), Send(Goodbye(reason="drained too slowly"))]


def test_draining_an_idle_worker_leaves_at_once() -> None:
    session = joined_session()
    assert [type(m) for m in sent(session.drain("stop", 1.0))] == [Draining, Goodbye]


def test_a_worker_that_nobody_knows_leaves_without_a_goodbye() -> None:
    session = new_session()
    session.tick(0.0)
    assert session.drain("stop", 1.0) == []
    assert session.is_over


def test_an_impossible_transition_is_our_bug() -> None:
    session = new_session()
    with pytest.raises(InternalError, match="GREETING to DRAINING"):
        session._move(State.DRAINING)


RIDS = st.sampled_from("abc")
EVENTS = st.one_of(
    st.tuples(
        st.just("receive"),
        st.one_of(
            st.just(WELCOME),
            st.just(HelloAgain()),
            st.just(Drain()),
            st.just(Alive()),
            st.just(Refused(reason="x", protocol=1)),
            RIDS.map(lambda rid: Dispatch(rid=rid, path="/generate")),
            RIDS.map(lambda rid: Abort(rid=rid)),
        ),
    ),
    st.tuples(st.just("answered"), RIDS),
    st.tuples(st.sampled_from([Phase.STARTED, Phase.PREEMPTED, Phase.RESUMED]), RIDS),
    st.tuples(st.just("tick"), st.floats(0.0, 5.0)),
    st.tuples(st.just("drain"), st.just(None)),
    st.tuples(st.just("leave"), st.just(None)),
)


@given(st.lists(EVENTS, max_size=60))
def test_every_accepted_request_ends_exactly_once(events: list) -> None:
    """In one answer, or in one cancellation because the router is gone; never in both, never in neither."""
    session, now = new_session(), 0.0
    open_rids: set[str] = set()
    for kind, value in events:
        before = set(session.in_flight)
        if kind == "receive":
            actions = session.receive(value, (b"",) if isinstance(value, Dispatch) else (), now)
        elif kind == "answered":
            actions = session.answered(value, 200, "application/json", b"")
        elif isinstance(kind, Phase):
            actions = session.progressed(value, kind)
            assert value in open_rids or not actions, "the router would not know it"
        elif kind == "tick":
            now += value
            actions = session.tick(now)
        elif kind == "drain":
            actions = session.drain("stop", now)
        else:
            actions = session.leave("stop")
        for action in actions:
            if isinstance(action, Prefill):
                assert action.dispatch.rid not in open_rids
                open_rids.add(action.dispatch.rid)
            elif isinstance(action, Send) and isinstance(action.message, Answer) and action.message.status != 503:
                assert action.message.rid in open_rids
                open_rids.discard(action.message.rid)
            elif isinstance(action, Cancel) and action.rid not in session.in_flight:
                assert action.rid in open_rids & before
                open_rids.discard(action.rid)
        assert open_rids == session.in_flight
        assert not (session.is_over and session.in_flight)
