"""The link between a worker and its router: one task on the worker's event loop, one ZeroMQ DEALER socket.

Owned by the task that runs ``Link.run``; woken by messages from the router, by answers of the engine, by events of
SGLang's scheduler and by the session's timer. All decisions are ``session.Session``'s.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.prefill_worker.config import WorkerConfig
from flowprefill_sglang.prefill_worker.event_feed import EventFeed
from flowprefill_sglang.prefill_worker.progress import ProgressReader
from flowprefill_sglang.prefill_worker.reporter import Batch
from flowprefill_sglang.prefill_worker.session import Action, Cancel, Log, Prefill, Reconnect, Send, Session
from flowprefill_sglang.prefill_worker.signs_of_life import Part, SignsOfLife
from flowprefill_sglang.wire.framing import Buffer, MalformedMessage, decode_to_worker, encode
from flowprefill_sglang.wire.messages import Dispatch, Hello

logger = logging.getLogger(__name__)

_JSON = "application/json"
_GOODBYE_LINGER_MS = 200
"""Longest wait, on the event loop, for the last messages to leave: the process ends next."""

PATHS = frozenset({"/generate", "/v1/completions", "/v1/chat/completions"})
"""Handlers that a router may call; everything else goes to the worker's HTTP endpoint."""


class EngineHangs(PeerFault):
    """A process of the engine does not answer any more. Nothing in this worker can help it."""


class Engine(Protocol):
    """What the link needs of the model server behind it."""

    async def request(
        self, dispatch: Dispatch, received_at: float, body: Buffer, disconnected: asyncio.Event
    ) -> tuple[int, str, bytes]:
        """POST ``body`` to the engine's handler for the dispatch's path: status, content type, body.

        ``received_at``: when the router received the request, on this host's ``CLOCK_MONOTONIC``, in seconds.
        """
        ...

    def abort(self, rids: Sequence[str]) -> None:
        """Stop working on these prompts, named as in the body's ``rid``; unknown names are ignored."""
        ...

    def is_stopping(self) -> bool:
        """Whether the engine was told to stop."""
        ...

    async def hello(self, config: WorkerConfig) -> Hello:
        """The facts about this worker."""
        ...

    async def sign_of_life(self, part: Part) -> None:
        """Ask this process, and return when it has answered."""
        ...

    def is_under_control(self) -> bool:
        """Whether the scheduler process was given a control request, which may take minutes, and has not done it."""
        ...


class _Names(msgspec.Struct):
    """What SGLang will call the prompts of a body: one name, or a list with one a prompt."""

    rid: str | list[str] = msgspec.field(default_factory=list)


_names_decoder = msgspec.json.Decoder(_Names)


def names(body: Buffer) -> list[str]:
    """The ``rid`` of a request's body, as a list; empty when it has none or is no such document. The link's own id of
    the request is not it: clients may choose theirs, and a batch has one a prompt."""
    try:
        rid = _names_decoder.decode(body).rid
    except (msgspec.DecodeError, UnicodeDecodeError):
        return []
    return rid if isinstance(rid, list) else [rid]


class _Running:
    """A request inside the engine."""

    def __init__(self, dispatch: Dispatch, received_at: float, body: Buffer) -> None:
        self.dispatch = dispatch
        self.received_at = received_at
        self.body = body
        self.disconnected = asyncio.Event()
        self.names: list[str] = []  # filled when it is cancelled, which few are


class Link:
    """Serves one router until drained or cancelled.

    ``feed``: events of the engine's scheduler, where it reports any. ``clock``: this host's ``CLOCK_MONOTONIC``, which
    the engine's other processes read too.
    """

    def __init__(
        self,
        config: WorkerConfig,
        engine: Engine,
        feed: EventFeed | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._engine = engine
        self._feed = feed
        self._clock = clock
        self._socket: zmq.asyncio.Socket | None = None
        self._running: dict[str, _Running] = {}  # by the link's id; a new request may take a cancelled one's place
        self._tasks: set[asyncio.Task[None]] = set()
        self._progress = ProgressReader()
        self._signs = {part: SignsOfLife(patience_s=config.unresponsive_s, now=clock()) for part in Part}

    async def run(self) -> None:
        """Greet the router and serve it until the link is over: drained, or the engine is stopping. A router that
        refuses this worker for its version is greeted on, slowly.

        Raises whatever ``Engine.hello`` raises, and EngineHangs.
        """
        loop = asyncio.get_running_loop()
        hello = await self._engine.hello(self._config)
        self._session = Session(
            hello,
            hello_retry_s=self._config.hello_retry_s,
            refused_retry_s=self._config.refused_retry_s,
            leave_after_s=self._config.leave_after_s,
            now=loop.time(),
        )
        if self._feed is not None:
            self._feed.listen(self._observe)
        logger.info("worker %s greets the router at %s", hello.name, self._config.router)
        self._context = zmq.asyncio.Context()
        try:
            self._connect()
            await self._serve(loop.time)
        finally:
            await self._do(self._session.leave("the worker stops"))
            for task in self._tasks:
                task.cancel()
            self._context.destroy(linger=_GOODBYE_LINGER_MS)

    async def _serve(self, clock: Callable[[], float]) -> None:
        session = self._session
        while not session.is_over:
            wait_s = max(0.0, session.next_tick_at - clock())
            if await self._readable(wait_s):
                await self._receive_all(clock)
            if self._engine.is_stopping():
                await self._do(session.drain("the worker was told to stop", clock()))
            await self._tick_if_due(clock)

    async def _tick_if_due(self, clock: Callable[[], float]) -> None:
        if clock() < self._session.next_tick_at:
            return
        self._repeat_aborts()
        await self._look_for_signs_of_life()
        await self._do(self._session.tick(clock(), max(signs.silent_s for signs in self._signs.values())))

    async def _look_for_signs_of_life(self) -> None:
        for part, signs in self._signs.items():
            is_excused = part is Part.SCHEDULER and self._engine.is_under_control()
            if signs.look(self._clock(), is_busy=bool(self._running), is_excused=is_excused):
                self._spawn(self._ask(part))
            if signs.is_hung:
                reason = f"its {part} process has not answered for {signs.silent_s:.0f} s"
                await self._do(self._session.leave(reason))  # the router tries elsewhere what it had sent here
                raise EngineHangs(f"{reason} (--unresponsive-secs); this worker ends")

    async def _ask(self, part: Part) -> None:
        try:
            await self._engine.sign_of_life(part)
        except Exception as error:  # it is no proof of a hang
            logger.warning("the %s process could not be asked whether it works: %s", part, error)
        self._signs[part].heard(self._clock())

    async def _readable(self, wait_s: float) -> bool:
        assert self._socket is not None
        return bool(await self._socket.poll(timeout=int(wait_s * 1000) + 1))

    async def _receive_all(self, clock: Callable[[], float]) -> None:
        """Everything that is there: the socket is level-triggered and a burst should cost one wake-up.

        The engine tokenizes on this event loop, which for a burst of prompts can take longer than the router's patience
        with a silent worker. So requests go in one by one, each with a turn of the loop, and heartbeats in between.
        """
        while not self._session.is_over and self._socket is not None:
            try:
                frames = await self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message, payload = decode_to_worker(frames)
            except MalformedMessage as error:
                logger.warning("dropped a message from the router: %s", error)
                continue
            await self._do(self._session.receive(message, payload, clock()))
            if isinstance(message, Dispatch):
                await asyncio.sleep(0)
                await self._tick_if_due(clock)

    async def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    await self._send(action)
                case Prefill():
                    received_at = self._clock() - max(0.0, action.dispatch.age_s)
                    self._start(_Running(action.dispatch, received_at, action.body))
                case Cancel():
                    self._cancel(action.rid)
                case Reconnect():
                    self._connect()
                case Log():
                    logger.log(action.level, "%s", action.text)

    async def _send(self, action: Send) -> None:
        assert self._socket is not None
        try:
            await self._socket.send_multipart(encode(action.message, *action.payload), zmq.NOBLOCK)
        except zmq.Again:
            # No router is connected (ZMQ_IMMEDIATE): what is said now would be stale when one is. The session greets
            # again and the router fails over what it had sent here.
            logger.debug("not sent, no router is connected: %s", type(action.message).__name__)

    def _connect(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.IPV6, int("[" in self._config.router))
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.connect(self._config.router)
        self._socket = socket

    def _start(self, running: _Running) -> None:
        self._running[running.dispatch.rid] = running
        self._spawn(self._prefill(running))

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _observe(self, batch: Batch) -> None:
        """What the engine's scheduler has done."""
        self._signs[Part.SCHEDULER].heard(self._clock())
        changes = self._progress.read(batch.events)
        actions = [action for rid, phase in changes for action in self._session.progressed(rid, phase)]
        if actions:
            self._spawn(self._do(actions))

    async def _prefill(self, running: _Running) -> None:
        rid, path = running.dispatch.rid, running.dispatch.path
        if path not in PATHS:
            status, content_type, answer = (
                404,
                _JSON,
                _error_body(f"a prefill worker does not serve {path}", "not_found"),
            )
        else:
            try:
                status, content_type, answer = await self._engine.request(
                    running.dispatch, running.received_at, running.body, running.disconnected
                )
            except Exception as error:
                logger.exception("request %s failed inside SGLang", rid)
                failure = _error_body(f"{type(error).__name__}: {error}", "prefill_failed")
                status, content_type, answer = 500, _JSON, failure
        if self._running.get(rid) is not running:
            return  # a request of the same name came after this one was dropped; an answer now would seem to be its own
        del self._running[rid]
        if running.disconnected.is_set():
            status, content_type, answer = 499, _JSON, _error_body("aborted", "aborted")
        await self._do(self._session.answered(rid, status, content_type, answer))

    def _cancel(self, rid: str) -> None:
        running = self._running.get(rid)
        if running is not None and not running.disconnected.is_set():
            running.disconnected.set()
            running.names = names(running.body)
            self._engine.abort(running.names)

    def _repeat_aborts(self) -> None:
        """An abort that overtakes the request's own way into SGLang finds nothing there, so it is said again."""
        for running in self._running.values():
            if running.disconnected.is_set():
                self._engine.abort(running.names)


def _error_body(message: str, code: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "server_error", "param": None, "code": code}}).encode()
