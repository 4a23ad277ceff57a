"""A rolling upgrade on real sockets: a router process, links of workers of several versions, no model."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from flowprefill_sglang.cluster.ports import free_ports
from flowprefill_sglang.prefill_worker.config import WorkerConfig
from flowprefill_sglang.prefill_worker.link import Link
from flowprefill_sglang.wire.messages import SPOKEN
from flowprefill_testing.stand_ins import DecodeStandIn, echo, good_prefill_answer, hello, in_loop

PREFILL_S = 0.05
"""How long an engine computes: so that requests are in flight whenever something happens."""


class Handover:
    """Stands for the KV handoff: the decode side answers a room when the prefill side is done with it."""

    def __init__(self) -> None:
        self.done: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)

    async def decode(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await self.done[body["bootstrap_room"]].wait()
        return await echo(request, body)


class PlainEngine:
    """Answers after a while. ``says`` is what its hello states of versions."""

    def __init__(self, handover: Handover, **says: Any) -> None:
        self.handover = handover
        self.says = says
        self.served = 0

    async def request(self, dispatch, received_at, body, disconnected):
        await asyncio.sleep(PREFILL_S)
        self.served += 1
        document = json.loads(bytes(body))
        self.handover.done[document["bootstrap_room"]].set()
        return 200, "application/json", good_prefill_answer(document)

    def abort(self, rids):
        raise AssertionError("nothing is aborted in an upgrade")

    def is_stopping(self):
        return False

    async def sign_of_life(self, part):
        """It always answers."""

    def is_under_control(self):
        return False

    async def hello(self, config):
        return hello(config.name, incarnation=config.name, **self.says)


@asynccontextmanager
async def router_process(tmp_path: Path, handover: Handover) -> AsyncIterator[tuple[str, str]]:
    """The addresses of a router process's HTTP and worker ports."""
    decode = await DecodeStandIn(handover.decode).start()
    port, worker_port = free_ports(2)
    endpoint, url = f"tcp://127.0.0.1:{worker_port}", f"http://127.0.0.1:{port}"
    words = ["router", "--port", str(port), "--worker-bind", endpoint, "--decode", decode.url]
    with (tmp_path / "router.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "flowprefill_sglang", *words, stderr=log)
    try:
        yield url, endpoint
    finally:
        process.terminate()
        await process.wait()
        await decode.die()


class Cluster:
    """What a person sees of it over HTTP."""

    def __init__(self, client: aiohttp.ClientSession, url: str) -> None:
        self.client, self.url = client, url
        self.answers: Counter[int] = Counter()

    async def workers(self) -> dict[str, Any]:
        async with self.client.get(f"{self.url}/workers") as answer:
            return {worker["name"]: worker for worker in (await answer.json())["workers"]}

    async def until(self, condition: Callable[[dict[str, Any]], Any]) -> None:
        """Fails the test when it does not come true."""
        for _ in range(300):
            try:
                if condition(await self.workers()):
                    return
            except aiohttp.ClientConnectionError:
                pass  # the router is starting
            await asyncio.sleep(0.05)
        raise AssertionError(await self.workers())

    async def load(self, stop: asyncio.Event) -> None:
        """One client that asks again and again."""
        while not stop.is_set():
            async with self.client.post(f"{self.url}/generate", json={"text": "abc"}) as answer:
                await answer.read()
                self.answers[answer.status] += 1


def start(endpoint: str, name: str, engine: PlainEngine) -> asyncio.Task[None]:
    config = WorkerConfig(router=endpoint, name=name, refused_retry_s=0.2)
    return asyncio.create_task(Link(config, engine).run())


@in_loop
async def test_old_and_new_workers_change_places_under_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    newest = SPOKEN.newest
    handover = Handover()
    old = PlainEngine(handover, version="0.1.0", protocol=newest)  # says no range, as workers did before there were any
    new = PlainEngine(handover, version="0.2.0", protocol=newest + 1, oldest_protocol=newest)
    ancient = PlainEngine(handover, version="0.0.1", protocol=SPOKEN.oldest - 1)
    too_new = PlainEngine(handover, version="9.0.0", protocol=newest + 9, oldest_protocol=newest + 8)
    async with router_process(tmp_path, handover) as (url, endpoint), aiohttp.ClientSession() as client:
        cluster = Cluster(client, url)
        links = {"old": start(endpoint, "old", old)}
        await cluster.until(lambda found: {one["state"] for one in found.values()} == {"ready"} and len(found) == 2)
        stop = asyncio.Event()
        clients = [asyncio.create_task(cluster.load(stop)) for _ in range(4)]

        links |= {name: start(endpoint, name, one) for name, one in (("ancient", ancient), ("too-new", too_new))}
        links["new"] = start(endpoint, "new", new)
        await cluster.until(lambda found: "new" in found and new.served > 10)
        seen = await cluster.workers()
        assert {(seen[name]["version"], seen[name]["protocol"]) for name in ("old", "new")} == {
            ("0.1.0", newest),
            ("0.2.0", newest),
        }
        assert not {"ancient", "too-new"} & set(seen)

        async with client.delete(f"{url}/workers", json={"name": "old"}) as answer:
            assert answer.status == 202
        await asyncio.wait_for(links["old"], 10)
        after = old.served
        begun = time.monotonic()
        await cluster.until(lambda found: new.served > 30 and found["old"]["state"] == "dead")
        assert time.monotonic() - begun < 10
        assert old.served == after, "a drained worker gets nothing"
        stop.set()
        await asyncio.gather(*clients)
        assert set(cluster.answers) == {200}, "no request was lost"
        assert old.served + new.served == cluster.answers[200], "nor computed twice"

        async with client.get(f"{url}/metrics") as answer:
            metrics = await answer.text()
        assert 'flowprefill_worker_info{type="prefill",version="0.2.0",worker="new"} 1.0' in metrics
        assert "flowprefill_worker_refusals_total 0.0" not in metrics
        assert not links["ancient"].done(), "it asks on, for the router may be upgraded"
        for link in links.values():
            link.cancel()
        await asyncio.wait(links.values())
    refusals = [record.message for record in caplog.records if "refused by the router" in record.message]
    assert len(refusals) == 2, "each says it once, however often it asks"
    (of_ancient,) = (text for text in refusals if "worker ancient (FlowPrefill 0.0.1)" in text)
    assert of_ancient.endswith("upgrade worker ancient")
    (of_too_new,) = (text for text in refusals if "worker too-new (FlowPrefill 9.0.0)" in text)
    assert of_too_new.endswith("upgrade router")
    assert "worker_refused worker=ancient version=0.0.1" in (tmp_path / "router.log").read_text()
