"""Questions to the scheduler process, on a clock that the test moves."""

from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.prefill_worker.signs_of_life import (
    ASK_EVERY_S,
    ASK_IDLE_EVERY_S,
    LONGEST_GAP_S,
    SignsOfLife,
)

PATIENCE_S = 60.0


def watched(seconds: int, signs: SignsOfLife, since: int = 0, *, is_busy: bool = True, is_excused: bool = False) -> int:
    """Look once a second for so long; how often it was asked."""
    looks = range(since + 1, since + seconds + 1)
    return sum(signs.look(float(now), is_busy=is_busy, is_excused=is_excused) for now in looks)


def test_a_silent_scheduler_is_asked_once_and_is_hung_after_the_patience() -> None:
    signs = SignsOfLife(patience_s=PATIENCE_S, now=0.0)
    assert watched(int(ASK_EVERY_S) - 1, signs) == 0
    assert watched(int(PATIENCE_S) + 1, signs, since=int(ASK_EVERY_S) - 1) == 1
    assert (signs.silent_s, signs.is_hung) == (PATIENCE_S, False)
    watched(1, signs, since=int(ASK_EVERY_S + PATIENCE_S))
    assert signs.is_hung


def test_an_idle_one_is_asked_seldom() -> None:
    signs = SignsOfLife(patience_s=PATIENCE_S, now=0.0)
    assert watched(int(ASK_IDLE_EVERY_S) - 1, signs, is_busy=False) == 0
    assert signs.look(ASK_IDLE_EVERY_S, is_busy=False, is_excused=False)


def test_one_that_reports_is_not_asked() -> None:
    signs = SignsOfLife(patience_s=PATIENCE_S, now=0.0)
    for second in range(1, 200):
        signs.heard(float(second))
        assert not signs.look(second + 0.5, is_busy=True, is_excused=False)


def test_an_answer_ends_the_silence_however_late() -> None:
    signs = SignsOfLife(patience_s=PATIENCE_S, now=0.0)
    watched(50, signs)
    assert signs.silent_s == 50 - ASK_EVERY_S
    signs.heard(50.0)
    assert signs.silent_s == 0.0
    assert watched(int(ASK_EVERY_S) - 1, signs, since=50) == 0, "that was a sign of life"


def test_a_control_request_is_excused_and_patience_begins_after_it() -> None:
    signs = SignsOfLife(patience_s=PATIENCE_S, now=0.0)
    watched(20, signs)
    assert signs.silent_s > 0
    watched(1000, signs, since=20, is_excused=True)
    assert not signs.is_hung
    watched(int(PATIENCE_S), signs, since=1020)
    assert not signs.is_hung
    watched(1, signs, since=1020 + int(PATIENCE_S))
    assert signs.is_hung


def test_a_process_that_was_stopped_itself_does_not_blame_the_scheduler() -> None:
    signs = SignsOfLife(patience_s=PATIENCE_S, now=0.0)
    watched(int(ASK_EVERY_S), signs)
    assert not signs.look(3600.0, is_busy=True, is_excused=False)
    assert (signs.silent_s, signs.is_hung) == (LONGEST_GAP_S, False)


@given(st.lists(st.tuples(st.floats(0.01, 20.0), st.booleans(), st.booleans(), st.booleans()), max_size=200))
def test_only_an_unanswered_question_counts_and_only_one_is_under_way(
    moments: list[tuple[float, bool, bool, bool]],
) -> None:
    signs, now, pending_s = SignsOfLife(patience_s=PATIENCE_S, now=0.0), 0.0, None
    for wait_s, is_busy, is_excused, answers in moments:
        now += wait_s
        if pending_s is not None:
            pending_s = 0.0 if is_excused else pending_s + wait_s
        if signs.look(now, is_busy=is_busy, is_excused=is_excused):
            assert pending_s is None
            pending_s = 0.0
        assert signs.silent_s <= (pending_s or 0.0) + 1e-6
        if answers:
            signs.heard(now)
            pending_s = None
