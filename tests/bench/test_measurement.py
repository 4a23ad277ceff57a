"""What bench does to a server, load after load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from flowprefill_sglang.bench.experiment import ExperimentSettings
from flowprefill_sglang.bench.measurement import Measurement
from flowprefill_sglang.errors import BadInput, OutOfCapacity
from flowprefill_sglang.workload.trace import TraceRequest
from flowprefill_testing.loads import NoProgress
from flowprefill_testing.streaming_server import StreamingServer, served

WORKLOAD = tuple(
    TraceRequest(arrival_s=0.01 * n, input_tokens=20, output_tokens=2, class_name="text") for n in range(10)
)
STATED = ExperimentSettings(slo_ms={"text": 400.0})


def ask(server: StreamingServer, question: Callable[[Measurement], Any], **options: Any) -> Any:
    async def main() -> Any:
        async with served(server) as url, asyncio.timeout(60):
            given: dict[str, Any] = {"settings": STATED, "progress": NoProgress()} | options
            measurement = Measurement(url=url, **given)
            await measurement.prepare(WORKLOAD)
            return await question(measurement)

    return asyncio.run(main())


def test_no_load_finds_the_prompts_of_another() -> None:
    server = StreamingServer()

    async def question(measurement: Measurement) -> None:
        await measurement.repeat("one")
        await measurement.at_rate(100.0)
        await measurement.repeat("two")

    ask(server, question)
    texts = [body["text"] for body in server.bodies if len(body["text"]) == 19]
    assert len(texts) == 4 + 3 * 10, "four to warm up"
    assert len({text[:10] for text in texts}) == len(texts)


def test_repeats_of_a_seed_are_the_same_on_every_server() -> None:
    servers = StreamingServer(), StreamingServer()
    for server in servers:
        ask(server, lambda measurement: measurement.repeat("one"))
    sent = [sorted(body["text"] for body in server.bodies) for server in servers]
    assert sent[0] == sent[1]


def test_stated_objectives_are_told_and_nothing_is_measured() -> None:
    server = StreamingServer()
    ask(server, lambda measurement: measurement.repeat("one"), warm_up_requests=0)
    assert len(server.bodies) == 10
    assert {headers["x-sgl-ttft-slo-ms"] for headers in server.headers} == {"400.000"}
    assert {headers["x-slo-class"] for headers in server.headers} == {"text"}


def test_a_key_goes_with_every_request() -> None:
    server = StreamingServer()
    settings = ExperimentSettings(slo_factor=4.0, api_key="secret")
    ask(server, lambda measurement: measurement.repeat("one"), settings=settings)
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret"}


def test_a_chat_server_without_a_stated_context() -> None:
    server = StreamingServer(models={"data": [{"id": "a"}, {"id": "b"}]})
    settings = ExperimentSettings(slo_ms={"text": 400.0}, endpoint="chat", model="b")
    result = ask(server, lambda measurement: measurement.repeat("one"), settings=settings)
    assert result.report.succeeded == 10
    assert {body["model"] for body in server.bodies} == {"b"}
    assert all(body["messages"][0]["role"] == "user" for body in server.bodies)


def test_the_search_finds_the_rate_of_a_server_that_takes_turns() -> None:
    """20 ms a prompt: at most 50 requests a second, and 90% within 0.2 s of a burst of 40 somewhat above that."""
    burst = tuple(
        TraceRequest(arrival_s=0.05 * n, input_tokens=20, output_tokens=2, class_name="text") for n in range(40)
    )

    async def main() -> Measurement:
        async with served(StreamingServer(seconds_per_token=0.001)) as url, asyncio.timeout(60):
            settings = ExperimentSettings(slo_ms={"text": 200.0})
            measurement = Measurement(url=url, settings=settings, progress=NoProgress())
            await measurement.prepare(burst)
            await measurement.repeat("one")
            await measurement.search(0)
            return measurement

    measurement = asyncio.run(main())
    (found,) = measurement.found
    assert found.is_bracketed
    assert 35 < found.rate_rps < 90
    assert len(measurement.rows) == measurement.probes_per_search


def test_a_client_that_fell_behind_has_no_result() -> None:
    async def question(measurement: Measurement) -> None:
        asyncio.get_running_loop().call_later(0.0, time.sleep, 0.3)
        await measurement.repeat("repeat 1 of 1")

    with pytest.raises(OutOfCapacity, match=r"no result: the load client fell behind in repeat 1 of 1"):
        ask(StreamingServer(), question)


def test_a_workload_of_one_moment_has_no_rate_to_search_from() -> None:
    async def main() -> None:
        async with served(StreamingServer()) as url:
            measurement = Measurement(url=url, settings=STATED, progress=NoProgress())
            await measurement.prepare(WORKLOAD[:1] * 3)
            await measurement.repeat("one")
            await measurement.search(0)

    with pytest.raises(BadInput, match="arrive at the same time"):
        asyncio.run(main())
