from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.probe import ServedModel, fetch_model, measure_isolated_ttft, warm_up
from flowprefill_sglang.errors import BadInput, PeerFault
from flowprefill_sglang.workload.prompts import prompt_text
from flowprefill_sglang.workload.trace import TraceRequest
from flowprefill_testing.streaming_server import StreamingServer, served


def ask(server: StreamingServer, question: Callable[[str], Any]) -> Any:
    async def main() -> Any:
        async with served(server) as url, asyncio.timeout(60):
            return await question(url)

    return asyncio.run(main())


def test_the_served_model() -> None:
    assert ask(StreamingServer(), fetch_model) == ServedModel(name="tiny", max_context_tokens=1_000)


@pytest.mark.parametrize(
    "models",
    [{}, {"data": []}, {"data": [{"name": "x"}]}, {"data": ["x"]}, {"data": [{"id": "x", "max_model_len": "y"}]}],
)
def test_a_listing_without_a_model(models: Any) -> None:
    with pytest.raises(PeerFault, match="does not list a model"):
        ask(StreamingServer(models), fetch_model)


def test_a_server_that_states_no_context() -> None:
    models = {"data": [{"id": "x"}, {"id": "y", "max_model_len": None}]}
    assert ask(StreamingServer(models), fetch_model) == ServedModel(name="x", max_context_tokens=None)
    assert ask(StreamingServer(models), lambda url: fetch_model(url, "y")).name == "y"
    with pytest.raises(BadInput, match="no model 'z'; it lists x, y"):
        ask(StreamingServer(models), lambda url: fetch_model(url, "z"))


def test_warming_up_sends_what_no_load_repeats() -> None:
    server = StreamingServer()
    rows = [TraceRequest(arrival_s=0, input_tokens=30, output_tokens=1, class_name="text")] * 3
    ask(server, lambda url: warm_up(url, rows, **MEASURING))
    loads = {prompt_text(row, number, 0) for number, row in enumerate(rows)}
    assert len(server.bodies) == 3
    assert server.most_working == 1
    assert not {body["text"] for body in server.bodies} & loads


def test_no_server() -> None:
    with pytest.raises(PeerFault, match=r"nothing from http://127\.0\.0\.1:1/v1/models"):
        asyncio.run(fetch_model("http://127.0.0.1:1"))


MEASURING = {"endpoint": ENDPOINTS["generate"], "model": "tiny", "prompts": "bytes", "seed": 0}


def test_isolated_requests_are_alone_and_share_nothing() -> None:
    server = StreamingServer()
    ttfts = ask(server, lambda url: measure_isolated_ttft(url, {"text": 40, "file": 90}, repeats=3, **MEASURING))
    assert {name: len(values) for name, values in ttfts.items()} == {"text": 3, "file": 3}
    assert all(t > 0 for values in ttfts.values() for t in values)
    assert server.most_working == 1
    assert [len(b["text"]) + 1 for b in server.bodies] == [40, 90] * 4, "one round to warm up, three that count"
    assert len({b["text"][:16] for b in server.bodies}) == 8
    assert len({b["rid"] for b in server.bodies}) == 8


def test_a_failing_isolated_request_names_the_reason() -> None:
    with pytest.raises(PeerFault, match="a single request of 40 tokens failed: HTTP 502: decode is gone"):
        ask(StreamingServer(error="decode is gone"), lambda url: measure_isolated_ttft(url, {"text": 40}, **MEASURING))
