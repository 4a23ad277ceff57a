"""In-process calls against real Starlette applications."""

import asyncio

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from flowprefill_sglang.prefill_worker.asgi_call import call


async def echo(request: Request) -> JSONResponse:
    document = {"body": (await request.body()).decode(), "key": request.headers.get("authorization")}
    return JSONResponse(document, status_code=201)


async def stream(request: Request) -> StreamingResponse:
    async def parts():
        yield b"data: 1\n\n"
        yield b"data: 2\n\n"

    return StreamingResponse(parts(), media_type="text/event-stream")


async def wait_for_disconnect(request: Request) -> JSONResponse:
    await request.body()
    while not await request.is_disconnected():  # noqa: ASYNC110 - the way SGLang asks
        await asyncio.sleep(0)
    return JSONResponse({"gone": True})


async def stream_then_linger(request: Request) -> StreamingResponse:
    async def parts():
        yield b"data: 1\n\n"

    return StreamingResponse(parts(), background=BackgroundTask(asyncio.Event().wait))


async def fail(request: Request) -> JSONResponse:
    raise ZeroDivisionError("inside the handler")


APP = Starlette(
    routes=[
        Route("/echo", echo, methods=["POST"]),
        Route("/linger", stream_then_linger, methods=["POST"]),
        Route("/stream", stream, methods=["POST"]),
        Route("/wait", wait_for_disconnect, methods=["POST"]),
        Route("/fail", fail, methods=["POST"]),
    ]
)


def post(path: str, body: bytes = b"", headers: tuple = (), disconnected: asyncio.Event | None = None):
    return call(APP, "POST", path, headers, body, disconnected or asyncio.Event())


def test_body_headers_and_status_pass_through() -> None:
    status, content_type, body = asyncio.run(post("/echo", b"hello", (("authorization", "Bearer k"),)))
    assert (status, content_type) == (201, "application/json")
    assert body == b'{"body":"hello","key":"Bearer k"}'


def test_a_memoryview_is_a_body_too() -> None:
    _, _, body = asyncio.run(post("/echo", memoryview(b"hello")))
    assert b'"hello"' in body


def test_a_stream_is_joined() -> None:
    status, content_type, body = asyncio.run(post("/stream"))
    assert status == 200
    assert content_type.startswith("text/event-stream")
    assert body == b"data: 1\n\ndata: 2\n\n"


def test_unknown_path_is_the_applications_404() -> None:
    assert asyncio.run(post("/nothing"))[0] == 404


def test_disconnect_is_seen_by_the_handler() -> None:
    async def scenario() -> bytes:
        disconnected = asyncio.Event()
        task = asyncio.create_task(post("/wait", disconnected=disconnected))
        await asyncio.sleep(0)
        assert not task.done()
        disconnected.set()
        return (await asyncio.wait_for(task, 5))[2]

    assert asyncio.run(scenario()) == b'{"gone":true}'


def test_the_handlers_exception_arrives() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(post("/fail"))


def test_what_the_application_does_after_its_answer_is_not_waited_for() -> None:
    async def scenario() -> bytes:
        return (await asyncio.wait_for(post("/linger"), 5))[2]

    assert asyncio.run(scenario()) == b"data: 1\n\n"


def test_a_cancelled_call_cancels_the_application() -> None:
    ended = []

    async def app(scope, receive, send) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(scope["path"])

    async def scenario() -> None:
        task = asyncio.create_task(call(app, "POST", "/x", (), b"", asyncio.Event()))
        for _ in range(3):  # until the application runs
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert ended == ["/x"]

    asyncio.run(scenario())
