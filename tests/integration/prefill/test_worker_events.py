"""The socket's address between SGLang's processes, and the timeline's endpoint."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from starlette.applications import Starlette

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.integration.prefill.worker_events import published_endpoint, timeline_route
from flowprefill_sglang.observe import recording
from flowprefill_sglang.observe.events import RequestArrived
from flowprefill_sglang.prefill_worker.asgi_call import call
from flowprefill_sglang.prefill_worker.event_feed import EventFeed
from flowprefill_sglang.prefill_worker.reporter import ENVIRONMENT_VARIABLE, from_environment
from flowprefill_testing.stand_ins import in_loop, until


@asynccontextmanager
async def worker() -> AsyncIterator[tuple[EventFeed, dict[str, str]]]:
    environment: dict[str, str] = {}
    with published_endpoint(environment) as endpoint:
        feed = EventFeed(endpoint)
        feed.open()
        try:
            yield feed, environment
        finally:
            feed.close()


async def get(feed: EventFeed, query: str = "") -> tuple[int, bytes]:
    app = Starlette(routes=[timeline_route("w0", feed)])

    async def with_query(scope, receive, send):
        await app(scope | {"query_string": query.encode()}, receive, send)

    status, content_type, body = await call(with_query, "GET", "/flowprefill/timeline", (), b"", asyncio.Event())
    assert content_type == "application/json"
    return status, body


@in_loop
async def test_events_of_another_process_are_on_the_timeline() -> None:
    async with worker() as (feed, environment):
        _, body = await get(feed)
        now = recording.decode(body).monotonic_now
        reporter = from_environment(environment)
        for age_s in (100.0, 30.0, 1.0):
            reporter.record(
                RequestArrived(
                    at=now - age_s, rid=f"{age_s}", tokens=1, slo_class="", received_at=now, deadline_at=float("inf")
                )
            )
        reporter.flush()
        batches = []
        feed.listen(batches.append)
        await until(lambda: batches)
        everything = ["100.0", "30.0", "1.0"]
        for query, expected in (("", everything[1:]), ("seconds=1000", everything), ("seconds=10", everything[2:])):
            status, body = await get(feed, query)
            assert status == 200
            found = recording.decode(body)
            assert [event.rid for event in found.events] == expected
            assert found.worker == "w0"
            assert found.unix_now > 1e9
        reporter.close()


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan"])
@in_loop
async def test_nonsense_is_refused(seconds: str) -> None:
    async with worker() as (feed, _):
        status, body = await get(feed, f"seconds={seconds}")
        assert status == 400
        assert "seconds must be a number above 0" in json.loads(body)["error"]["message"]


def test_the_socket_is_this_users_and_does_not_outlive_the_worker() -> None:
    environment: dict[str, str] = {}
    with published_endpoint(environment) as endpoint:
        socket = Path(endpoint.removeprefix("ipc://"))
        assert environment == {ENVIRONMENT_VARIABLE: endpoint}
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        socket.touch()
    assert not socket.parent.exists()
    assert environment == {}


def test_a_folder_that_no_socket_fits_in_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(StartupError, match="set TMPDIR to a shorter one"), published_endpoint({}):
        pass
    assert list(deep.iterdir()) == []
