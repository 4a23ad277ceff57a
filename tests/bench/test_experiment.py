from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from flowprefill_sglang.bench.experiment import ExperimentSettings, prepare, run
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.workload.generator import generate_workload
from flowprefill_testing.streaming_server import StreamingServer, served

WORKLOAD = generate_workload(requests=20, rate_rps=1_000, seed=0).requests


def ask(server: StreamingServer, question: Callable[[str], Any]) -> Any:
    async def main() -> Any:
        async with served(server) as url, asyncio.timeout(60):
            return await question(url)

    return asyncio.run(main())


def test_an_experiment_from_start_to_end() -> None:
    server = StreamingServer()
    settings = ExperimentSettings(max_output_tokens=4)

    async def experiment(url: str) -> Any:
        return await run(url, await prepare(url, WORKLOAD, settings), settings)

    result = ask(server, experiment)
    assert result.report.succeeded == result.report.requests == 20
    load = server.bodies[-20:]
    assert max(len(b["text"]) + 1 for b in load) + 4 <= 1_000, "the longest prompt was scaled to the model's context"
    assert not {b["text"][:16] for b in load} & {b["text"][:16] for b in server.bodies[:-20]}
    document = json.loads(json.dumps(result.to_document(), allow_nan=False))
    assert document["length_factor"] < 0.1
    assert len(document["records"]) == 20
    assert document["model"] == {"name": "tiny", "max_context_tokens": 1_000}
    assert document["objectives_reference"] is not None
    for numbers in document["classes"].values():
        assert numbers["slo_ms"] > 0
        assert numbers["isolated_ttft_ms"] > 0


def test_a_stated_factor_measures_nothing() -> None:
    server = StreamingServer()
    prepared = ask(server, lambda url: prepare(url, WORKLOAD, ExperimentSettings(slo_factor=2)))
    assert server.bodies == []
    assert prepared.objectives["text"].slo_ms == 500


def test_a_length_scale_that_does_not_fit_is_wrong_use() -> None:
    with pytest.raises(BadInput, match=r"--length-scale 1 makes a request of .* context has 1000"):
        ask(StreamingServer(), lambda url: prepare(url, WORKLOAD, ExperimentSettings(length_scale=1.0)))
