"""One request's life: exactly one outcome, and no side left working."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.errors import InternalError, OutOfCapacity, TooLate
from flowprefill_sglang.router.exchange import Exchange, Outcome, Step


def started(retries: int = 0) -> Exchange:
    one = Exchange(retries)
    one.start()
    return one


def test_success() -> None:
    one = started()
    assert one.prefill_answered(200) == ()
    assert one.decode_answered(200) == (Step.RELAY, Step.FINISH)
    assert (one.outcome, one.error) == (Outcome.SUCCEEDED, None)


def test_decode_may_be_done_before_prefill_has_answered() -> None:
    one = started()
    assert one.decode_streams() == (Step.RELAY,)
    assert one.decode_answered(200) == (Step.FINISH,)
    assert one.prefill_answered(500) == ()
    assert one.outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize(
    ("status", "outcome"), [(400, Outcome.REJECTED), (499, "prefill_failed"), (500, "prefill_failed")]
)
def test_a_prefill_error_cuts_decode(status: int, outcome: Outcome) -> None:
    one = started(retries=0 if status >= 500 else 2)
    steps = one.prefill_answered(status)
    assert steps[0] is Step.CUT_DECODE
    assert steps[-1] is Step.FINISH
    assert (Step.ANSWER_PREFILL in steps) == (outcome is Outcome.REJECTED)
    assert one.outcome == outcome


def test_a_decode_error_aborts_prefill() -> None:
    one = started(retries=2)
    assert one.decode_answered(400) == (Step.ABORT_PREFILL, Step.RELAY, Step.FINISH)
    assert one.outcome is Outcome.REJECTED


def test_a_decode_server_error_becomes_a_502() -> None:
    one = started()
    one.prefill_answered(200)
    assert one.decode_answered(500, ": oops") == (Step.FINISH,)
    assert one.error is not None
    assert (one.error.status, str(one.error)) == (502, "decode failed with status 500: oops")


def test_a_lost_side_is_retried_as_often_as_allowed() -> None:
    one = started(retries=1)
    assert one.prefill_lost("gone") == (Step.CUT_DECODE, Step.RETRY)
    one.start()
    assert one.decode_lost("gone too") == (Step.ABORT_PREFILL, Step.FINISH)
    assert one.outcome is Outcome.DECODE_FAILED


def test_a_broken_handoff_is_retried() -> None:
    assert started(retries=1).decode_answered(500) == (Step.ABORT_PREFILL, Step.RETRY)


def test_a_handoff_that_breaks_after_prefill_has_answered_is_retried() -> None:
    """The worker dies with the answer given and pages of the cache still to send."""
    one = started(retries=1)
    one.prefill_answered(200)
    assert one.decode_answered(500) == (Step.RETRY,)


def test_a_worker_that_says_it_failed_is_retried() -> None:
    assert started(retries=1).prefill_answered(500) == (Step.CUT_DECODE, Step.RETRY)


def test_nothing_is_retried_once_the_client_has_seen_something() -> None:
    one = started(retries=5)
    one.decode_streams()
    assert one.prefill_lost("gone") == (Step.CUT_DECODE, Step.FINISH)


def test_a_stream_that_needs_no_prefill_side_any_more_outlives_it() -> None:
    for happens in (("prefill_lost", "gone"), ("prefill_answered", 500)):
        one = started(retries=5)
        assert one.decode_streams(needs_prefill=False) == (Step.RELAY,)
        name, news = happens
        assert getattr(one, name)(news) == ()
        assert one.decode_answered(200) == (Step.FINISH,)
        assert one.outcome is Outcome.SUCCEEDED


def test_a_retry_that_finds_nobody_tells_the_first_failure() -> None:
    one = started(retries=1)
    one.prefill_lost("the worker died")
    one.no_pair(OutOfCapacity("nobody"))
    assert (one.outcome, str(one.error)) == (Outcome.PREFILL_FAILED, "the worker died")


def test_an_abort_waits_for_decode_and_ignores_the_prefill_side() -> None:
    one = started(retries=1)
    assert one.abort_asked() == (Step.ABORT_PREFILL, Step.ASK_DECODE_TO_STOP)
    assert one.prefill_answered(499) == ()
    assert one.decode_answered(200) == (Step.RELAY, Step.FINISH)
    assert one.outcome is Outcome.ABORTED


def test_an_attempt_cannot_start_twice() -> None:
    with pytest.raises(InternalError):
        started().start()


EVENTS = [
    *(("prefill_answered", status) for status in (200, 400, 499, 500)),
    *(("decode_answered", status) for status in (200, 400, 500, 503)),
    ("prefill_lost", "x"),
    ("decode_lost", "x"),
    ("expired", TooLate("x")),
    ("broke", InternalError("x")),
    ("decode_streams",),
    ("client_gone",),
    ("abort_asked",),
    ("abort_overdue",),
    ("router_stops",),
]


@given(st.lists(st.sampled_from(EVENTS), max_size=30), st.integers(0, 3))
def test_one_outcome_and_no_side_left_working(sequence: list[tuple], retries: int) -> None:
    one = started(retries)
    finished = answers = 0
    prefill_works = decode_works = True
    for name, *arguments in [*sequence, ("abort_overdue",)]:
        before = one.outcome
        steps = getattr(one, name)(*arguments)
        if before is not None:
            assert steps == ()
            continue
        prefill_works &= not name.startswith("prefill")
        decode_works &= name not in ("decode_answered", "decode_lost")
        prefill_works &= Step.ABORT_PREFILL not in steps
        decode_works &= Step.CUT_DECODE not in steps
        finished += steps.count(Step.FINISH)
        answers += steps.count(Step.RELAY) + steps.count(Step.ANSWER_PREFILL)
        if one.outcome is not None or Step.RETRY in steps:
            assert not decode_works
            assert not prefill_works or one.outcome is Outcome.SUCCEEDED
        if Step.RETRY in steps:
            assert answers == 0
            one.start()
            prefill_works = decode_works = True
        assert answers <= 1
    assert finished == 1
    assert one.outcome is not None
    assert one.attempts <= retries + 1
