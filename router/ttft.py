"""One request's time to first token: noted as it happens, counted once; no clock.

A stream's first token is there when its first bytes are passed on to the client: SGLang (0.5.23) sends no event before
it has one, but for errors. Of an answer in one piece the router never sees the first token; there it is the moment the
prefill side has answered, which SGLang does once the prompt is computed and its KV handed over.
"""

from __future__ import annotations

from typing import Final

from flowprefill_sglang.router.exchange import Outcome
from flowprefill_sglang.router.metrics import ClassMetrics

_ERROR_EVENT: Final = b'data: {"error"'
_CLIENTS_OWN: Final = (Outcome.SUCCEEDED, Outcome.ABORTED, Outcome.CLIENT_GONE)
"""Ends that are no failure of ours: such a request counts by when its first token came."""


class FirstToken:
    """When a request got its first token, and what that means for its objective."""

    __slots__ = ("_metrics", "_prefilled_at", "_received_at", "_slo_s", "is_counted")

    def __init__(self, metrics: ClassMetrics, *, received_at: float, slo_s: float) -> None:
        self.is_counted = False
        self._metrics = metrics
        self._received_at = received_at
        self._slo_s = slo_s
        self._prefilled_at: float | None = None

    def attempt_begins(self) -> None:
        """Another pair is tried: what the last one did does not reach the client."""
        self._prefilled_at = None

    def prefilled(self, now: float) -> None:
        """The prefill side has answered well."""
        self._prefilled_at = now

    def passed_on(self, data: bytes, now: float) -> None:
        """These bytes of a stream go to the client."""
        if data and not self.is_counted and not data.startswith(_ERROR_EVENT):
            self._count(now)

    def ended(self, outcome: Outcome, now: float, *, streamed: bool) -> None:
        """The request has its outcome."""
        if self.is_counted or outcome is Outcome.REJECTED:
            return
        at = None if streamed else self._prefilled_at
        if at is None and outcome is Outcome.SUCCEEDED and not streamed:
            at = now  # the answer overtook the prefill side's
        if outcome in _CLIENTS_OWN:
            if at is not None:
                self._count(at)
                return
            if now - self._received_at <= self._slo_s:
                return  # the client left, or was told of an error, while the objective could still be met
        self.is_counted = True
        self._metrics.no_token()

    def _count(self, at: float) -> None:
        self.is_counted = True
        self._metrics.first_token(at - self._received_at, self._slo_s)
