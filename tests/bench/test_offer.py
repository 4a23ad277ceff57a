"""A load until all is decided, against a server that a test slows down."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.objectives import stated_objectives
from flowprefill_sglang.bench.offer import LATE_ATTEMPTS, Offered, in_time, offer
from flowprefill_sglang.bench.plan import plan_requests
from flowprefill_sglang.errors import OutOfCapacity
from flowprefill_sglang.workload.trace import TraceRequest
from flowprefill_testing.loads import OBJECTIVES, record
from flowprefill_testing.streaming_server import StreamingServer, served


def plan(objectives: dict[str, Any], *tokens: int) -> Any:
    rows = [
        TraceRequest(arrival_s=0.001 * n, input_tokens=t, output_tokens=2, class_name="text")
        for n, t in enumerate(tokens)
    ]
    return plan_requests(rows, run_id="r", seed=0, endpoint=ENDPOINTS["generate"], model="m", objectives=objectives)


def offered(server: StreamingServer, slo_ms: float, *tokens: int, **options: Any) -> Offered:
    objectives = stated_objectives({"text": slo_ms})

    async def main() -> Offered:
        async with served(server) as url, asyncio.timeout(30):
            return await offer(url, plan(objectives, *tokens), objectives, **options)

    return asyncio.run(main())


def test_a_load_in_which_all_are_answered_ends_with_the_last_answer() -> None:
    done = offered(StreamingServer(), 20_000, 10, 10, 10)
    assert (done.attained, len(done.records), done.is_cut_short) == (3, 3, False)
    assert done.wall_s < 5
    row = done.to_row()
    assert row["classes"]["text"]["requests"] == row["classes"]["text"]["attained"] == 3


def test_who_is_late_is_given_up_once_all_is_decided() -> None:
    done = offered(StreamingServer(seconds_per_token=1.0), 200, 30, 30)
    assert (done.attained, done.to_row()["undecided"]) == (0, 2)
    assert 0.6 < done.wall_s < 5


def test_patience_waits_for_looser_objectives_too() -> None:
    done = offered(StreamingServer(seconds_per_token=0.04), 200, 20, patience=30.0)
    assert (done.attained, len(done.records)) == (0, 1)


def test_a_hopeless_load_is_cut_short_and_counts_the_most_that_it_could_have_been() -> None:
    done = offered(StreamingServer(error="no worker"), 20_000, *[10] * 8, hopeless=0.75)
    assert done.is_cut_short
    assert done.attained <= 6
    assert done.wall_s < 5


def late(late_s: float) -> Offered:
    return Offered(
        plan=[], records=[record("text", 0.1, late_s=late_s)], objectives=OBJECTIVES, wall_s=1.0, is_cut_short=False
    )


def test_a_late_load_is_offered_again_and_then_refused() -> None:
    loads = iter([late(0.2), late(0.0)])

    async def second_is_in_time() -> Offered:
        return next(loads)

    assert not asyncio.run(in_time(second_is_in_time, "at 3 requests/s")).is_client_late
    attempts = 0

    async def always_late() -> Offered:
        nonlocal attempts
        attempts += 1
        return late(0.2)

    with pytest.raises(OutOfCapacity, match=r"the load client fell behind at 3 requests/s: .* 200 ms after"):
        asyncio.run(in_time(always_late, "at 3 requests/s"))
    assert attempts == LATE_ATTEMPTS


def test_a_blocked_client_knows_that_it_was_late() -> None:
    objectives = stated_objectives({"text": 5_000})

    async def main() -> Offered:
        async with served(StreamingServer()) as url, asyncio.timeout(30):
            asyncio.get_running_loop().call_later(0.0, time.sleep, 0.3)
            return await offer(url, plan(objectives, 9, 9, 9), objectives)

    assert asyncio.run(main()).is_client_late
