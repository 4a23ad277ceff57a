"""The whole router on real sockets: clients that leave, are slow, or send nonsense."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from flowprefill_testing.behaviours import STREAM, begin_stream, say, silent
from flowprefill_testing.stand_ins import (
    bench,
    good_prefill_answer,
    in_loop,
    never,
    until,
)


# ---- clients that leave, or are slow ---------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_both_sides(stream: bool) -> None:
    @in_loop
    async def scenario() -> None:
        async with bench(prefill=silent, decode=begin_stream if stream else never) as one:
            asked = asyncio.create_task(one.generate(stream=stream))
            await until(lambda: one.decode.bodies and one.prefill.bodies)
            asked.cancel()
            rid = one.prefill.bodies[0]["rid"]
            await until(
                lambda: one.prefill.aborted == [rid] and one.decode.aborted == [rid] and one.decode.cut == [rid]
            )
            assert one.outcomes() == {"client_gone": 1}

    scenario()


@in_loop
async def test_a_slow_client_slows_its_decode_side_down() -> None:
    written = 0

    async def flood(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse(headers={"content-type": STREAM})
        await response.prepare(request)
        event = b"data: " + b"x" * 65_530 + b"\n\n"
        while written < 200 * 2**20:
            await response.write(event)
            written += len(event)
        return response

    async with bench(decode=flood) as one:
        host, port = one.url.removeprefix("http://").split(":")
        _reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        request = b'{"text": "x", "stream": true}'
        writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(request), request))
        last = -1
        while last != written or not written:  # until nothing more gets through
            last = written
            await asyncio.sleep(0.2)
        assert written < 40 * 2**20  # what kernel buffers hold
        writer.transport.abort()
        await until(lambda: one.decode.cut)


@in_loop
async def test_abort_request_stops_both_sides_and_decode_has_the_last_word() -> None:
    async def until_aborted(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await until(lambda: body["rid"] in one.decode.aborted)
        return web.json_response({"meta_info": {"finish_reason": {"type": "abort"}}})

    async with bench(prefill=silent, decode=until_aborted) as one:
        asked = asyncio.create_task(one.generate(rid="abc-1"))
        await until(lambda: one.decode.bodies and one.prefill.bodies)
        async with one.client.post(f"{one.url}/abort_request", json={"rid": "abc"}) as answer:
            assert answer.status == 200
        status, document = await asked
        assert (status, document["meta_info"]["finish_reason"]["type"]) == (200, "abort")
        await until(lambda: one.prefill.aborted)  # once, or again with the request's end when it has not answered yet
        assert set(one.prefill.aborted) == {"abc-1"}
        assert one.outcomes() == {"aborted": 1}


# ---- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[1]", 400),
        (b"", 400),
        (b'{"text": "\xff"}', 400),
        (b'{"text": "x", "model": 5}', 400),
        (b'{"text": "x", "rid": ""}', 400),
        (b'{"input_ids": [' + b"1," * 1001 + b"1]}", 413),
        (b'{"text": "' + b"x" * 5000 + b'"}', 413),
        (b'{"text": "x", "model": "other"}', 404),
    ],
)
def test_bad_requests_get_a_clear_error_and_reach_nobody(body: bytes, status: int) -> None:
    @in_loop
    async def scenario() -> None:
        async with bench(max_body_bytes=4096) as one:
            async with one.client.post(f"{one.url}/generate", data=body) as answer:
                document = await answer.json()
            assert answer.status == status, document
            assert set(document["error"]) == {"message", "type", "param", "code"}
            assert not one.decode.bodies
            assert (await one.generate())[0] == 200

    scenario()


@in_loop
async def test_a_chunked_body_over_the_limit_is_refused() -> None:
    async def parts() -> Any:
        for _ in range(100):
            yield b"x" * 1000

    async with bench(max_body_bytes=4096) as one:
        async with one.client.post(f"{one.url}/generate", data=parts()) as answer:
            assert answer.status == 413
        assert (await one.generate())[0] == 200


@in_loop
async def test_a_rid_that_is_running_is_refused() -> None:
    async with bench(prefill=silent, decode=never) as one:
        first = asyncio.create_task(one.generate(rid="same"))
        await until(lambda: one.decode.bodies and one.prefill.bodies)
        status, document = await one.generate(rid="same")
        assert (status, document["error"]["code"]) == (400, "duplicate_rid")
        first.cancel()


@in_loop
async def test_api_key() -> None:
    async with bench(api_key="secret") as one:
        assert (await one.generate())[0] == 200
        for headers in ({}, {"authorization": "Bearer wrong"}):
            async with (
                aiohttp.ClientSession(headers=headers) as stranger,
                stranger.post(f"{one.url}/generate", json={"text": "x"}) as answer,
            ):
                assert answer.status == 401
                assert (await answer.json())["error"]["code"] == "invalid_api_key"
                async with stranger.get(f"{one.url}/readiness") as ready:
                    assert ready.status == 200


@in_loop
async def test_a_full_queue_is_a_429_and_a_waiting_client_may_leave() -> None:
    async with bench(
        prefill=silent, decode=never, max_concurrent_requests=1, queue_size=1, queue_timeout_secs=0.3
    ) as one:
        core = one.router.dispatcher
        running = asyncio.create_task(one.generate())
        await until(lambda: one.decode.bodies and one.prefill.bodies)
        leaving = asyncio.create_task(one.generate())
        await until(lambda: core.admission.waiting == 1)
        async with one.client.post(f"{one.url}/generate", json={"text": "x"}) as answer:
            assert answer.status == 429
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["x-flowprefill-dropped-reason"] == "saturated"
        leaving.cancel()
        await until(lambda: core.admission.waiting == 0)
        assert (await one.generate())[0] == 429  # waits in vain
        waiting = asyncio.create_task(one.generate())
        await until(lambda: core.admission.waiting == 1)
        one.decode.behave = say("next")
        one.prefill.behave = lambda dispatch, body: (200, good_prefill_answer(body))
        running.cancel()
        assert (await waiting)[1]["text"] == "next"
