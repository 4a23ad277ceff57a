"""The whole router on real sockets: objectives on their way from clients to prefill workers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from flowprefill_sglang.wire.messages import Dispatch, Phase, Progress
from flowprefill_testing.behaviours import silent
from flowprefill_testing.stand_ins import PrefillStandIn, TestBench, bench, good_prefill_answer, in_loop, never, until


async def post(
    one: TestBench, headers: dict[str, str] | None = None, path: str = "/generate", **body: Any
) -> tuple[int, dict[str, str], Any]:
    """Status, headers in lower case, document."""
    async with one.client.post(one.url + path, json={"text": "abc", **body}, headers=headers) as answer:
        return answer.status, {name.lower(): value for name, value in answer.headers.items()}, await answer.json()


async def dispatched(one: TestBench, count: int = 1) -> Dispatch:
    """The last of ``count`` dispatches: a stand-in may hear of one after its client has the answer."""
    await until(lambda: len(one.prefill.heard(Dispatch)) == count)
    found: Dispatch = one.prefill.heard(Dispatch)[-1]
    return found


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_the_dispatch_carries_what_the_client_asked_for(path: str) -> None:
    @in_loop
    async def scenario() -> None:
        async with bench() as one:
            fields = {"ttft_slo_ms": 400, "service_tier": "text", "priority": 2}
            status, headers, document = await post(one, path=path, **fields)
            assert status == 200
            assert headers["x-flowprefill-ttft-slo-ms"] == "400"
            message = await dispatched(one)
            assert (message.ttft_slo_s, message.slo_class, message.priority) == (0.4, "text", 2)
            assert fields.items() <= document["body"].items()  # what the decode side got
            assert fields.items() <= one.prefill.bodies[0].items()

    scenario()


@in_loop
async def test_a_header_wins_and_its_priority_reaches_both_sides() -> None:
    async with bench() as one:
        headers = {"x-sgl-ttft-slo-ms": "12.5", "x-override-priority": "9"}
        _, _, document = await post(one, headers, ttft_slo_ms=400, priority=2)
        message = await dispatched(one)
        assert (message.ttft_slo_s, message.slo_class, message.priority) == (0.0125, "custom", 9)
        assert document["body"]["priority"] == one.prefill.bodies[0]["priority"] == 9
        assert document["body"]["ttft_slo_ms"] == 400
        await post(one, {"x-override-priority": "-1"})
        assert (await dispatched(one, 2)).priority == one.prefill.bodies[1]["priority"] == -1


@in_loop
async def test_a_request_that_says_nothing_has_the_routers_default_class() -> None:
    async with bench(slo_class=("chat=123",), default_slo_class="chat") as one:
        _, headers, document = await post(one)
        message = await dispatched(one)
        assert (message.ttft_slo_s, message.slo_class, message.priority) == (0.123, "chat", None)
        assert headers["x-flowprefill-ttft-slo-ms"] == "123"
        assert not {"ttft_slo_ms", "service_tier", "priority"} & set(document["body"])


@pytest.mark.parametrize(
    ("headers", "body", "code", "words"),
    [
        ({"x-sgl-ttft-slo-ms": "soon"}, {}, "invalid_ttft_slo", ("x-sgl-ttft-slo-ms", "'soon'", "from 1 ", "3600000")),
        ({}, {"ttft_slo_ms": "250"}, "invalid_ttft_slo", ("ttft_slo_ms", '"250"', "from 1 ", "3600000")),
        ({}, {"service_tier": "flex"}, "unknown_slo_class", ("service_tier", "'flex'", "text, image, search, file")),
        ({"x-override-priority": "high"}, {}, "invalid_priority", ("x-override-priority", "'high'", "whole number")),
    ],
)
def test_nonsense_is_a_400_that_reaches_nobody(
    headers: dict[str, str], body: dict[str, Any], code: str, words: tuple[str, ...]
) -> None:
    @in_loop
    async def scenario() -> None:
        async with bench() as one:
            status, _, document = await post(one, headers, **body)
            assert (status, document["error"]["code"]) == (400, code)
            assert document["error"]["type"] == "invalid_request_error"
            for word in words:
                assert word in document["error"]["message"]
            assert (await post(one))[0] == 200
            assert len(one.decode.bodies) == 1
            await dispatched(one)
            assert one.outcomes() == {"rejected": 1, "succeeded": 1}

    scenario()


@in_loop
async def test_the_age_counts_waiting_and_failed_attempts() -> None:
    async with bench(
        prefills=2, prefill=silent, decode=never, max_concurrent_requests=1, heartbeat_dead_secs=5.0
    ) as one:
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(post(one))
        await until(lambda: any(worker.bodies for worker in one.prefills))
        asked_at = loop.time()
        second = asyncio.create_task(post(one, rid="second", ttft_slo_ms=500))
        await until(lambda: one.router.dispatcher.admission.waiting == 1)
        seen_at = loop.time()  # the router received it between these two moments
        await until(lambda: loop.time() - seen_at > 0.1)
        first.cancel()
        messages: list[Dispatch] = []

        def second_at(count: int) -> PrefillStandIn | None:
            messages[:] = [m for w in one.prefills for m in w.heard(Dispatch) if m.rid.startswith("second")]
            messages.sort(key=lambda m: m.rid)
            holders = (w for w in one.prefills if any(m.rid.startswith("second") for m in w.heard(Dispatch)))
            return next(holders) if len(messages) == count else None

        victim = await until(lambda: second_at(1))
        assert 0.1 <= messages[0].age_s <= loop.time() - asked_at
        await until(lambda: loop.time() - seen_at > 0.3)
        other = next(worker for worker in one.prefills if worker is not victim)
        other.behave = lambda dispatch, body: (200, good_prefill_answer(body))
        await victim.leave()
        await until(lambda: second_at(2))
        assert messages[1].rid == "second_retry1"
        assert 0.3 <= messages[1].age_s <= loop.time() - asked_at
        assert messages[1].ttft_slo_s == messages[0].ttft_slo_s == 0.5
        second.cancel()


@in_loop
async def test_phases_are_shown_with_the_workers() -> None:
    async with bench(prefill=silent, decode=never) as one:
        asked = [asyncio.create_task(post(one, rid=name)) for name in ("a", "b", "c")]
        await dispatched(one, 3)
        await one.prefill.say(Progress(rid="a", phase=Phase.STARTED))
        await one.prefill.say(Progress(rid="a", phase=Phase.PREEMPTED))
        await one.prefill.say(Progress(rid="b", phase=Phase.STARTED))
        assigned = one.router.dispatcher.links.registry.workers["p0"].assigned
        await until(lambda: assigned["b"].phase)
        async with one.client.get(f"{one.url}/workers") as answer:
            workers = json.loads(await answer.read())["workers"]
        assert workers[0]["phases"] == {"preempted": 1, "started": 1, "sent": 1}
        for task in asked:
            task.cancel()
