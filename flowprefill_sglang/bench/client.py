"""Open-loop load: requests leave at their time, whatever became of those before them.

Runs on one asyncio event loop. One task paces; each request is a task of its own; all of them end before ``replay``
returns or raises. TTFT is measured when the bytes of the first token arrive. The client records its own lateness: when
its machine could not keep up, the load was not the one asked for, and a report should say so.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import aiohttp

from flowprefill_sglang.bench.endpoints import AnswerReader, Endpoint
from flowprefill_sglang.bench.sse import SseDecoder

SLO_HEADER = "x-sgl-ttft-slo-ms"
CLASS_HEADER = "x-slo-class"
Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRequest:
    """A request, ready to be sent: bodies are made before the load starts, so that making them delays nothing."""

    rid: str
    class_name: str
    at_s: float
    """When to send it, after the start of the replay."""
    input_tokens: int
    output_tokens: int
    endpoint: Endpoint
    body: bytes
    slo_ms: float | None = None
    """TTFT objective, told to the server in a header, as is the class then; None sends neither."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecord:
    """What became of a request. Points in time are seconds after the start of the replay."""

    rid: str
    class_name: str
    input_tokens: int
    output_tokens: int
    scheduled_at: float
    sent_at: float
    first_token_at: float | None
    """When the first bytes with a token arrived; None if none did."""
    finished_at: float
    status: int
    """HTTP status; 0 without an answer."""
    error: str | None
    """None for a complete answer."""
    output_chars: int
    output_sha256: str
    """Digest of the answer's text: two runs of the same greedy requests can be compared without keeping the texts."""

    @property
    def ttft_s(self) -> float | None:
        """From sending the request to the first token."""
        return None if self.first_token_at is None else self.first_token_at - self.sent_at

    @property
    def late_s(self) -> float:
        """How much later than planned the client sent it."""
        return self.sent_at - self.scheduled_at


async def replay(
    url: str,
    plan: Sequence[PlannedRequest],
    *,
    timeout_s: float = 600.0,
    max_in_flight: int = 8_192,
    on_record: Callable[[RequestRecord], None] | None = None,
    headers: Mapping[str, str] | None = None,
    clock: Clock = time.perf_counter,
    started_at: float | None = None,
) -> list[RequestRecord]:
    """Send every planned request to the server at ``url`` and return one record each, in the plan's order.

    ``timeout_s`` bounds each request. A request that would be in flight beside ``max_in_flight`` others is not sent and
    recorded as an error: waiting would turn open-loop load into closed-loop load. Cancelling this coroutine closes
    every connection before it ends, so that the server can abort what it works on. ``headers`` go with every request.
    ``started_at`` is the zero of the records' times, a reading of ``clock``; default: now.
    """
    in_flight: set[asyncio.Task[None]] = set()
    ended: dict[int, RequestRecord] = {}

    def keep(row: int, record: RequestRecord) -> None:
        ended[row] = record
        if on_record is not None:
            on_record(record)

    async def send(row: int) -> None:
        keep(row, await _send(session, plan[row], lambda: clock() - zero_at))

    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(30.0, timeout_s))
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url.rstrip("/"), timeout=timeout, connector=connector, headers=headers) as session:
        zero_at = clock() if started_at is None else started_at
        try:
            for row in sorted(range(len(plan)), key=lambda row: plan[row].at_s):
                await asyncio.sleep(max(0.0, plan[row].at_s - (clock() - zero_at)))
                if len(in_flight) >= max_in_flight:
                    keep(row, _not_sent(plan[row], clock() - zero_at, max_in_flight))
                    continue
                task = asyncio.create_task(send(row))
                in_flight.add(task)
                task.add_done_callback(in_flight.discard)
            await asyncio.gather(*in_flight)
        finally:
            left = list(in_flight)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
    return [ended[row] for row in range(len(plan))]


async def _send(session: aiohttp.ClientSession, planned: PlannedRequest, now: Clock) -> RequestRecord:
    reader = AnswerReader(planned.endpoint, planned.output_tokens)
    sent_at, first_token_at, status, error = now(), None, 0, None
    headers = {"content-type": "application/json"}
    if planned.slo_ms is not None:
        headers[SLO_HEADER] = f"{planned.slo_ms:.3f}"
        headers[CLASS_HEADER] = planned.class_name
    try:
        async with session.post(planned.endpoint.path, data=planned.body, headers=headers) as response:
            status = response.status
            if status != 200:
                error = f"HTTP {status}: {(await response.text(errors='replace'))[:500]}"
            else:
                decoder = SseDecoder()
                async for chunk in response.content.iter_any():
                    arrived_at = now()
                    for data in decoder.feed(chunk):
                        reader.read(data)
                    if first_token_at is None and reader.has_token:
                        first_token_at = arrived_at
                error = reader.error()
    except TimeoutError as failure:
        error = f"no complete answer within {session.timeout.total:g} s {failure}".rstrip()
    except (aiohttp.ClientError, OSError, ValueError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    return RequestRecord(
        rid=planned.rid,
        class_name=planned.class_name,
        input_tokens=planned.input_tokens,
        output_tokens=reader.output_tokens or 0,
        scheduled_at=planned.at_s,
        sent_at=sent_at,
        first_token_at=first_token_at,
        finished_at=now(),
        status=status,
        error=error,
        output_chars=len(reader.text),
        output_sha256=hashlib.sha256(reader.text.encode()).hexdigest(),
    )


def _not_sent(planned: PlannedRequest, now_s: float, limit: int) -> RequestRecord:
    return RequestRecord(
        rid=planned.rid,
        class_name=planned.class_name,
        input_tokens=planned.input_tokens,
        output_tokens=0,
        scheduled_at=planned.at_s,
        sent_at=now_s,
        first_token_at=None,
        finished_at=now_s,
        status=0,
        error=f"not sent: {limit} requests of this client were in flight",
        output_chars=0,
        output_sha256=hashlib.sha256(b"").hexdigest(),
    )
