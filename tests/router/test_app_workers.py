"""The whole router on real sockets: workers that come and go, control endpoints, start and end."""

from __future__ import annotations

import asyncio
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
from flowprefill_sglang.wire.messages import PROTOCOL_VERSION, Heartbeat, HelloAgain, Load, Refused, Welcome
from flowprefill_testing.stand_ins import (
    MODEL,
    DecodeStandIn,
    PrefillStandIn,
    bench,
    hello,
    in_loop,
    until,
)


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
        assert [worker["version"] for worker in workers] == ["test", "stand-in"]
        assert workers[0]["protocol"] == PROTOCOL_VERSION
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
