"""The whole router on real sockets, against stand-ins for its workers."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import Any

import aiohttp
import pytest
import zmq
import zmq.asyncio
from aiohttp import web

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.router.config import RouterConfig
from flowprefill_sglang.router.server import Router
from flowprefill_sglang.wire.framing import decode_to_worker, encode
from flowprefill_sglang.wire.messages import PROTOCOL_VERSION, Dispatch, Heartbeat, HelloAgain, Load, Refused, Welcome
from flowprefill_testing.stand_ins import (
    MODEL,
    DecodeStandIn,
    PrefillStandIn,
    bench,
    good_prefill_answer,
    hello,
    in_loop,
    never,
    until,
)

STREAM = "text/event-stream"


def silent(dispatch: Dispatch, body: dict[str, Any]) -> None:
    """A prefill side that never answers by itself."""


async def begin_stream(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """Two events, then nothing."""
    response = web.StreamResponse(headers={"content-type": STREAM})
    await response.prepare(request)
    await response.write(b'data: {"text": "a"}\n\ndata: {"te')
    await asyncio.Event().wait()
    raise AssertionError


# ---- answers -------------------------------------------------------------------------------------------------------


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


# ---- failures ------------------------------------------------------------------------------------------------------


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


@in_loop
async def test_a_failed_prefill_is_a_502_and_decode_is_aborted() -> None:
    async with bench(prefill=silent, decode=never) as one:
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
        one.decode.behave = _say("fine")
        await victim.die()
        status, document = await asked
        assert (status, document["text"]) == (200, "fine")
        await until(lambda: other.bodies)
        assert other.bodies[0]["rid"] == "r_retry1"
        await until(lambda: one.decode.aborted == ["r"])
        assert other.bodies[0]["bootstrap_room"] != victim.bodies[0]["bootstrap_room"]
        await until(one.is_idle)


def _say(text: str) -> Any:
    async def behave(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"text": text})

    return behave


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
        other.behave = _say("fine")
        await victim.die()
        status, document = await asked
        assert (status, document["text"]) == (200, "fine")
        assert one.router.dispatcher.retries == 1


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


# ---- clients that leave, or are slow -------------------------------------------------------------------------------


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


# ---- bad input -----------------------------------------------------------------------------------------------------


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
        one.decode.behave = _say("next")
        one.prefill.behave = lambda dispatch, body: (200, good_prefill_answer(body))
        running.cancel()
        assert (await waiting)[1]["text"] == "next"


# ---- workers -------------------------------------------------------------------------------------------------------


@in_loop
async def test_strangers_on_the_worker_port_do_no_harm() -> None:
    async with bench() as one:
        context = zmq.asyncio.Context()
        stranger = context.socket(zmq.DEALER)
        stranger.connect(one.router.worker_endpoint)
        for frames in ([b"garbage"], [b""], [b"\xc1"], [os.urandom(100)] * 3, [b"x" * 100_000], [b"\x80"]):
            await stranger.send_multipart(frames)
        await stranger.send_multipart(encode(Heartbeat(load=Load(in_flight=0))))
        message, _ = decode_to_worker(await stranger.recv_multipart())
        assert isinstance(message, HelloAgain)
        await stranger.send_multipart(encode(hello("old", protocol=PROTOCOL_VERSION + 1)))
        message, _ = decode_to_worker(await stranger.recv_multipart())
        assert isinstance(message, Refused)
        assert message.protocol == PROTOCOL_VERSION
        context.destroy(linger=0)
        host, port = one.router.worker_endpoint.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(1000))
        assert one.router.dispatcher.links.malformed_messages == 6
        assert (await one.generate())[0] == 200


@in_loop
async def test_workers_find_a_restarted_router_again() -> None:
    decode = await DecodeStandIn().start()
    config = RouterConfig(
        port=0,
        worker_bind="tcp://127.0.0.1:*",
        decode=(decode.url,),
        heartbeat_interval_secs=0.1,
        heartbeat_dead_secs=0.5,
        shutdown_drain_secs=0.0,
    )
    first = Router(config)
    await first.start()
    endpoint = first.worker_endpoint
    worker = await (await PrefillStandIn(endpoint).start()).joined()
    await first.stop()
    second = Router(RouterConfig(port=0, worker_bind=endpoint, decode=(decode.url,), shutdown_drain_secs=0.0))
    await second.start()
    try:
        await until(lambda: len(worker.heard(Welcome)) >= 2)
        await until(second.dispatcher.is_ready)
        async with (
            aiohttp.ClientSession() as client,
            client.post(f"{second.url}/generate", json={"text": "x"}) as answer,
        ):
            assert answer.status == 200
    finally:
        await worker.die()
        await second.stop()
        await decode.die()


@in_loop
async def test_workers_are_listed_added_and_removed() -> None:
    async with bench(decodes=0) as one:
        decode = await DecodeStandIn().start()
        async with one.client.get(f"{one.url}/readiness") as answer:
            assert answer.status == 503
            assert answer.headers["x-flowprefill-dropped-reason"] == "no-endpoints"
        async with one.client.post(f"{one.url}/workers", json={"url": decode.url, "worker_type": "decode"}) as answer:
            assert answer.status == 202
        await until(one.router.dispatcher.is_ready)
        async with one.client.get(f"{one.url}/workers") as answer:
            workers = (await answer.json())["workers"]
        assert [(worker["type"], worker["state"], worker["model"]) for worker in workers] == [
            ("prefill", "ready", MODEL),
            ("decode", "ready", MODEL),
        ]
        async with one.client.delete(f"{one.url}/workers", json={"url": decode.url}) as answer:
            assert answer.status == 200
        async with one.client.delete(f"{one.url}/workers", json={"url": decode.url}) as answer:
            assert answer.status == 404
        assert (await one.generate())[0] == 503
        await decode.die()


@in_loop
async def test_a_decode_of_another_model_or_mode_is_not_paired() -> None:
    async with bench() as one:
        other = await DecodeStandIn(model="other").start()
        prefill = await DecodeStandIn(mode="prefill").start()
        for url in (other.url, prefill.url):
            async with one.client.post(f"{one.url}/workers", json={"url": url}) as answer:
                assert answer.status == 202
        instances = one.router.dispatcher.decodes.registry.instances
        await until(lambda: instances[other.url].state == "ready" and "prefill" in instances[prefill.url].reason)
        assert instances[prefill.url].state == "joining"
        for _ in range(4):
            assert (await one.generate())[0] == 200
        assert (await one.generate(model="other"))[0] == 503
        assert not other.bodies
        await other.die()
        await prefill.die()


@in_loop
async def test_control_endpoints() -> None:
    prefill_http = await DecodeStandIn(mode="prefill").start()
    async with bench(prefills=0) as one:
        worker = await PrefillStandIn(one.router.worker_endpoint, http_url=prefill_http.url).start()
        one.prefills.append(await worker.joined())
        for method, path, status in (
            ("GET", "/health", 200),
            ("GET", "/liveness", 200),
            ("GET", "/readiness", 200),
            ("GET", "/health_generate", 200),
            ("POST", "/flush_cache", 200),
            ("GET", "/get_model_info", 200),
            ("GET", "/get_server_info", 200),
            ("GET", f"/v1/models/{MODEL}", 200),
            ("GET", "/v1/models/other", 404),
            ("GET", "/nothing/here", 404),
            ("GET", "/generate", 405),
            ("GET", "/abort_request", 405),
        ):
            async with one.client.request(method, one.url + path) as answer:
                assert answer.status == status, path
                if status >= 400:
                    assert set((await answer.json())["error"]) == {"message", "type", "param", "code"}
        assert "/flush_cache" in prefill_http.asked
        assert "/flush_cache" in one.decode.asked
    await prefill_http.die()


@in_loop
async def test_a_taken_port_is_said_in_one_line() -> None:
    async with bench() as one:
        port = int(one.url.rpartition(":")[2])
        with pytest.raises(StartupError, match=f"cannot serve on 127.0.0.1:{port}"):
            await Router(RouterConfig(port=port, worker_bind="tcp://127.0.0.1:*")).start()
        with pytest.raises(StartupError, match="cannot listen for prefill workers"):
            await Router(RouterConfig(port=0, worker_bind=one.router.worker_endpoint)).start()


@in_loop
async def test_shutdown_lets_running_requests_end() -> None:
    go_on = asyncio.Event()

    async def wait(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await go_on.wait()
        return web.json_response({"text": "late"})

    async with bench(decode=wait, shutdown_drain_secs=20.0) as one:
        asked = asyncio.create_task(one.generate())
        await until(lambda: one.decode.bodies and one.prefill.bodies)
        stopping = asyncio.create_task(one.router.stop())
        await until(lambda: one.router.dispatcher.closing)
        assert (await one.generate())[0] == 503
        go_on.set()
        assert await asked == (200, {"text": "late"})
        await stopping
