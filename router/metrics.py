"""What the router measures of its requests, in Prometheus's types. Run by the router's event loop.

Everything on a request's way is a few additions: label sets are resolved once, at start, and what is a plain count
stays one until somebody asks for ``/metrics`` (``exposition.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client import Counter as PrometheusCounter

from flowprefill_sglang.router.exchange import CLIENT_CLOSED, Outcome
from flowprefill_sglang.router.objectives import CUSTOM

BUCKETS_S: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 2.0, 4.0, 6.0, 10.0, 20.0, 30.0, 60.0),
)
"""1 ms to a minute; the default classes' objectives are among them, so that attainment can be read from a histogram."""
MAX_TENANTS: Final = 1_000
MAX_TENANT_CHARACTERS: Final = 128
OTHER_TENANTS: Final = "other"


class ClassMetrics:
    """The measurements of one SLO class."""

    __slots__ = ("_attained", "_queue_wait", "_ttft", "_violated")

    def __init__(
        self, *, ttft: Histogram, queue_wait: Histogram, attained: PrometheusCounter, violated: PrometheusCounter
    ) -> None:
        self._ttft = ttft
        self._queue_wait = queue_wait
        self._attained = attained
        self._violated = violated

    def waited(self, wait_s: float) -> None:
        """A request got its place in the cluster."""
        self._queue_wait.observe(wait_s)

    def first_token(self, ttft_s: float, slo_s: float) -> None:
        """A request got its first token; one that comes exactly at its deadline is in time."""
        self._ttft.observe(ttft_s)
        (self._attained if ttft_s <= slo_s else self._violated).inc()

    def no_token(self) -> None:
        """A request whose objective can no longer be met never got one."""
        self._violated.inc()


class RouterMetrics:
    """All counts and measurements of one router. ``classes``: the SLO classes that requests can have."""

    def __init__(self, classes: Iterable[str]) -> None:
        self.registry = CollectorRegistry()
        self.outcomes: Counter[Outcome] = Counter()
        self.responses: Counter[int] = Counter()
        """By HTTP status."""
        self.tenants: dict[str, Counter[Outcome]] = {}
        labels = ["class"]
        ttft = Histogram(
            "flowprefill_ttft_seconds",
            "Time from receipt of the whole request to its first token.",
            labels,
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        queue_wait = Histogram(
            "flowprefill_queue_wait_seconds",
            "Time a request waited in the router's queue, of those that got a place.",
            labels,
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        attained = PrometheusCounter(
            "flowprefill_ttft_slo_attained", "Requests whose TTFT met its objective.", labels, registry=self.registry
        )
        violated = PrometheusCounter(
            "flowprefill_ttft_slo_violation",
            "Requests whose first token came after its objective, or never.",
            labels,
            registry=self.registry,
        )
        self._of_class = {
            name: ClassMetrics(
                ttft=ttft.labels(name),
                queue_wait=queue_wait.labels(name),
                attained=attained.labels(name),
                violated=violated.labels(name),
            )
            for name in (*classes, CUSTOM)
        }

    def of_class(self, slo_class: str) -> ClassMetrics:
        """The measurements of a configured class, or of ``custom``."""
        return self._of_class[slo_class]

    def ended(self, outcome: Outcome, status: int, tenant: str = "") -> None:
        """A request has its outcome. ``status``: of the answer that was begun, 0 when the client left before one."""
        self.outcomes[outcome] += 1
        self.responses[status or CLIENT_CLOSED] += 1
        if tenant:
            if tenant not in self.tenants and (len(self.tenants) >= MAX_TENANTS or len(tenant) > MAX_TENANT_CHARACTERS):
                tenant = OTHER_TENANTS
            self.tenants.setdefault(tenant, Counter())[outcome] += 1
