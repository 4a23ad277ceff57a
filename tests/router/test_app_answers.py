"""What comes back from the whole router, on real sockets, against stand-ins for its workers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from flowprefill_sglang.wire.messages import Dispatch
from flowprefill_testing.behaviours import STREAM, silent
from flowprefill_testing.stand_ins import (
    MODEL,
    bench,
    in_loop,
    until,
)


@in_loop
async def test_both_sides_get_the_same_body_with_the_pd_fields() -> None:
    async with bench() as one:
        status, answer = await one.generate(text="hällo", unknown_field={"a": [1, None]})
        assert (status, answer["text"]) == (200, "echo")
        await until(lambda: one.prefill.bodies)
        (sent,), (prefilled,) = one.decode.bodies, one.prefill.bodies
        assert sent == prefilled
        assert sent["text"] == "hällo"
        assert sent["unknown_field"] == {"a": [1, None]}
        assert (sent["bootstrap_host"], sent["bootstrap_port"]) == ("10.1.2.3", 8998)
        assert 0 <= sent["bootstrap_room"] < 2**63
        (dispatch,) = one.prefill.heard(Dispatch)
        assert (dispatch.rid, dispatch.path) == (sent["rid"], "/generate")
        assert one.outcomes() == {"succeeded": 1}


@in_loop
async def test_events_of_a_stream_arrive_while_it_goes_on() -> None:
    go_on = asyncio.Event()

    async def slow_stream(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": STREAM})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await go_on.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    async with bench(decode=slow_stream) as one:
        async with one.client.post(f"{one.url}/generate", json={"text": "x", "stream": True}) as answer:
            assert answer.headers["content-type"] == STREAM
            assert await answer.content.readany() == b"data: 1\n\n"
            go_on.set()
            assert await answer.content.read() == b"data: [DONE]\n\n"
        assert one.outcomes() == {"succeeded": 1}


@in_loop
async def test_openai_paths_and_headers_are_passed_on() -> None:
    async with bench() as one:
        for path, body in (
            ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}),
            ("/v1/completions", {"model": MODEL, "prompt": "xyz", "stream": True}),
        ):
            headers = {"x-request-id": "r1", "traceparent": "t1", "cookie": "secret"}
            async with one.client.post(f"{one.url}{path}", json=body, headers=headers) as answer:
                assert answer.status == 200
                assert b"x" in await answer.read()
            await until(lambda: len(one.prefill.bodies) == len(one.decode.bodies))
            dispatch = one.prefill.heard(Dispatch)[-1]
            assert dispatch.path == path
            assert dict(dispatch.headers) == {"x-request-id": "r1", "traceparent": "t1"}
            assert one.decode.headers[-1]["x-request-id"] == "r1"
            assert "cookie" not in one.decode.headers[-1]


@in_loop
async def test_a_batch_gets_a_room_and_a_rid_for_each_prompt() -> None:
    async with bench() as one:
        status, _ = await one.generate(text=["a", "b", "c"], rid="mine")
        sent = one.decode.bodies[0]
        assert status == 200
        assert sent["rid"] == ["mine_0", "mine_1", "mine_2"]
        assert len(set(sent["bootstrap_room"])) == 3
        assert sent["bootstrap_port"] == [8998] * 3
        await until(lambda: one.prefill.bodies)
        assert one.prefill.heard(Dispatch)[0].rid == "mine"


@in_loop
async def test_prompt_logprobs_wait_for_the_prefill_side_and_are_merged() -> None:
    async def decode(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"text": "", "meta_info": {"input_token_logprobs": [], "id": body["rid"]}})

    async with bench(prefill=silent, decode=decode) as one:
        asked = asyncio.create_task(one.generate(return_logprob=True, logprob_start_len=0))
        await until(lambda: one.decode.bodies and one.prefill.bodies)
        answer = json.dumps({"meta_info": {"prompt_tokens": 1, "input_token_logprobs": [[-1.5, 3, None]]}})
        await one.prefill.answer(one.prefill.bodies[0]["rid"], 200, answer.encode())
        status, document = await asked
        assert (status, document["meta_info"]["input_token_logprobs"]) == (200, [[-1.5, 3, None]])
