"""When a request has its first token, and how it then counts against its objective."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.router.exchange import Outcome
from flowprefill_sglang.router.metrics import RouterMetrics
from flowprefill_sglang.router.ttft import FirstToken

SLO_S = 0.25


class Case:
    """One request of class ``text``, received at 100 s of the test's clock."""

    def __init__(self) -> None:
        self._metrics = RouterMetrics(["text"])
        self.token = FirstToken(self._metrics.of_class("text"), received_at=100.0, slo_s=SLO_S)
        self.token.attempt_begins()

    def _value(self, name: str) -> float:
        return self._metrics.registry.get_sample_value(name, {"class": "text"}) or 0.0

    @property
    def counted(self) -> tuple[float, float, float]:
        """TTFTs observed, objectives met, objectives missed."""
        return (
            self._value("flowprefill_ttft_seconds_count"),
            self._value("flowprefill_ttft_slo_attained_total"),
            self._value("flowprefill_ttft_slo_violation_total"),
        )

    @property
    def ttft_s(self) -> float:
        return self._value("flowprefill_ttft_seconds_sum")


@pytest.mark.parametrize(("at", "counted"), [(100.1, (1, 1, 0)), (100.25, (1, 1, 0)), (100.26, (1, 0, 1))])
def test_a_stream_counts_with_its_first_bytes(at: float, counted: tuple) -> None:
    case = Case()
    case.token.prefilled(100.05)
    case.token.passed_on(b"", 100.06)
    case.token.passed_on(b'data: {"text": "a"}\n\n', at)
    case.token.passed_on(b'data: {"text": "b"}\n\n', 200.0)
    assert case.counted == counted
    assert case.ttft_s == pytest.approx(at - 100)
    case.token.ended(Outcome.DECODE_FAILED, 300.0, streamed=True)
    assert case.counted == counted


def test_an_error_inside_a_stream_is_no_token() -> None:
    case = Case()
    case.token.passed_on(b'data: {"error": {"message": "x"}}\n\n', 100.1)
    case.token.ended(Outcome.SUCCEEDED, 100.2, streamed=True)
    assert case.counted == (0, 0, 0)
    late = Case()
    late.token.passed_on(b'data: {"error": {"message": "x"}}\n\n', 101.0)
    late.token.ended(Outcome.SUCCEEDED, 101.0, streamed=True)
    assert late.counted == (0, 0, 1)


def test_an_answer_in_one_piece_counts_from_the_prefill_sides_answer() -> None:
    case = Case()
    case.token.prefilled(100.2)
    case.token.ended(Outcome.SUCCEEDED, 110.0, streamed=False)
    assert case.counted == (1, 1, 0)
    assert case.ttft_s == pytest.approx(0.2)


def test_an_answer_that_overtook_the_prefill_sides_counts_as_it_came() -> None:
    case = Case()
    case.token.ended(Outcome.SUCCEEDED, 100.3, streamed=False)
    assert case.counted == (1, 0, 1)


def test_a_failed_attempt_gives_no_token() -> None:
    case = Case()
    case.token.prefilled(100.1)
    case.token.attempt_begins()
    case.token.prefilled(100.4)
    case.token.ended(Outcome.SUCCEEDED, 100.5, streamed=False)
    assert case.counted == (1, 0, 1)


def test_a_stream_whose_client_left_before_its_first_bytes_had_no_token() -> None:
    case = Case()
    case.token.prefilled(100.1)
    case.token.ended(Outcome.CLIENT_GONE, 100.2, streamed=True)
    assert case.counted == (0, 0, 0)


@pytest.mark.parametrize(
    ("outcome", "prefilled_at", "ended_at", "counted"),
    [
        (Outcome.CLIENT_GONE, None, 100.2, (0, 0, 0)),  # it did not wait for its objective to be missed
        (Outcome.CLIENT_GONE, None, 100.3, (0, 0, 1)),
        (Outcome.CLIENT_GONE, 100.1, 105.0, (1, 1, 0)),
        (Outcome.ABORTED, None, 100.2, (0, 0, 0)),
        (Outcome.REJECTED, None, 105.0, (0, 0, 0)),
        (Outcome.SHED, None, 100.0, (0, 0, 1)),
        (Outcome.PREFILL_FAILED, None, 100.1, (0, 0, 1)),
        (Outcome.DECODE_FAILED, 100.1, 100.2, (0, 0, 1)),  # the client got nothing
        (Outcome.EXPIRED, 100.1, 100.2, (0, 0, 1)),
        (Outcome.INTERNAL_ERROR, None, 100.1, (0, 0, 1)),
    ],
)
def test_how_other_ends_count(
    outcome: Outcome, prefilled_at: float | None, ended_at: float, counted: tuple[int, int, int]
) -> None:
    case = Case()
    if prefilled_at is not None:
        case.token.prefilled(prefilled_at)
    case.token.ended(outcome, ended_at, streamed=False)
    assert case.counted == counted


STEPS = st.sampled_from(["begins", "prefilled", "passed_on", "nothing", "error"])


@given(st.lists(STEPS, max_size=8), st.sampled_from(list(Outcome)), st.booleans())
def test_a_request_counts_at_most_once(steps: list[str], outcome: Outcome, streamed: bool) -> None:
    case = Case()
    now = 100.0
    for step in steps:
        now += 0.07
        match step:
            case "begins":
                case.token.attempt_begins()
            case "prefilled":
                case.token.prefilled(now)
            case "passed_on":
                case.token.passed_on(b"data: {}\n\n", now)
            case "nothing":
                case.token.passed_on(b"", now)
            case "error":
                case.token.passed_on(b'data: {"error": {}}\n\n', now)
    case.token.ended(outcome, now, streamed=streamed)
    case.token.ended(outcome, now, streamed=streamed)
    observed, attained, violated = case.counted
    assert attained + violated <= 1
    assert observed <= attained + violated
    if outcome is Outcome.SUCCEEDED and not streamed:
        assert observed == 1
