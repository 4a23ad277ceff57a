"""The load client against a small server whose handlers are held back and released by the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from flowprefill_sglang.bench.client import PlannedRequest, RequestRecord, replay
from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.objectives import unscaled_objectives
from flowprefill_sglang.bench.plan import plan_requests
from flowprefill_sglang.workload.trace import TraceRequest

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/generate", handler)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def run(handler: Handler, plan: list[PlannedRequest], **options: object) -> list[RequestRecord]:
    async def main() -> list[RequestRecord]:
        async with served(handler) as url, asyncio.timeout(60):
            return await replay(url, plan, **options)

    return asyncio.run(main())


def plan(*arrivals_s: float, tokens: int = 2) -> list[PlannedRequest]:
    rows = [TraceRequest(arrival_s=a, input_tokens=9, output_tokens=tokens, class_name="text") for a in arrivals_s]
    return plan_requests(
        rows, run_id="r", seed=0, endpoint=ENDPOINTS["generate"], model="m", objectives=unscaled_objectives()
    )


def event(text: str, tokens: int) -> bytes:
    return b"data: " + json.dumps({"text": text, "meta_info": {"completion_tokens": tokens}}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def start(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    return response


async def answer(request: web.Request) -> web.StreamResponse:
    response = await start(request)
    await response.write(event("a", 1) + event("ab", 2) + DONE)
    return response


def test_every_request_arrives_once_with_what_was_planned() -> None:
    seen: list[tuple[dict, str | None]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append((await request.json(), request.headers.get("x-sgl-ttft-slo-ms")))
        return await answer(request)

    reported: list[RequestRecord] = []
    records = run(handler, plan(0.02, 0, 0.01), on_record=reported.append)
    assert [r.rid for r in records] == ["r-0", "r-1", "r-2"]
    assert [body["rid"] for body, _ in seen] == ["r-1", "r-2", "r-0"]
    assert sorted(reported, key=lambda r: r.rid) == records
    for body, slo_ms in seen:
        assert body["sampling_params"] == {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}
        assert len(body["text"]) == 8
        assert slo_ms == "250.000"
    for record in records:
        assert (record.error, record.status, record.output_tokens, record.output_chars) == (None, 200, 2, 2)
        assert record.scheduled_at <= record.sent_at <= record.first_token_at <= record.finished_at
        assert record.late_s >= 0


def test_ttft_ends_at_the_first_token_not_at_headers_or_at_the_end() -> None:
    looks = 0

    def clock() -> float:  # each look at the clock is one second later: order becomes time
        nonlocal looks
        looks += 1
        return float(looks)

    async def until_the_client_looked(count: int) -> None:
        while looks < count:  # noqa: ASYNC110 - the clock is the client's only sign of life
            await asyncio.sleep(0.001)

    async def main() -> RequestRecord:
        may_send_token, may_end = asyncio.Event(), asyncio.Event()

        async def handler(request: web.Request) -> web.StreamResponse:
            response = await start(request)
            await response.write(b": a comment\n\n" + event("", 0))
            await may_send_token.wait()
            await response.write(event("a", 1))
            await may_end.wait()
            await response.write(event("ab", 2) + DONE)
            return response

        async with served(handler) as url, asyncio.timeout(60):
            task = asyncio.create_task(replay(url, plan(0), clock=clock))
            await until_the_client_looked(4)  # start, pacing, sending, first bytes
            released_at = clock()
            may_send_token.set()
            await until_the_client_looked(int(released_at) + 1)
            ending_at = clock()
            may_end.set()
            (record,) = await task
            started_at = 1.0
            assert record.first_token_at is not None
            assert released_at < started_at + record.first_token_at < ending_at < started_at + record.finished_at
            return record

    assert asyncio.run(main()).error is None


def test_arrivals_do_not_wait_for_answers() -> None:
    """No answer is given before the last request has arrived: a closed loop would never end."""
    arrived: list[str] = []
    all_arrived = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        arrived.append((await request.json())["rid"])
        if len(arrived) == 20:
            all_arrived.set()
        await all_arrived.wait()
        return await answer(request)

    records = run(handler, plan(*(i / 1_000 for i in range(20))))
    assert all(r.error is None for r in records)
    assert len(set(arrived)) == 20


def test_a_late_client_says_so() -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.5  # a machine so slow that each look at the clock takes half a second
        return now

    records = run(answer, plan(0, 0.1, 0.2), clock=clock)
    assert all(r.late_s >= 0.3 for r in records)
    assert records[2].late_s > records[0].late_s


async def refuse(request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "queue is full"}}, status=429)


async def disconnect(request: web.Request) -> web.StreamResponse:
    response = await start(request)
    await response.write(event("a", 1))
    request.transport.abort()
    return response


async def stop_early(request: web.Request) -> web.StreamResponse:
    response = await start(request)
    await response.write(event("a", 1))
    return response


async def hang(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize(
    ("handler", "status", "expected", "has_first_token"),
    [
        (refuse, 429, "HTTP 429: ", False),
        (refuse, 429, "queue is full", False),
        (disconnect, 200, "Client", True),
        (stop_early, 200, "before [DONE]", True),
        (hang, 0, "no complete answer within 0.2 s", False),
    ],
)
def test_failures_are_recorded(handler: Handler, status: int, expected: str, has_first_token: bool) -> None:
    (record,) = run(handler, plan(0), timeout_s=0.2 if handler is hang else 30)
    assert record.status == status
    assert expected in (record.error or "")
    assert (record.first_token_at is not None) == has_first_token


def test_nobody_listens() -> None:
    async def main() -> list[RequestRecord]:
        async with served(answer) as url:
            pass
        return await replay(url, plan(0, 0))

    for record in asyncio.run(main()):
        assert record.status == 0
        assert "Connect" in (record.error or "")


def test_beyond_its_bound_the_client_fails_requests_instead_of_delaying_them() -> None:
    async def main() -> list[RequestRecord]:
        refused = asyncio.Event()

        async def handler(request: web.Request) -> web.StreamResponse:
            await refused.wait()
            return await answer(request)

        def note(record: RequestRecord) -> None:
            if record.error is not None:
                refused.set()

        async with served(handler) as url, asyncio.timeout(60):
            return await replay(url, plan(0, 0, 0.01), max_in_flight=2, on_record=note)

    records = asyncio.run(main())
    assert [r.error for r in records[:2]] == [None, None]
    assert "2 requests of this client were in flight" in (records[2].error or "")


def test_cancelling_closes_every_connection() -> None:
    async def main() -> int:
        working, cancelled, all_working = 0, 0, asyncio.Event()
        all_cancelled = asyncio.Event()

        async def handler(request: web.Request) -> web.StreamResponse:
            nonlocal working, cancelled
            working += 1
            if working == 3:
                all_working.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled += 1
                if cancelled == 3:
                    all_cancelled.set()
                raise
            raise AssertionError

        async with served(handler) as url, asyncio.timeout(60):
            task = asyncio.create_task(replay(url, plan(0, 0, 0, 1_000)))
            await all_working.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert {t for t in asyncio.all_tasks() if "replay" in repr(t)} == set()
            await all_cancelled.wait()
        return cancelled

    assert asyncio.run(main()) == 3


@settings(max_examples=15)
@given(st.lists(st.tuples(st.floats(0, 0.02), st.sampled_from(["answer", "refuse", "disconnect"])), max_size=8))
def test_each_row_yields_exactly_one_record(rows: list[tuple[float, str]]) -> None:
    handlers = {"answer": answer, "refuse": refuse, "disconnect": disconnect}

    async def handler(request: web.Request) -> web.StreamResponse:
        row = int((await request.json())["rid"].removeprefix("r-"))
        return await handlers[rows[row][1]](request)

    records = run(handler, plan(*(arrival for arrival, _ in rows)))
    assert [r.rid for r in records] == [f"r-{i}" for i in range(len(rows))]
    assert [r.error is None for r in records] == [kind == "answer" for _, kind in rows]
