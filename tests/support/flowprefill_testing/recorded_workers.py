"""A router's list of workers and their timelines, for tests of what reads recordings."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from flowprefill_sglang.observe.events import Event, Outcome, RequestArrived, RequestEnded, TaskFinished, TaskStarted
from flowprefill_sglang.observe.recording import Recording, encode


class RecordedWorkers:
    """Answers for a router and its prefill workers on one port: ``prefill-0`` and so on, each with its events.

    Events are at seconds before now.
    """

    def __init__(self, *events: Sequence[Event], api_key: str | None = None, state: str = "ready") -> None:
        self.events, self.api_key, self.state = events, api_key, state
        self.asked: list[str] = []
        self.url = ""
        self.listing: Any = None

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/workers", self.list_workers)
        router.add_get("/{worker}/flowprefill/timeline", self.timeline)

    async def list_workers(self, request: web.Request) -> web.Response:
        self._require_key(request)
        base = f"http://{request.host}"
        workers = [
            {"name": f"prefill-{n}", "type": "prefill", "url": f"{base}/{n}", "state": self.state}
            for n in range(len(self.events))
        ]
        workers.append({"name": base, "type": "decode", "url": base, "state": "ready"})
        return web.Response(text=json.dumps(self.listing or {"workers": workers}), content_type="application/json")

    async def timeline(self, request: web.Request) -> web.Response:
        self._require_key(request)
        self.asked.append(request.path_qs)
        number = int(request.match_info["worker"])
        unix_now = time.time()
        taken = Recording(
            worker=f"prefill-{number}", monotonic_now=0.0, unix_now=unix_now, events=list(self.events[number])
        )
        return web.Response(body=encode(taken), content_type="application/json")

    def _require_key(self, request: web.Request) -> None:
        if self.api_key is not None and request.headers.get("authorization") != f"Bearer {self.api_key}":
            raise web.HTTPUnauthorized


def one_prefill(rid: str = "r", start_at: float = -0.5, end_at: float = -0.1) -> list[Event]:
    """A request that came, ran and ended."""
    return [
        RequestArrived(
            at=start_at, rid=rid, tokens=100, slo_class="text", received_at=start_at, deadline_at=start_at + 1.0
        ),
        TaskStarted(
            at=start_at,
            task=1,
            rids=[rid],
            new_tokens=100,
            cached_tokens=0,
            predicted_s=0.1,
            deadline_at=start_at + 1.0,
        ),
        TaskFinished(at=end_at, task=1, rids=[rid], new_tokens=100, executed_s=0.4, predicted_s=0.1, preemptions=0),
        RequestEnded(
            at=end_at,
            rid=rid,
            outcome=Outcome.PREFILLED,
            slo_class="text",
            first_token_s=end_at - start_at,
            is_in_time=True,
        ),
    ]


@asynccontextmanager
async def served(workers: RecordedWorkers) -> AsyncIterator[str]:
    """The router's URL."""
    app = web.Application()
    workers.add_routes(app.router)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
