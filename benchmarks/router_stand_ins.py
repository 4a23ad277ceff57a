"""What the router benchmarks share: the cheapest possible workers, and the router as a process of its own.

The prefill stand-in speaks the real protocol over ZeroMQ; the decode stand-in is a bare asyncio protocol. Both run in
one process of their own, so that the router is the only thing on its core where there are two.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import uvloop
import zmq

from flowprefill_sglang.router.config import RouterConfig
from flowprefill_sglang.router.server import run
from flowprefill_sglang.wire.framing import Buffer, decode_to_worker, encode
from flowprefill_sglang.wire.messages import (
    PROTOCOL_VERSION,
    Answer,
    Dispatch,
    Heartbeat,
    Hello,
    HelloAgain,
    Limits,
    Load,
    Phase,
    Progress,
)
from flowprefill_sglang.wire.socket import EventSocket

MODEL = "echo"
BODY = b'{"text": "%b", "sampling_params": {"max_new_tokens": 16, "temperature": 0}}'
_ANSWER = json.dumps(
    {
        "text": "x" * 64,
        "output_ids": [1] * 16,
        "meta_info": {"id": "0" * 32, "prompt_tokens": 500, "completion_tokens": 16},
    }
).encode()


def request_bytes(path: str, body: bytes) -> bytes:
    """One keep-alive POST."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _http(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


_DOCUMENTS = {
    b"/model_info": {"disaggregation_mode": "decode", "model_path": "/echo"},
    b"/server_info": {"disaggregation_transfer_backend": "zmq"},
    b"/v1/models": {"object": "list", "data": [{"id": MODEL, "object": "model", "parent": None}]},
}
_ANSWERS = {path: _http(json.dumps(document).encode()) for path, document in _DOCUMENTS.items()}
_GENERATED = _http(_ANSWER)
_EMPTY = _http(b"")


class DecodeStandIn(asyncio.Protocol):
    """Answers each request when its body is complete."""

    def __init__(self) -> None:
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        buffer = self.buffer + data if self.buffer else data
        while (end := buffer.find(b"\r\n\r\n")) >= 0:
            head = buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r", 1)[0]) if at >= 0 else 0
            if len(buffer) < end + 4 + length:
                break
            path = buffer.split(b" ", 2)[1]
            answer = _GENERATED if path == b"/generate" else _ANSWERS.get(path, _EMPTY)
            self.transport.write(answer)  # type: ignore[attr-defined]  # a TCP transport
            buffer = buffer[end + 4 + length :]
        self.buffer = buffer


class PrefillStandIn:
    """Reports progress and answers, for each dispatch."""

    def __init__(self, endpoint: str) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        raw = context.socket(zmq.DEALER)
        raw.connect(endpoint)
        self._socket = EventSocket(raw, self._on_frames)
        self._hello = Hello(
            protocol=PROTOCOL_VERSION,
            name="echo",
            incarnation="1",
            version="0",
            model=MODEL,
            http_url="http://127.0.0.1:1",
            bootstrap_host="127.0.0.1",
            bootstrap_port=1,
            transfer_backend="zmq",
            limits=Limits(max_context_tokens=131072, max_kv_tokens=10**6, page_tokens=16, max_running_requests=4096),
        )
        self._say(encode(self._hello))
        self._beat()

    def _beat(self) -> None:
        self._say(encode(Heartbeat(load=Load(in_flight=1))))
        asyncio.get_running_loop().call_later(1.0, self._beat)

    def _say(self, frames: Sequence[Buffer]) -> None:
        self._socket.try_send(frames)

    def _on_frames(self, frames: list[bytes]) -> None:
        message, _ = decode_to_worker(frames)
        if isinstance(message, Dispatch):
            for phase in (Phase.QUEUED, Phase.STARTED, Phase.FINISHED):
                self._say(encode(Progress(rid=message.rid, phase=phase)))
            self._say(encode(Answer(rid=message.rid, status=200), _ANSWER))
        elif isinstance(message, HelloAgain):
            self._say(encode(self._hello))


def _serve_stand_ins(decode_port: int, worker_endpoint: str, core: int | None) -> None:
    _pin(core)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(DecodeStandIn, "127.0.0.1", decode_port, backlog=1024)
        _ = PrefillStandIn(worker_endpoint)
        await server.serve_forever()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


def _serve_router(config: RouterConfig, core: int | None) -> None:
    _pin(core)
    sys.exit(run(config))


def _pin(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})


class StandIns:
    """The router and its stand-ins as processes; a context manager. The router gets a core of its own."""

    def __init__(self, *, first_port: int) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self.router_core = cores[0] if len(cores) > 1 else None
        self.other_core = cores[1] if len(cores) > 1 else None
        self.router = ("127.0.0.1", first_port)
        self.decode = ("127.0.0.1", first_port + 1)
        endpoint = f"tcp://127.0.0.1:{first_port + 2}"
        config = RouterConfig(
            port=first_port,
            worker_bind=endpoint,
            decode=(f"http://127.0.0.1:{first_port + 1}",),
            log_level="warning",
        )
        context = multiprocessing.get_context("spawn")
        self._processes = [
            context.Process(target=_serve_stand_ins, args=(first_port + 1, endpoint, self.other_core)),
            context.Process(target=_serve_router, args=(config, self.router_core)),
        ]

    def __enter__(self) -> StandIns:
        for process in self._processes:
            process.start()
        deadline = time.monotonic() + 30
        while not self._is_ready():
            if time.monotonic() > deadline:
                self.__exit__()
                raise TimeoutError("the router is not ready")
            time.sleep(0.05)
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
            process.join(timeout=10)

    @property
    def router_pid(self) -> int:
        pid = self._processes[1].pid
        assert pid is not None
        return pid

    def router_cpu_s(self) -> float:
        """CPU time of the router's process until now."""
        fields = Path(f"/proc/{self.router_pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def router_rss_bytes(self) -> int:
        """Resident memory of the router's process."""
        pages = int(Path(f"/proc/{self.router_pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.router[0]}:{self.router[1]}/readiness", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
