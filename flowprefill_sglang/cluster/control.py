"""The control port of a running pool: status, scaling and logs, on the loopback interface alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from flowprefill_sglang.cluster.pool import Pool
from flowprefill_sglang.errors import BadInput, FlowPrefillError, StartupError

_MOST_LINES = 10_000
_MOST_MEMBERS = 10_000
_FOLLOW_S = 1.0
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Control:
    """Serves a pool's control API at ``url`` from ``start`` to ``stop``. It has no key, so it listens on 127.0.0.1."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        app = web.Application(middlewares=[_errors])
        app.add_routes(
            [
                web.get("/status", self._status),
                web.post("/scale", self._scale),
                web.get("/logs/{name}", self._logs),
                web.get("/prometheus/targets", self._targets),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        self.url = ""

    async def start(self) -> None:
        """Listen on a free port."""
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Close it; a log that is followed ends."""
        await self._runner.cleanup()

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(self._pool.status())

    async def _scale(self, request: web.Request) -> web.Response:
        try:
            document = json.loads(await request.text() or "null")
        except ValueError as error:
            raise BadInput(f"the body is not valid JSON: {error}") from error
        if not isinstance(document, dict) or not document or set(document) - {"prefill", "decode"}:
            raise BadInput('expected {"prefill": N, "decode": M}, of which one may be left out')
        wanted = {**self._pool.status()["desired"], **document}
        for kind, number in wanted.items():
            if type(number) is not int or not 1 <= number <= _MOST_MEMBERS:
                raise BadInput(f"{kind}: expected a whole number from 1 to {_MOST_MEMBERS}, got {json.dumps(number)}")
        await self._pool.scale(wanted["prefill"], wanted["decode"])
        return web.json_response(self._pool.status()["desired"], status=202)

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        name, text = request.match_info["name"], request.query.get("lines", "100")
        if not text.isdecimal() or not 1 <= int(text) <= _MOST_LINES:
            raise BadInput(f"lines: expected a whole number from 1 to {_MOST_LINES}, got {text}")
        shown = await self._pool.logs(name, int(text))
        if request.query.get("follow") not in ("1", "true"):
            return web.Response(text=shown + "\n")
        response = web.StreamResponse(headers={"content-type": "text/plain; charset=utf-8"})
        await response.prepare(request)
        await response.write(f"{shown}\n".encode())
        while True:
            await asyncio.sleep(_FOLLOW_S)
            try:
                now = await self._pool.logs(name, _MOST_LINES)
            except FlowPrefillError:  # between two processes, or removed
                continue
            new = lines_after(shown, now)
            if new:
                await response.write("".join(f"{line}\n" for line in new).encode())
                shown = now

    async def _targets(self, request: web.Request) -> web.Response:
        return web.json_response(self._pool.targets())


def lines_after(before: str, now: str) -> list[str]:
    """The lines of ``now`` that come after ``before``, two ends of one log; all of them where it is another log."""
    old, new = before.splitlines(), now.splitlines()
    if not old:
        return new
    for end in range(len(new), 0, -1):
        known = old[-min(end, len(old)) :]
        if new[end - len(known) : end] == known:
            return new[end:]
    return new


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except FlowPrefillError as error:
        status = 409 if isinstance(error, StartupError) else error.status
        return _error(str(error), status)
    except web.HTTPException as error:
        return _error(f"{request.method} {request.path}: {error.reason}", error.status)


def _error(message: str, status: int) -> web.Response:
    document: dict[str, Any] = {"error": {"message": message}}
    return web.json_response(document, status=status)
