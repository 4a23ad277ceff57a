"""One request's life, decided here and nowhere else: events in, steps out; no socket, no clock.

Two sides work on a request at once, and either can fail, answer first, or fall silent, while the client can leave. The
rules: exactly one ``Outcome``; a side that still works when the outcome is known is told to stop; another pair is tried
only while the client has not seen a byte, and only when a side died, could not be reached, or answered that it failed
(5xx): as a rule that is the handoff between the two, and often the other side is what died.
"""

from __future__ import annotations

from enum import Enum, StrEnum, auto

from flowprefill_sglang.errors import FlowPrefillError, InternalError, OutOfCapacity, PeerFault, TooLate


class Outcome(StrEnum):
    """How a request ended; also its metric label."""

    SUCCEEDED = "succeeded"
    REJECTED = "rejected"
    """A worker said that the request itself is wrong (4xx)."""
    PREFILL_FAILED = "prefill_failed"
    DECODE_FAILED = "decode_failed"
    EXPIRED = "expired"
    ABORTED = "aborted"
    """By ``/abort_request``, or by the router's own shutdown."""
    CLIENT_GONE = "client_gone"
    INTERNAL_ERROR = "internal_error"
    """Our bug."""
    SHED = "shed"
    """Never dispatched: no worker, no place in the queue, or refused by the router itself."""


class Step(Enum):
    """What the shell has to do next, in the order given."""

    ABORT_PREFILL = auto()
    CUT_DECODE = auto()
    """Close the connection of the decode side's answer, and tell it to stop."""
    ASK_DECODE_TO_STOP = auto()
    """Tell it to stop, and keep listening."""
    RETRY = auto()
    """Start again with another pair."""
    RELAY = auto()
    """Pass the decode side's answer on from here."""
    ANSWER_PREFILL = auto()
    """Pass the prefill side's answer on, whole."""
    FINISH = auto()
    """The outcome is known; ``error`` says what to tell the client, when there is something to tell."""


class Side(Enum):
    """One side's part of one attempt."""

    IDLE = auto()
    WORKING = auto()
    OVER = auto()


Steps = tuple[Step, ...]
CLIENT_CLOSED = 499


class Exchange:
    """State of one request over all its attempts."""

    def __init__(self, retries: int) -> None:
        self._retries = retries
        self.attempts = 0
        self.prefill = Side.IDLE
        self.decode = Side.IDLE
        self.answering = False
        """The client's answer has begun, so no other can be given."""
        self.outcome: Outcome | None = None
        self.error: FlowPrefillError | None = None
        self._abort_asked = False
        self._last_failure: tuple[Outcome, PeerFault] | None = None

    @property
    def last_failure(self) -> str:
        """Why the attempt before this one failed, or nothing."""
        return "" if self._last_failure is None else str(self._last_failure[1])

    def start(self) -> None:
        """Both sides have been given the request. Raises InternalError when they had it already."""
        if self.outcome is not None or Side.WORKING in (self.prefill, self.decode):
            raise InternalError("an attempt was started while another one runs")
        self.attempts += 1
        self.prefill = self.decode = Side.WORKING

    # ---- prefill -------------------------------------------------------------------------------------------------

    def prefill_answered(self, status: int, detail: str = "") -> Steps:
        """The prefill side's HTTP answer."""
        if self.prefill is not Side.WORKING:
            return ()
        self.prefill = Side.OVER
        if self.outcome is not None or status < 400 or self._abort_asked:
            return ()  # after an abort, the decode side's answer says so
        if status < 500 and status != CLIENT_CLOSED and not self.answering:
            return (*self._stop_both(), Step.ANSWER_PREFILL, *self._end(Outcome.REJECTED))
        error = PeerFault(f"prefill failed with status {status}{detail}", code="prefill_failed")
        return self._fail(Outcome.PREFILL_FAILED, error, may_retry=status >= 500)

    def prefill_lost(self, reason: str) -> Steps:
        """The prefill worker died, or the request never reached it."""
        if self.prefill is not Side.WORKING:
            return ()
        self.prefill = Side.OVER
        if self.outcome is not None:
            return ()
        return self._fail(Outcome.PREFILL_FAILED, PeerFault(reason, code="prefill_failed"), may_retry=True)

    # ---- decode --------------------------------------------------------------------------------------------------

    def decode_streams(self, *, needs_prefill: bool = True) -> Steps:
        """The decode side began to answer with a stream, which is passed on from here. ``needs_prefill``: whether the
        prefill side can still have anything to give; without, nothing that happens to it matters any more."""
        if self.decode is not Side.WORKING or self.outcome is not None or self.answering:
            return ()
        self.answering = True
        if not needs_prefill:
            self.prefill = Side.OVER
        return (Step.RELAY,)

    def decode_answered(self, status: int, detail: str = "") -> Steps:
        """The decode side's answer, whole; or the end of its stream. Its server errors, other than 503, become ours."""
        if self.decode is not Side.WORKING:
            return ()
        self.decode = Side.OVER
        if self.outcome is not None:
            return ()
        if status >= 500 and status != 503 and not self.answering:
            error = PeerFault(f"decode failed with status {status}{detail}", code="decode_failed")
            # Also once prefill has answered: its worker can die between that and the end of the handoff.
            return self._fail(Outcome.DECODE_FAILED, error, may_retry=True)
        relay = () if self.answering else (Step.RELAY,)
        self.answering = True
        if self._abort_asked:
            return (*self._stop_both(), *relay, *self._end(Outcome.ABORTED))
        if status < 400:
            return (*relay, *self._end(Outcome.SUCCEEDED))  # prefill's own answer may come a moment later
        outcome = Outcome.REJECTED if status < 500 else Outcome.DECODE_FAILED
        return (*self._stop_both(), *relay, *self._end(outcome))

    def decode_lost(self, reason: str) -> Steps:
        """The decode instance could not be reached, or its connection broke."""
        if self.decode is not Side.WORKING:
            return ()
        self.decode = Side.OVER
        if self.outcome is not None:
            return ()
        return self._fail(Outcome.DECODE_FAILED, PeerFault(reason, code="decode_failed"), may_retry=True)

    # ---- everything else -----------------------------------------------------------------------------------------

    def no_pair(self, error: FlowPrefillError) -> Steps:
        """Nobody can take the request. After a failed attempt, that failure is what the client should hear."""
        if self.outcome is not None:
            return ()
        if self._last_failure is not None:
            return self._end(*self._last_failure)
        return self._end(Outcome.SHED, error)

    def client_gone(self) -> Steps:
        return () if self.outcome is not None else (*self._stop_both(), *self._end(Outcome.CLIENT_GONE))

    def expired(self, error: TooLate) -> Steps:
        return () if self.outcome is not None else (*self._stop_both(), *self._end(Outcome.EXPIRED, error))

    def abort_asked(self) -> Steps:
        """``/abort_request``: both sides stop, and the decode side's last words are the client's answer, as with
        SGLang alone. Should it stay silent, ``abort_overdue`` follows."""
        if self.outcome is not None or self._abort_asked:
            return ()
        self._abort_asked = True
        return (Step.ABORT_PREFILL, Step.ASK_DECODE_TO_STOP)

    def abort_overdue(self) -> Steps:
        """Nobody answered an abort."""
        if self.outcome is not None:
            return ()
        error = TooLate("the request was aborted", status=CLIENT_CLOSED, code="aborted")
        return (*self._stop_both(), *self._end(Outcome.ABORTED, error))

    def router_stops(self) -> Steps:
        """The router's grace for requests in flight is over; the client may try another router."""
        if self.outcome is not None:
            return ()
        error = OutOfCapacity("the router is stopping", code="router_stopping")
        return (*self._stop_both(), *self._end(Outcome.ABORTED, error))

    def broke(self, error: InternalError) -> Steps:
        """The shell itself failed."""
        return () if self.outcome is not None else (*self._stop_both(), *self._end(Outcome.INTERNAL_ERROR, error))

    def _fail(self, outcome: Outcome, error: PeerFault, *, may_retry: bool = False) -> Steps:
        stops = self._stop_both()
        if may_retry and not self.answering and not self._abort_asked and self.attempts <= self._retries:
            self._last_failure = (outcome, error)
            return (*stops, Step.RETRY)
        return (*stops, *self._end(outcome, error))

    def _stop_both(self) -> Steps:
        steps = []
        if self.prefill is Side.WORKING:
            steps.append(Step.ABORT_PREFILL)
        if self.decode is Side.WORKING:
            steps.append(Step.CUT_DECODE)
        self.prefill = self.decode = Side.OVER
        return tuple(steps)

    def _end(self, outcome: Outcome, error: FlowPrefillError | None = None) -> Steps:
        if self.outcome is not None:
            raise InternalError(f"a second outcome: {outcome} after {self.outcome}")
        self.outcome, self.error = outcome, error
        return (Step.FINISH,)
