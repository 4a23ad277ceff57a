"""Everything but the requests themselves: health, models, workers, and what goes to all workers at once."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import aiohttp
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from flowprefill_sglang import __version__
from flowprefill_sglang.errors import BadInput, FlowPrefillError
from flowprefill_sglang.router.answers import Refusal, dropped, error_document
from flowprefill_sglang.router.config import check_url
from flowprefill_sglang.router.dispatcher import Dispatcher
from flowprefill_sglang.router.log import event
from flowprefill_sglang.router.states import WorkerState

log = logging.getLogger(__name__)

CONTROL_TIMEOUT_S: Final = 60.0
MAX_CONTROL_BODY_BYTES: Final = 1 << 20


def control_app(dispatcher: Dispatcher, more: Sequence[Route] = ()) -> Starlette:
    """The application for all paths that are not dispatched, with ``more`` of them."""
    control = _Control(dispatcher)
    both = ["GET", "POST"]
    routes = [
        *more,
        Route("/health", control.health),
        Route("/liveness", control.health),
        Route("/readiness", control.readiness),
        Route("/health_generate", control.health_generate),
        Route("/v1/models", control.models),
        Route("/v1/models/{name:path}", control.model),
        Route("/model_info", control.model_info),
        Route("/get_model_info", control.model_info),
        Route("/server_info", control.server_info),
        Route("/get_server_info", control.server_info),
        Route("/workers", control.workers, methods=["GET"]),
        Route("/workers", control.add_worker, methods=["POST"]),
        Route("/workers", control.remove_worker, methods=["DELETE"]),
        Route("/abort_request", control.abort_request, methods=["POST"]),
        *(Route(path, control.to_all, methods=both) for path in ("/flush_cache", "/start_profile", "/stop_profile")),
    ]
    # Starlette types its handlers for Exception; each of these is only called for its own class.
    handlers: Any = {FlowPrefillError: _answer_error, HTTPException: _answer_http_error}
    return Starlette(routes=routes, exception_handlers=handlers)


class _Control:
    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    # ---- health ----------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        return Response()

    async def readiness(self, request: Request) -> Response:
        if not self._dispatcher.is_ready():
            raise self._no_workers()
        return Response()

    async def health_generate(self, request: Request) -> Response:
        """Every ready worker generates a token; well when at least one prefill worker and one decode instance can."""
        prefills = [worker.hello.http_url for worker in self._dispatcher.links.registry.ready()]
        decodes = [instance.url for instance in self._dispatcher.decodes.registry.ready()]
        answers = await asyncio.gather(*(self._ask(url, "GET", "/health_generate") for url in [*prefills, *decodes]))
        good = [status == 200 for status, _ in answers]
        if any(good[: len(prefills)]) and any(good[len(prefills) :]):
            return Response()
        raise dropped("no pair of workers could generate a token", status=503, reason="no-endpoints")

    # ---- models ----------------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": list(self._cards().values())})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        card = self._cards().get(name)
        if card is None:
            raise Refusal(f"the model {name!r} is not served here", status=404, code="model_not_found")
        return _json(card)

    async def model_info(self, request: Request) -> Response:
        return await self._from_decode("/model_info")

    async def server_info(self, request: Request) -> Response:
        dispatcher = self._dispatcher
        answer = await self._from_decode("/server_info")
        if answer.status_code != 200:
            return answer
        own = {
            "version": __version__,
            "outcomes": dict(dispatcher.metrics.outcomes),
            "retries": dispatcher.retries,
            "running": dispatcher.admission.inside,
            "waiting": dispatcher.admission.waiting,
            "malformed_messages": dispatcher.links.malformed_messages,
        }
        return _json({**json.loads(bytes(answer.body)), "flowprefill_router": own})

    # ---- workers ---------------------------------------------------------------------------------------------------

    async def workers(self, request: Request) -> Response:
        return _json(workers_document(self._dispatcher))

    async def add_worker(self, request: Request) -> Response:
        fields = await _object(request)
        if fields.get("worker_type", "decode") != "decode":
            raise BadInput("only decode instances are added by URL; prefill workers connect to the router themselves")
        url = _url(fields.get("url"))
        self._dispatcher.decodes.add(url)
        return _json({"url": url, "worker_type": "decode", "status": "accepted"}, status=202)

    async def remove_worker(self, request: Request) -> Response:
        """A decode instance by its URL is forgotten; a prefill worker by its name is asked to drain."""
        fields = dict(request.query_params) or await _object(request)
        if (name := fields.get("name")) is not None:
            if name not in self._dispatcher.links.registry.workers:
                raise Refusal(f"no prefill worker is called {name!r}", status=404, code="worker_not_found")
            self._dispatcher.links.drain(name)
            return _json({"name": name, "worker_type": "prefill", "status": "draining"}, status=202)
        url = _url(fields.get("url"))
        if not self._dispatcher.decodes.remove(url):
            raise Refusal(f"no decode instance has the URL {url}", status=404, code="worker_not_found")
        return _json({"url": url, "worker_type": "decode", "status": "removed"})

    # ---- requests that are running, and all workers at once --------------------------------------------------------

    async def abort_request(self, request: Request) -> Response:
        fields = await _object(request)
        rid, everything = fields.get("rid") or "", fields.get("abort_all", False) is True
        if not isinstance(rid, str):
            raise BadInput("rid must be a string")
        count = self._dispatcher.abort(rid, everything=everything)
        event(log, logging.INFO, "abort_request", rid=rid, abort_all=everything, count=count)
        return Response()

    async def to_all(self, request: Request) -> Response:
        """SGLang's own control endpoints, sent to every worker; well when all say so."""
        body = await _limited_body(request)
        query = f"?{request.url.query}" if request.url.query else ""
        urls = self._urls()
        path = request.url.path
        answers = await asyncio.gather(*(self._ask(url, "POST", path + query, body) for url in urls))
        lines = [f"{url}: {status} {text}" for url, (status, text) in zip(urls, answers, strict=True)]
        statuses = [status for status, _ in answers]
        if not urls:
            raise self._no_workers()
        return PlainTextResponse("\n".join(lines) + "\n", status_code=max(statuses) if max(statuses) >= 400 else 200)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _urls(self) -> list[str]:
        dispatcher = self._dispatcher
        return [
            *(worker.hello.http_url for worker in dispatcher.links.registry.ready()),
            *(instance.url for instance in dispatcher.decodes.registry.ready()),
        ]

    def _cards(self) -> dict[str, dict[str, Any]]:
        ready = self._dispatcher.decodes.registry.ready()
        return {card["id"]: card for instance in ready if instance.facts for card in instance.facts.cards}

    async def _from_decode(self, path: str) -> Response:
        """A decode instance's own answer; the first that gives one."""
        for instance in self._dispatcher.decodes.registry.ready():
            status, text = await self._ask(instance.url, "GET", path)
            if status < 500:
                return Response(text, status_code=status, media_type="application/json")
        raise self._no_workers()

    async def _ask(self, url: str, method: str, path: str, body: bytes = b"") -> tuple[int, str]:
        """Status and text of one worker's answer; 502 when there is none."""
        try:
            async with self._dispatcher.decodes.session.request(
                method,
                url + path,
                data=body or None,
                headers={"content-type": "application/json"} if body else None,
                timeout=aiohttp.ClientTimeout(total=CONTROL_TIMEOUT_S),
            ) as answer:
                return answer.status, (await answer.text()).strip()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return 502, str(error) or type(error).__name__

    def _no_workers(self) -> Refusal:
        if self._dispatcher.closing:
            return dropped("this router is shutting down", status=503, reason="no-endpoints")
        return dropped(self._dispatcher.why_no_pair(None), status=503, reason="no-endpoints", retry_after_s=1)


def workers_document(dispatcher: Dispatcher) -> dict[str, Any]:
    """What ``GET /workers`` answers."""
    prefills = [
        {
            "name": worker.name,
            "type": "prefill",
            "url": worker.hello.http_url,
            "model": worker.hello.model,
            "state": worker.state,
            "in_flight": len(worker.assigned),
            "phases": Counter(one.phase or "sent" for one in worker.assigned.values()),
            "outstanding_tokens": worker.outstanding_tokens,
            "dispatched_total": worker.dispatched_total,
            "silent_s": worker.load.silent_s if worker.load else 0.0,
            "version": worker.hello.version,
            "protocol": worker.protocol,
            "transfer_backend": worker.hello.transfer_backend,
            "bootstrap": f"{worker.hello.bootstrap_host}:{worker.hello.bootstrap_port}",
            "limits": msgspec.to_builtins(worker.hello.limits),
            "reason": worker.reason,
        }
        for worker in dispatcher.links.registry.workers.values()
    ]
    decodes = [
        {
            "name": instance.url,
            "type": "decode",
            "url": instance.url,
            "model": instance.facts.model if instance.facts else None,
            "state": instance.state,
            "in_flight": instance.in_flight,
            "outstanding_tokens": instance.outstanding_tokens,
            "dispatched_total": instance.dispatched_total,
            "version": instance.facts.version if instance.facts else None,
            "transfer_backend": instance.facts.transfer_backend if instance.facts else None,
            "reason": instance.reason,
        }
        for instance in dispatcher.decodes.registry.instances.values()
    ]
    workers = [*prefills, *decodes]
    ready = {
        kind: sum(one["state"] is WorkerState.READY for one in some)
        for kind, some in (("prefill", prefills), ("decode", decodes))
    }
    return {"workers": workers, "total": len(workers), "ready": ready}


async def _limited_body(request: Request) -> bytes:
    chunks, length = [], 0
    async for chunk in request.stream():
        length += len(chunk)
        if length > MAX_CONTROL_BODY_BYTES:
            raise BadInput("the body is too long", status=413, code="body_too_large")
        chunks.append(chunk)
    return b"".join(chunks)


async def _object(request: Request) -> dict[str, Any]:
    try:
        document = json.loads(await _limited_body(request) or b"{}")
    except ValueError as error:
        raise BadInput(f"the body is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadInput("the body must be a JSON object")
    return document


def _url(value: object) -> str:
    if not isinstance(value, str):
        raise BadInput("url must be a string: the decode instance's http://HOST:PORT")
    return check_url(value)


def _json(document: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(document), status_code=status, media_type="application/json")


async def _answer_error(request: Request, error: FlowPrefillError) -> Response:
    extra = error.headers if isinstance(error, Refusal) else ()
    response = _json(error_document(error), error.status)
    response.raw_headers.extend(extra)
    return response


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    path = request.url.path
    if error.status_code == 404:
        refusal = Refusal(f"the router has no {path}", status=404, code="not_found")
    else:
        refusal = Refusal(f"{path}: {error.detail}", status=error.status_code, code="method_not_allowed")
    response = await _answer_error(request, refusal)
    response.headers.update(error.headers or {})
    return response
