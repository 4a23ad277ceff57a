"""One request on its way through the router: the shell around its ``Exchange``.

Run by the router's event loop: one coroutine a request (the one the HTTP server made for it), woken by callbacks from
the prefill link, the decode connection, the client's side and timers. A callback asks the exchange what to do, does at
once whatever needs no waiting (stopping a side), and leaves the rest (answering, retrying) to the coroutine. Bytes from
the decode side wait in ``_chunks``; above ``HIGH_WATER_BYTES`` its connection is paused until the client took them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

from starlette.types import Receive
from starlette.types import Send as AsgiSend

from flowprefill_sglang.errors import FlowPrefillError, InternalError, PeerFault, TooLate
from flowprefill_sglang.router.answers import JSON, Refusal, said
from flowprefill_sglang.router.attempt import Pair, body_for, dispatch_for
from flowprefill_sglang.router.client_answer import ClientAnswer, passed_on
from flowprefill_sglang.router.exchange import Exchange, Side, Step, Steps
from flowprefill_sglang.router.first_event import EVENT_ENDS, EVENT_STREAM, stream_error
from flowprefill_sglang.router.http_client import Connection, Headers
from flowprefill_sglang.router.log import FIELDS
from flowprefill_sglang.router.merge import LogprobMerger
from flowprefill_sglang.router.objectives import Terms
from flowprefill_sglang.router.pd_fields import ParsedRequest, rids
from flowprefill_sglang.router.ttft import FirstToken
from flowprefill_sglang.wire.framing import Buffer
from flowprefill_sglang.wire.messages import Answer

if TYPE_CHECKING:
    from flowprefill_sglang.router.dispatcher import Dispatcher

log = logging.getLogger(__name__)

HIGH_WATER_BYTES: Final = 256 * 1024
ABORT_GRACE_S: Final = 5.0
"""How long an aborted request's decode side may take to say its last words."""
LATE_ANSWER_S: Final = 5.0
"""A prefill side that has not answered so long after the client had its own is told to stop: its decode side may have
failed inside a stream, and nobody will fetch the KV that it holds."""


class Handling:
    """One request. ``run`` is called once; it ends when the client has its answer, or has gone."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        request: ParsedRequest,
        terms: Terms,
        *,
        rid: str,
        tokens: int,
        headers: Headers,
        received_at: float,
        receive: Receive,
        send: AsgiSend,
    ) -> None:
        self.rid = rid
        self.terms = terms
        self.names: list[str] = []
        """What SGLang calls the prompts of the present attempt."""
        self.exchange = Exchange(dispatcher.config.retries)
        self._dispatcher = dispatcher
        self._request = request
        self._tokens = tokens
        self._headers = headers
        self._receive = receive
        self._client = ClientAnswer(send)
        self._loop = dispatcher.loop
        self.received_at = received_at  # by time.monotonic: the loop's own clock may tick in milliseconds
        self._metrics = dispatcher.metrics.of_class(terms.slo_class)
        self.first_token = FirstToken(self._metrics, received_at=received_at, slo_s=terms.ttft_slo_s)
        self._wake: asyncio.Future[None] | None = None
        self._news = False
        self._place: asyncio.Future[None] | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._used: list[Pair] = []
        self._begin_attempt()

    def _begin_attempt(self) -> None:
        self._link_rid = ""
        self._pair: Pair | None = None
        self._connection: Connection | None = None
        self._status = 0
        self._answer_headers: Headers = []
        self.streams = False
        self.first_token.attempt_begins()
        self._chunks: list[bytes] = []
        self._buffered_bytes = 0
        self._ended = False
        self._merger: LogprobMerger | None = None
        self._prefill_answer: tuple[int, bytes, bytes] | None = None  # status, content type, body
        self._relay = self._retry = self._answer_prefill = False

    # ---- the coroutine -------------------------------------------------------------------------------------------

    @property
    def status(self) -> int:
        """HTTP status of the client's answer, 0 as long as there is none."""
        return self._client.status

    async def run(self) -> None:
        """Serve the request from admission to its outcome."""
        watch = self._loop.create_task(self._watch_client())
        timeout_s = self._dispatcher.config.request_timeout_secs
        self._timers.append(self._loop.call_later(timeout_s, self._on_expired, timeout_s))
        try:
            if await self._enter():
                self._metrics.waited(time.monotonic() - self.received_at)
                try:
                    await self._serve()
                finally:
                    self._release_pair()
                    self._dispatcher.admission.leave()
        finally:
            for timer in self._timers:
                timer.cancel()
            watch.cancel()

    async def _enter(self) -> bool:
        admission = self._dispatcher.admission
        if admission.try_enter():
            return True
        try:
            self._place = admission.queue_up()
            if await admission.wait(self._place):
                if self.exchange.outcome is None:
                    return True
                admission.leave()
        except Refusal as error:
            self._do(self.exchange.no_pair(error))
        finally:
            self._place = None
        await self._conclude()
        return False

    async def _serve(self) -> None:
        try:
            while True:
                self._begin_attempt()
                await self._attempt()
                await self._answer()
                if not self._retry:
                    return
                self._release_pair()
                self._dispatcher.tries_again(self)
        except Exception as error:  # the edge of this request: neither side may be left waiting
            log.exception("request_broke", extra={FIELDS: {"rid": self.rid}})
            self._do(self.exchange.broke(InternalError(f"the router failed: {type(error).__name__}")))
            if self._client.has_begun:
                raise  # closes the connection
            await self._conclude()
        finally:
            self._do(self.exchange.client_gone())  # only has an effect when the coroutine was cancelled

    async def _attempt(self) -> None:
        """Give the request to both sides of a pair."""
        try:
            pair = self._dispatcher.pick(self._request, self._tokens, avoid=self._used)
        except FlowPrefillError as error:
            self._do(self.exchange.no_pair(error))
            return
        suffix = f"_retry{self.exchange.attempts}" if self.exchange.attempts else ""
        self._take_pair(pair, self.rid + suffix)
        self.names = [name + suffix for name in rids(self._request, self.rid)]
        body = body_for(self._request, self.terms, self.names, pair, new_room=self._dispatcher.new_room)
        self.exchange.start()
        dispatch = dispatch_for(
            self._request.path,
            self.terms,
            rid=self._link_rid,
            headers=self._headers,
            age_s=time.monotonic() - self.received_at,
        )
        text_bytes = self._request.prompt_bytes if self._request.exact_tokens is None else 0
        self._dispatcher.links.dispatch(
            pair.prefill, dispatch, body, tokens=self._tokens, prompt_bytes=text_bytes, sink=self
        )
        if not self._is_settled():
            await self._send_to_decode(pair, body)

    async def _send_to_decode(self, pair: Pair, body: bytes) -> None:
        origin = self._dispatcher.decodes.origin(pair.decode)
        try:
            if origin is None:
                raise PeerFault(f"{pair.decode.url} was removed")
            connection = origin.take_idle() or await origin.connect()
        except PeerFault as error:
            self._dispatcher.decodes.unreachable(pair.decode, str(error))
            self._do(self.exchange.decode_lost(str(error)))
            return
        if self._is_settled():  # the other side failed, or the client left, while this connection was made
            origin.give_back(connection)
            return
        self._connection = connection
        origin.send(connection, self._request.path, self._headers, body, self)

    async def _answer(self) -> None:
        """Answer the client, as far and as long as there is something to say; return when that is done, or to retry."""
        while not self._retry:
            if self.exchange.outcome is not None:
                await self._conclude()
                return
            if self._chunks and self._may_pass_on():
                data = self._take_chunks()
                self.first_token.passed_on(data, time.monotonic())
                await self._client.stream(self._status, self._answer_headers, data)
            elif not self._news:
                self._wake = self._loop.create_future()
                await self._wake
                self._wake = None
            self._news = False

    def _may_pass_on(self) -> bool:
        return self._relay and (self._merger is not None or not self._request.merges_logprobs)

    def _take_chunks(self) -> bytes:
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks = []
        if self._buffered_bytes > HIGH_WATER_BYTES and self._connection is not None:
            self._connection.resume()
        self._buffered_bytes = 0
        if self.streams and self._merger is not None:
            try:
                return self._merger.events(data)
            except PeerFault as error:
                self._bad_answer(error)
                return b""
        return data

    async def _conclude(self) -> None:
        """The outcome is known: end the client's answer in whatever form is still possible."""
        if self._answer_prefill and self._prefill_answer is not None:
            status, content_type, body = self._prefill_answer
            headers = [(b"content-type", content_type), self.terms.answer_header()]
            await self._client.whole(status, headers, body)
        elif self.exchange.error is not None:
            await self._client.fail(self.exchange.error)
        elif self._relay and not self.streams:
            await self._client.whole(self._status, self._answer_headers, b"".join(self._chunks))
        elif self._relay:
            end = self._merger.end() if self._merger is not None else b""
            data = self._take_chunks() + end
            self.first_token.passed_on(data, time.monotonic())
            await self._client.end_stream(self._status, self._answer_headers, data)

    # ---- steps -----------------------------------------------------------------------------------------------------

    def _is_settled(self) -> bool:
        return self._retry or self.exchange.outcome is not None

    def _do(self, steps: Steps) -> None:
        """Take the exchange's steps: stop sides at once, leave the rest to the coroutine."""
        for step in steps:
            match step:
                case Step.ABORT_PREFILL:
                    self._dispatcher.links.abort(self._link_rid)
                case Step.CUT_DECODE | Step.ASK_DECODE_TO_STOP:
                    self._stop_decode(cut=step is Step.CUT_DECODE)
                case Step.RETRY:
                    self._retry = True
                case Step.RELAY:
                    self._relay = True
                case Step.ANSWER_PREFILL:
                    self._answer_prefill = True
                case Step.FINISH:
                    if self._place is not None:
                        self._place.cancel()
        if steps:
            self._wake_up()

    def _stop_decode(self, *, cut: bool) -> None:
        if self._connection is not None and self._pair is not None:
            if cut:
                self._connection.cancel()
            self._dispatcher.decodes.abort(self._pair.decode, self.names)

    def _bad_answer(self, error: PeerFault) -> None:
        """The two sides' answers cannot be merged."""
        self._stop_decode(cut=True)
        self._do(self.exchange.decode_lost(str(error)))

    def _wake_up(self) -> None:
        self._news = True
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _take_pair(self, pair: Pair, link_rid: str) -> None:
        self._pair, self._link_rid = pair, link_rid
        self._used.append(pair)
        pair.decode.assign(self._tokens)

    def _release_pair(self) -> None:
        if self._pair is not None:
            self._pair.decode.release(self._tokens)
            self._dispatcher.links.forget(self._link_rid)
            if self._dispatcher.links.registry.holds(self._link_rid):  # its answer comes later, or never
                self._loop.call_later(LATE_ANSWER_S, self._dispatcher.links.abort, self._link_rid)
            self._pair = None

    # ---- callbacks: the client and time ----------------------------------------------------------------------------

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._do(self.exchange.client_gone())

    def _on_expired(self, timeout_s: float) -> None:
        self._do(self.exchange.expired(TooLate(f"the request took longer than {timeout_s:g} s")))

    def abort(self) -> None:
        """``/abort_request`` named this request."""
        if self._pair is None:
            self._do(self.exchange.abort_overdue())
            return
        self._do(self.exchange.abort_asked())
        self._timers.append(self._loop.call_later(ABORT_GRACE_S, lambda: self._do(self.exchange.abort_overdue())))

    def end_now(self) -> None:
        """The router stops."""
        self._do(self.exchange.router_stops())

    # ---- callbacks: the prefill side (PrefillSink) -----------------------------------------------------------------

    def on_prefill_answer(self, answer: Answer, body: Buffer) -> None:
        status, kind, content = answer.status, answer.content_type.encode("latin-1", "replace"), bytes(body)
        if kind.startswith(EVENT_STREAM) and (error := stream_error(content)):
            status, kind, content = error.status, JSON[1], error.document
        self._prefill_answer = (status, kind, content)
        if status < 400:
            self.first_token.prefilled(time.monotonic())
        self._do(self.exchange.prefill_answered(status, said(content)))
        if self.exchange.outcome is None and self._request.merges_logprobs and status < 400:
            try:
                self._merger = LogprobMerger(content)
            except PeerFault as error:
                self._bad_answer(error)
                return
            self._wake_up()
            if self._ended:
                self._decode_complete()

    def on_prefill_lost(self, reason: str) -> None:
        self._do(self.exchange.prefill_lost(reason))

    # ---- callbacks: the decode side (AnswerSink) -------------------------------------------------------------------

    def on_head(self, status: int, headers: Headers) -> None:
        self._status = status
        self._answer_headers = [*passed_on(headers), self.terms.answer_header()]
        self.streams = any(name == b"content-type" and value.startswith(EVENT_STREAM) for name, value in headers)

    def on_chunk(self, data: bytes) -> None:
        self._chunks.append(data)
        self._buffered_bytes += len(data)
        self._look_at_first_event()
        if self.streams:
            if self._buffered_bytes > HIGH_WATER_BYTES and self._connection is not None:
                self._connection.pause()
            self._wake_up()

    def _look_at_first_event(self) -> None:
        """Pass a stream on once it has begun; one that begins with an error is a whole answer, with a status."""
        if not self.streams or self.exchange.answering:
            return
        begun = b"".join(self._chunks)
        error = stream_error(begun)
        if error is None and (self._ended or EVENT_ENDS in begun):
            self._do(self.exchange.decode_streams(needs_prefill=self._request.needs_prefill_while_streaming))
        elif error is not None and self._ended:
            self._status, self.streams, self._chunks = error.status, False, [error.document]
            self._answer_headers = [JSON, self.terms.answer_header()]

    def on_end(self) -> None:
        self._ended = True
        self._look_at_first_event()
        needs_prefill = self._request.merges_logprobs and self._status < 400 and self._merger is None
        if not (needs_prefill and self.exchange.prefill is Side.WORKING):
            self._decode_complete()

    def on_lost(self, reason: str) -> None:
        if self._pair is not None:
            self._dispatcher.decodes.suspect(self._pair.decode)
            self._do(self.exchange.decode_lost(f"decode failed: {self._pair.decode.url}: {reason}"))

    def _decode_complete(self) -> None:
        if self._merger is not None and not self.streams and self._status < 400:
            try:
                self._chunks = [self._merger.whole(b"".join(self._chunks))]
            except PeerFault as error:
                self._bad_answer(error)
                return
        detail = said(b"".join(self._chunks)) if self._status >= 500 else ""
        self._do(self.exchange.decode_answered(self._status, detail))
