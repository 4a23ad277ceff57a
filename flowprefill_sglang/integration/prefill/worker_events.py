"""The way of a worker's scheduler events through SGLang: the socket between its processes, and the timeline's endpoint
on its HTTP application."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, Final

import msgspec
import zmq
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flowprefill_sglang.errors import BadInput, StartupError
from flowprefill_sglang.observe import recording
from flowprefill_sglang.prefill_worker.event_feed import EventFeed
from flowprefill_sglang.prefill_worker.reporter import ENVIRONMENT_VARIABLE

TIMELINE_PATH: Final = "/flowprefill/timeline"
DEFAULT_SECONDS: Final = 60.0


@contextmanager
def published_endpoint(environment: MutableMapping[str, str] = os.environ) -> Iterator[str]:
    """A socket address for events, in the environment of the processes that are started within this block.

    In a folder that only this user may enter, unlike the abstract addresses that Linux offers, and which is removed at
    the end. Raises StartupError where no such address can be.
    """
    with tempfile.TemporaryDirectory(prefix="flowprefill-") as folder:
        path = f"{folder}/events"
        if len(os.fsencode(path)) > zmq.IPC_PATH_MAX_LEN:
            raise StartupError(
                f"{path} is too long for a socket's name, which is at most {zmq.IPC_PATH_MAX_LEN} bytes; "
                f"set TMPDIR to a shorter one"
            )
        environment[ENVIRONMENT_VARIABLE] = f"ipc://{path}"
        try:
            yield environment[ENVIRONMENT_VARIABLE]
        finally:
            environment.pop(ENVIRONMENT_VARIABLE, None)


def count_metrics(feed: EventFeed, environment: Mapping[str, str] = os.environ) -> None:
    """Turn the feed's events into metrics on SGLang's ``/metrics``, if it has any (``--enable-metrics``).

    To be called once SGLang's server runs: before, prometheus_client may not be imported (``prefill_worker.metrics``).
    """
    if environment.get("PROMETHEUS_MULTIPROC_DIR"):
        from flowprefill_sglang.prefill_worker.metrics import SchedulerMetrics

        feed.listen(SchedulerMetrics().count)


def timeline_route(worker: str, feed: EventFeed) -> Route:
    """``GET /flowprefill/timeline?seconds=S``: what the worker remembers of the last S seconds, as an
    ``observe.recording.Recording`` in JSON. As any other of SGLang's routes it asks for the API key if there is one."""

    async def timeline(request: Request) -> Response:
        try:
            seconds = _seconds(request.query_params.get("seconds"))
        except BadInput as error:
            return _json({"error": {"message": str(error), "type": error.code, "param": "seconds", "code": 400}}, 400)
        found = await feed.recording(worker, seconds=seconds, monotonic_now=time.monotonic(), unix_now=time.time())
        return Response(recording.encode(found), media_type="application/json")

    return Route(TIMELINE_PATH, timeline, methods=["GET"])


def _seconds(text: str | None) -> float:
    try:
        seconds = DEFAULT_SECONDS if text is None else float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise BadInput(f"seconds must be a number above 0, got {text!r:.100}")
    return seconds


def _json(document: Any, status: int) -> Response:  # a JSON document
    return Response(msgspec.json.encode(document), status_code=status, media_type="application/json")
