"""The HTTP/1.1 client against servers that behave well and badly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.router.http_client import Headers, Origin
from flowprefill_testing.stand_ins import in_loop, until


class Sink:
    """Collects an answer."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self.body = b""
        self.ends: list[str] = []

    def on_head(self, status: int, headers: Headers) -> None:
        self.status, self.headers = status, headers

    def on_chunk(self, data: bytes) -> None:
        self.body += data

    def on_end(self) -> None:
        self.ends.append("end")

    def on_lost(self, reason: str) -> None:
        self.ends.append(reason)


@asynccontextmanager
async def server(*pieces: bytes, close: bool = False) -> AsyncIterator[tuple[Origin, list[bytes]]]:
    """Sends the pieces, one write each, for every request; gives the requests' heads."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                heads.append(head)
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if close:
                    break
        except (asyncio.IncompleteReadError, ConnectionResetError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    origin = Origin(f"http://127.0.0.1:{port}/base", connect_timeout_s=5)
    try:
        yield origin, heads
    finally:
        origin.close()
        listener.close()


async def ask(origin: Origin) -> Sink:
    sink = Sink()
    connection = origin.take_idle() or await origin.connect()
    origin.send(connection, "/generate", [(b"x-request-id", b"1")], b"{}", sink)
    await until(lambda: sink.ends)
    return sink


@in_loop
async def test_an_answer_and_a_connection_that_is_used_again() -> None:
    async with server(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nX-A: b\r\n\r\nhe", b"llo") as (origin, heads):
        first = await ask(origin)
        assert (first.status, first.body, first.ends) == (200, b"hello", ["end"])
        assert (b"x-a", b"b") in first.headers
        idle = origin.take_idle()
        assert idle is not None
        origin.give_back(idle)
        assert (await ask(origin)).body == b"hello"
        assert origin.take_idle() is idle
        assert heads[0].startswith(b"POST /base/generate HTTP/1.1\r\nhost: 127.0.0.1:")
        assert b"x-request-id: 1\r\n" in heads[0]


@in_loop
async def test_chunked() -> None:
    async with server(
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", b"2\r\nde\r\n0\r\n\r\n"
    ) as (origin, _):
        assert (await ask(origin)).body == b"abcde"


@in_loop
async def test_a_connection_that_the_server_closes_is_not_used_again() -> None:
    async with server(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n") as (origin, _):
        assert (await ask(origin)).ends == ["end"]
        assert origin.take_idle() is None


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ((b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhe",), "closed the connection"),
        ((b"",), "closed the connection"),
        ((b"nonsense\r\n\r\n",), "no HTTP"),
        ((b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000,), "too long"),
    ],
)
def test_broken_answers_are_lost_once(pieces: tuple[bytes, ...], reason: str) -> None:
    @in_loop
    async def scenario() -> None:
        async with server(*pieces, close=True) as (origin, _):
            sink = await ask(origin)
            assert len(sink.ends) == 1
            assert reason in sink.ends[0]

    scenario()


@in_loop
async def test_cancel_is_silent_and_closes() -> None:
    async with server() as (origin, heads):
        sink = Sink()
        connection = await origin.connect()
        origin.send(connection, "/", [], b"{}", sink)
        await until(lambda: heads)
        connection.cancel()
        await until(lambda: not connection.is_open)
        assert sink.ends == []


@in_loop
async def test_nobody_there() -> None:
    async with server() as (origin, _):
        pass
    with pytest.raises(PeerFault, match="cannot be reached"):
        await origin.connect()


@given(st.binary(max_size=2000), st.lists(st.integers(1, 50), max_size=40))
def test_any_split_of_the_bytes_gives_the_same_answer(body: bytes, cuts: list[int]) -> None:
    @in_loop
    async def scenario() -> None:
        raw = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        origin = Origin("http://x", connect_timeout_s=1)
        sink = Sink()
        connection = _Unconnected(origin)
        connection.send(b"", b"", sink)
        start = 0
        for cut in [*cuts, len(raw)]:
            if start < len(raw):
                connection.data_received(raw[start : start + cut])
            start += cut
        assert (sink.body, sink.ends) == (body, ["end"])

    scenario()


def _Unconnected(origin: Origin):  # stands for a class
    from unittest.mock import create_autospec

    from flowprefill_sglang.router.http_client import Connection

    connection = Connection(origin)
    transport = create_autospec(asyncio.Transport, instance=True)
    transport.is_closing.return_value = False
    connection.connection_made(transport)
    return connection
