"""``GET /metrics``: the router's measurements and its present picture, as Prometheus text or OpenMetrics.

What is measured request by request lies in ``RouterMetrics.registry``; counts and states are read from their owners
when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flowprefill_sglang.router.exchange import Outcome
from flowprefill_sglang.router.states import WorkerState

if TYPE_CHECKING:
    from flowprefill_sglang.router.dispatcher import Dispatcher


def metrics_routes(dispatcher: Dispatcher) -> list[Route]:
    """The routes that answer with this router's metrics; call once for each dispatcher."""
    registry = dispatcher.metrics.registry
    registry.register(_Picture(dispatcher))
    ProcessCollector(registry=registry)

    async def answer(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    return [Route("/metrics", answer)]


def metrics_app(routes: list[Route]) -> Starlette:
    """An application of nothing else, for a port of its own."""
    return Starlette(routes=routes)


class _Picture(Collector):
    """Counts and states, read at each scrape."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def describe(self) -> list[Metric]:
        return []  # registering would otherwise collect once, to learn the names

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._workers()
        yield from self._present()

    def _requests(self) -> Iterator[Metric]:
        metrics = self._dispatcher.metrics
        requests = CounterMetricFamily("flowprefill_requests", "Requests by how they ended.", labels=["outcome"])
        for outcome in Outcome:
            requests.add_metric([outcome], metrics.outcomes[outcome])
        yield requests
        responses = CounterMetricFamily(
            "flowprefill_responses", "Answers by HTTP status; 499 when the client left before one.", labels=["code"]
        )
        for code, count in sorted(metrics.responses.items()):
            responses.add_metric([str(code)], count)
        yield responses
        tenants = CounterMetricFamily(
            "flowprefill_tenant_requests",
            "Requests that named a tenant, by how they ended.",
            labels=["tenant", "outcome"],
        )
        for tenant, outcomes in metrics.tenants.items():
            for outcome, count in outcomes.items():
                tenants.add_metric([tenant, outcome], count)
        yield tenants

    def _workers(self) -> Iterator[Metric]:
        links, decodes = self._dispatcher.links, self._dispatcher.decodes
        health = GaugeMetricFamily(
            "flowprefill_worker_health", "1 for a worker that takes requests, else 0.", labels=["worker", "type"]
        )
        for worker in links.registry.workers.values():
            health.add_metric([worker.name, "prefill"], worker.state is WorkerState.READY)
        for instance in decodes.registry.instances.values():
            health.add_metric([instance.url, "decode"], instance.state is WorkerState.READY)
        yield health
        about = GaugeMetricFamily(
            "flowprefill_worker_info",
            "1 for each worker, with its version: FlowPrefill's of a prefill worker, SGLang's of a decode instance.",
            labels=["worker", "type", "version"],
        )
        for worker in links.registry.workers.values():
            about.add_metric([worker.name, "prefill", worker.hello.version], 1)
        for instance in decodes.registry.instances.values():
            if instance.facts is not None:
                about.add_metric([instance.url, "decode", instance.facts.version or ""], 1)
        yield about
        yield CounterMetricFamily(
            "flowprefill_worker_refusals",
            "Greetings of prefill workers that speak no common version of the protocol.",
            value=links.refusals,
        )
        yield CounterMetricFamily(
            "flowprefill_worker_retries", "Attempts with another pair of workers.", value=self._dispatcher.retries
        )
        yield CounterMetricFamily(
            "flowprefill_malformed_messages",
            "Messages on the workers' port that were none of the protocol.",
            value=links.malformed_messages,
        )
        preemptions = CounterMetricFamily(
            "flowprefill_preemptions_reported",
            "Requests that prefill workers said they had suspended; the workers' own metrics say for whom.",
            labels=["victim_class"],
        )
        for slo_class, count in links.registry.preemptions.items():
            preemptions.add_metric([slo_class], count)
        yield preemptions

    def _present(self) -> Iterator[Metric]:
        admission = self._dispatcher.admission
        yield GaugeMetricFamily("flowprefill_running_requests", "Requests in the cluster now.", value=admission.inside)
        yield GaugeMetricFamily(
            "flowprefill_waiting_requests", "Requests in the router's queue now.", value=admission.waiting
        )
