"""The whole router on real sockets: workers that refuse, fail, die or hang."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from flowprefill_testing.behaviours import STREAM, begin_stream, say, silent, whole_stream
from flowprefill_testing.stand_ins import (
    bench,
    echo,
    good_prefill_answer,
    in_loop,
    never,
    until,
)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prefill_refusal_is_the_answer_and_decode_is_aborted(stream: bool) -> None:
    @in_loop
    async def scenario() -> None:
        words = b'{"error": {"message": "The input is too long"}}'
        async with bench(prefill=lambda dispatch, body: (400, words), decode=never) as one:
            async with one.client.post(f"{one.url}/generate", json={"text": "x", "stream": stream}) as answer:
                assert (answer.status, await answer.read()) == (400, words)
            rid = one.prefill.bodies[0]["rid"]
            await until(lambda: not one.decode.bodies or one.decode.aborted == one.decode.cut == [rid])
            assert one.outcomes() == {"rejected": 1}

    scenario()


@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_an_error_that_a_stream_begins_with_is_a_status(first: str) -> None:
    """SGLang answers a wrong request with status 200 and an error event when it asks for a stream."""
    document = b'{"error": {"message": "The input is too long", "code": 400}}'
    words = b"data: " + document + b"\n\ndata: [DONE]\n\n"

    async def refuse(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await whole_stream(request, words[:9], words[9:])

    @in_loop
    async def scenario() -> None:
        decode = refuse if first == "decode" else never
        async with bench(prefill=silent, decode=decode) as one:
            asked = asyncio.create_task(one.generate(stream=True))
            await until(lambda: one.decode.bodies and one.prefill.bodies)
            if first == "prefill":
                await one.prefill.answer(one.prefill.bodies[0]["rid"], 200, words, "text/event-stream")
            status, answer = await asked
            assert (status, answer) == (400, json.loads(document))
            assert one.outcomes() == {"rejected": 1}

    scenario()


@in_loop
async def test_a_handoff_that_fails_is_tried_again_also_for_a_stream() -> None:
    reason = {"type": "abort", "message": "Decode transfer failed", "status_code": 500}
    failed = json.dumps({"text": "", "meta_info": {"finish_reason": reason}}).encode()
    events = iter([failed, b'{"text": "fine"}'])

    async def fail_once(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await whole_stream(request, b"data: " + next(events) + b"\n\n", b"data: [DONE]\n\n")

    async with bench(decode=fail_once) as one:
        async with one.client.post(f"{one.url}/generate", json={"text": "x", "stream": True}) as answer:
            assert (answer.status, await answer.read()) == (200, b'data: {"text": "fine"}\n\ndata: [DONE]\n\n')
        assert one.router.dispatcher.retries == 1
        assert one.outcomes() == {"succeeded": 1}


@in_loop
async def test_a_failed_prefill_is_a_502_and_decode_is_aborted() -> None:
    async with bench(prefill=silent, decode=never, disable_retries=True) as one:
        asked = asyncio.create_task(one.generate())
        await until(lambda: one.decode.bodies and one.prefill.bodies)
        rid = one.prefill.bodies[0]["rid"]
        await one.prefill.answer(rid, 500, b"out of memory")
        status, document = await asked
        assert (status, document["error"]["code"]) == (502, "prefill_failed")
        assert "out of memory" in document["error"]["message"]
        await until(lambda: one.decode.aborted == [rid] and one.decode.cut == [rid])


@in_loop
async def test_a_dead_prefill_worker_fails_its_requests_over_to_another() -> None:
    async with bench(prefills=2, prefill=silent, decode=never, check_idle=False) as one:
        asked = asyncio.create_task(one.generate(rid="r"))
        victim = await until(lambda: next((worker for worker in one.prefills if worker.bodies), None))
        other = next(worker for worker in one.prefills if worker is not victim)
        other.behave = lambda dispatch, body: (200, good_prefill_answer(body))
        await until(lambda: one.decode.bodies)
        one.decode.behave = say("fine")
        await victim.die()
        status, document = await asked
        assert (status, document["text"]) == (200, "fine")
        await until(lambda: other.bodies)
        assert other.bodies[0]["rid"] == "r_retry1"
        await until(lambda: one.decode.aborted == ["r"])
        assert other.bodies[0]["bootstrap_room"] != victim.bodies[0]["bootstrap_room"]
        await until(one.is_idle)


@in_loop
async def test_a_dead_prefill_worker_is_a_502_without_retries() -> None:
    async with bench(prefill=silent, decode=never, disable_retries=True) as one:
        asked = asyncio.create_task(one.generate())
        await until(lambda: one.decode.bodies and one.prefill.bodies)
        await one.prefill.leave()
        status, document = await asked
        assert (status, document["error"]["code"]) == (502, "prefill_failed")
        status, document = await one.generate()
        assert (status, document["error"]["code"]) == (503, "no_endpoints")


@in_loop
async def test_a_dead_decode_before_the_first_token_is_retried_elsewhere() -> None:
    async with bench(decodes=2, decode=never) as one:
        asked = asyncio.create_task(one.generate(rid="r"))
        victim = await until(lambda: next((decode for decode in one.decodes if decode.bodies), None))
        other = next(decode for decode in one.decodes if decode is not victim)
        other.behave = say("fine")
        await victim.die()
        status, document = await asked
        assert (status, document["text"]) == (200, "fine")
        assert one.router.dispatcher.retries == 1


@in_loop
async def test_a_decode_that_hangs_with_its_connections_open_is_retried_elsewhere() -> None:
    hanging = asyncio.Event()

    async def hang_or_echo(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if not hanging.is_set():
            hanging.set()
            return await never(request, body)
        return await echo(request, body)

    async with bench(decodes=2, decode=hang_or_echo, health_check_timeout_secs=0.2, health_failure_threshold=2) as one:
        asking = asyncio.create_task(one.generate())
        await hanging.wait()
        (hung,) = (instance for instance in one.decodes if instance.bodies)
        hung.hangs = True
        status, _ = await asking
        assert status == 200
        assert [len(instance.bodies) for instance in one.decodes if instance is not hung] == [1]
        async with one.client.get(f"{one.url}/workers") as answer:
            reasons = {worker["url"]: worker["reason"] for worker in (await answer.json())["workers"]}
        assert reasons[hung.url] == "its health check timed out"
        await until(lambda: hung.cut)


@in_loop
async def test_a_decode_that_dies_in_a_stream_ends_it_with_an_error_and_aborts_prefill() -> None:
    async with bench(prefill=silent, decode=begin_stream) as one:
        async with one.client.post(f"{one.url}/generate", json={"text": "x", "stream": True}) as answer:
            first = await answer.content.readany()
            await until(lambda: one.prefill.bodies)
            await one.decode.die()
            events = (first + await answer.content.read()).split(b"\n\n")
        assert events[0] == b'data: {"text": "a"}'
        assert json.loads(events[2].removeprefix(b"data: "))["error"]["code"] == "decode_failed"
        assert events[3:] == [b"data: [DONE]", b""]
        await until(lambda: one.prefill.bodies and one.prefill.aborted == [one.prefill.bodies[0]["rid"]])
        assert one.outcomes() == {"decode_failed": 1}


@in_loop
async def test_a_prefill_worker_that_dies_under_a_stream_does_not_end_it() -> None:
    async def stream_on(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": STREAM})
        await response.prepare(request)
        await response.write(b'data: {"text": "a"}\n\n')
        await lost.wait()
        await response.write(b'data: {"text": "ab"}\n\n')
        return response

    lost = asyncio.Event()
    async with bench(prefill=silent, decode=stream_on, check_idle=False) as one:
        async with one.client.post(f"{one.url}/generate", json={"text": "x", "stream": True}) as answer:
            first = await answer.content.readany()
            await until(lambda: one.prefill.bodies)
            await one.prefill.leave()
            await until(lambda: not one.router.dispatcher.links.registry.ready())
            lost.set()
            assert first + await answer.content.read() == b'data: {"text": "a"}\n\ndata: {"text": "ab"}\n\n'
        assert one.outcomes() == {"succeeded": 1}


@in_loop
async def test_an_unreachable_decode_is_a_502_and_prefill_is_aborted() -> None:
    async with bench(prefill=silent, retry_max_retries=0, health_check_interval_secs=60.0) as one:
        await one.decode.die()
        status, document = await one.generate()
        assert (status, document["error"]["code"]) == (502, "decode_failed")
        await until(lambda: one.prefill.bodies and one.prefill.aborted == [one.prefill.bodies[0]["rid"]])


@in_loop
async def test_a_decode_error_is_passed_on_and_prefill_is_aborted() -> None:
    async def refuse(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "bad regex"}}, status=400)

    async with bench(prefill=silent, decode=refuse) as one:
        status, document = await one.generate()
        assert (status, document) == (400, {"error": {"message": "bad regex"}})
        await until(lambda: len(one.prefill.aborted) == 1)


@in_loop
async def test_a_request_that_takes_too_long_is_a_504_and_both_sides_are_aborted() -> None:
    async with bench(prefill=silent, decode=never, request_timeout_secs=0.2) as one:
        status, document = await one.generate()
        assert (status, document["error"]["code"]) == (504, "expired")
        await until(lambda: one.prefill.bodies)
        rid = one.prefill.bodies[0]["rid"]
        await until(lambda: one.prefill.aborted == [rid] and one.decode.aborted == [rid] and one.decode.cut == [rid])
