"""The whole router on real sockets: what ``/metrics`` says afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.router.config import RouterConfig
from flowprefill_sglang.router.server import Router
from flowprefill_sglang.wire.messages import Phase, Progress
from flowprefill_testing.behaviours import STREAM, begin_stream, say, silent
from flowprefill_testing.stand_ins import TestBench, bench, good_prefill_answer, in_loop, never, until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(one: TestBench, parse: Callable[[str], Any] = parse_text, **headers: str) -> Samples:
    async with one.client.get(one.router.metrics_url, headers=headers) as answer:
        assert answer.status == 200
        text = await answer.text()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    labels = {name.removesuffix("_"): text for name, text in labels.items()}  # class_="text"
    return samples.get((f"flowprefill_{name}", frozenset(labels.items())), 0.0)


async def post(one: TestBench, headers: dict[str, str] | None = None, **body: Any) -> int:
    async with one.client.post(f"{one.url}/generate", json={"text": "abc", **body}, headers=headers) as answer:
        await answer.read()
        return answer.status


@pytest.mark.parametrize("stream", [False, True])
def test_attained_and_missed_objectives(stream: bool) -> None:
    @in_loop
    async def scenario() -> None:
        async with bench() as one:
            assert await post(one, service_tier="file", stream=stream) == 200
            one.prefill.behave = silent
            go_on = asyncio.Event()

            async def late(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await go_on.wait()
                if not stream:
                    return web.json_response({"text": "late"})
                response = web.StreamResponse(headers={"content-type": STREAM})
                await response.prepare(request)
                await response.write(b"data: {}\n\ndata: [DONE]\n\n")
                return response

            one.decode.behave = late
            asked_at = asyncio.get_running_loop().time()
            asked = asyncio.create_task(post(one, service_tier="file", ttft_slo_ms=20, stream=stream))
            await until(lambda: len(one.decode.bodies) == 2)
            await until(lambda: asyncio.get_running_loop().time() - asked_at > 0.05)
            go_on.set()
            assert await asked == 200
            samples = await scrape(one)
            labels = {"class_": "file"}
            assert value(samples, "ttft_slo_attained_total", **labels) == 1
            assert value(samples, "ttft_slo_violation_total", **labels) == 1
            assert value(samples, "ttft_seconds_count", **labels) == 2
            assert value(samples, "queue_wait_seconds_count", **labels) == 2
            assert (
                0.03 < value(samples, "ttft_seconds_sum", **labels) < asyncio.get_running_loop().time() - asked_at + 1
            )
            assert value(samples, "ttft_seconds_count", class_="text") == 0
            for rid in [body["rid"] for body in one.prefill.bodies]:  # what a silent worker holds is never let go
                await one.prefill.answer(rid, 200, good_prefill_answer({"rid": rid}))

    scenario()


@in_loop
async def test_the_ttft_of_an_answer_in_one_piece_is_not_its_whole_time() -> None:
    go_on = asyncio.Event()

    async def slow_decode(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await go_on.wait()
        return web.json_response({"text": "x"})

    async with bench(decode=slow_decode) as one:
        loop = asyncio.get_running_loop()
        begun_at = loop.time()
        asked = asyncio.create_task(post(one, service_tier="text"))
        await until(lambda: one.prefill.bodies and not one.router.dispatcher.links.waiting_answers)
        prefilled_s = loop.time() - begun_at
        await until(lambda: loop.time() - begun_at > prefilled_s + 0.3)
        go_on.set()
        assert await asked == 200
        samples = await scrape(one)
        assert value(samples, "ttft_seconds_count", class_="text") == 1
        assert value(samples, "ttft_seconds_sum", class_="text") <= prefilled_s


@in_loop
async def test_the_ttft_of_a_stream_is_known_while_it_goes_on() -> None:
    async with bench(decode=begin_stream) as one:
        body = {"text": "x", "stream": True, "service_tier": "file"}
        async with one.client.post(f"{one.url}/generate", json=body) as answer:
            await answer.content.readany()
            samples = await scrape(one)
            assert value(samples, "ttft_seconds_count", class_="file") == 1
            assert value(samples, "ttft_slo_attained_total", class_="file") == 1
            assert value(samples, "requests_total", outcome="succeeded") == 0


@in_loop
async def test_the_first_token_of_a_failed_attempt_does_not_count() -> None:
    async with bench(decodes=2, decode=never) as one:
        loop = asyncio.get_running_loop()
        asked = asyncio.create_task(post(one, service_tier="file"))
        victim = await until(lambda: next((decode for decode in one.decodes if decode.bodies), None))
        await until(lambda: one.prefill.bodies and not one.router.dispatcher.links.waiting_answers)
        prefilled_at = loop.time()
        await until(lambda: loop.time() - prefilled_at > 0.1)
        one.prefill.behave = silent
        next(decode for decode in one.decodes if decode is not victim).behave = say("fine")
        await victim.die()
        assert await asked == 200
        samples = await scrape(one)
        assert value(samples, "worker_retries_total") == 1
        assert value(samples, "ttft_seconds_count", class_="file") == 1
        assert value(samples, "ttft_seconds_sum", class_="file") > 0.1
        await until(lambda: len(one.prefill.bodies) == 2)
        rid = one.prefill.bodies[1]["rid"]
        await one.prefill.answer(rid, 200, good_prefill_answer({"rid": rid}))


@in_loop
async def test_every_end_is_counted_once() -> None:
    async with bench(api_key="k", max_concurrent_requests=1, queue_size=0) as one:
        assert await post(one) == 200
        assert await post(one, {"authorization": "Bearer wrong"}) == 401
        assert await post(one, {"x-slo-ttft-ms": "soon"}) == 400
        assert await post(one, model="other") == 404
        one.prefill.behave = silent
        one.decode.behave = never
        held = asyncio.create_task(post(one, service_tier="file"))
        await until(lambda: len(one.decode.bodies) == 2 and len(one.prefill.bodies) == 2)
        assert await post(one, service_tier="text") == 429
        held.cancel()
        await until(one.is_idle_at_router)
        for path in ("/health", "/nothing"):  # not counted: neither is a request to generate
            async with one.client.get(one.url + path):
                pass
        samples = await scrape(one)
        codes = {"200": 1, "401": 1, "400": 1, "404": 1, "429": 1, "499": 1}
        assert {code: value(samples, "responses_total", code=code) for code in codes} == codes
        outcomes = {"succeeded": 1, "rejected": 3, "shed": 1, "client_gone": 1, "expired": 0, "prefill_failed": 0}
        assert {name: value(samples, "requests_total", outcome=name) for name in outcomes} == outcomes
        assert ("flowprefill_requests_total", frozenset({("outcome", "expired")})) in samples
        assert value(samples, "ttft_slo_violation_total", class_="text") == 1  # shed
        assert value(samples, "ttft_slo_violation_total", class_="file") == 0  # left in time


@in_loop
async def test_a_client_that_leaves_while_it_sends_is_counted() -> None:
    async with bench() as one:
        host, port = one.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\nexpect: 100-continue\r\n\r\n"
        writer.write(head)
        assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"  # the router waits for the body now
        writer.transport.abort()
        await until(lambda: one.outcomes() == {"client_gone": 1})


@in_loop
async def test_tenants_workers_and_preemptions() -> None:
    async with bench(prefill=silent, decode=never) as one:
        headers = {"x-llm-d-inference-fairness-id": "acme"}
        asked = asyncio.create_task(post(one, headers, rid="a", service_tier="file"))
        await until(lambda: one.prefill.bodies and one.decode.bodies)
        await one.prefill.say(Progress(rid="a", phase=Phase.PREEMPTED))
        assigned = one.router.dispatcher.links.registry.workers["p0"].assigned
        await until(lambda: assigned["a"].phase)
        samples = await scrape(one)
        assert value(samples, "preemptions_reported_total", victim_class="file") == 1
        assert value(samples, "running_requests") == 1
        assert value(samples, "worker_health", worker="p0", type="prefill") == 1
        assert value(samples, "worker_health", worker=one.decode.url, type="decode") == 1
        assert value(samples, "worker_info", worker="p0", type="prefill", version="test") == 1
        assert value(samples, "worker_info", worker=one.decode.url, type="decode", version="stand-in") == 1
        await one.prefill.leave()
        await until(lambda: one.router.dispatcher.links.registry.workers["p0"].state == "dead")
        assert await asked == 502
        samples = await scrape(one)
        assert value(samples, "worker_health", worker="p0", type="prefill") == 0
        assert value(samples, "tenant_requests_total", tenant="acme", outcome="prefill_failed") == 1
        assert value(samples, "running_requests") == 0


@in_loop
async def test_both_text_formats() -> None:
    async with bench() as one:
        assert await post(one) == 200
        plain = await scrape(one)
        open_metrics = await scrape(one, parse_openmetrics, accept="application/openmetrics-text; version=1.0.0")
        assert value(plain, "requests_total", outcome="succeeded") == 1
        assert value(open_metrics, "requests_total", outcome="succeeded") == 1
        async with one.client.get(f"{one.url}/metrics", headers={"accept": "application/openmetrics-text"}) as answer:
            assert answer.headers["content-type"].startswith("application/openmetrics-text")
            assert (await answer.text()).endswith("# EOF\n")


@in_loop
async def test_scrapers_need_no_key() -> None:
    async with bench(api_key="k") as one, aiohttp.ClientSession() as stranger:
        async with stranger.get(f"{one.url}/metrics") as answer:
            assert answer.status == 200
        async with stranger.get(f"{one.url}/workers") as answer:
            assert answer.status == 401


@in_loop
async def test_metrics_on_a_port_of_their_own() -> None:
    async with bench(prometheus_port=0) as one:
        assert not one.router.metrics_url.startswith(one.url)
        assert await post(one) == 200
        assert value(await scrape(one), "requests_total", outcome="succeeded") == 1
        async with one.client.get(f"{one.url}/metrics") as answer:
            assert answer.status == 404
        async with one.client.get(one.router.metrics_url.replace("/metrics", "/health")) as answer:
            assert answer.status == 404
        taken = int(one.router.metrics_url.rpartition(":")[2].removesuffix("/metrics"))
        with pytest.raises(StartupError, match=f"cannot serve on 127.0.0.1:{taken}"):
            await Router(RouterConfig(port=0, prometheus_port=taken, worker_bind="tcp://127.0.0.1:*")).start()
