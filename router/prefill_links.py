"""The ZeroMQ side: a ROUTER socket that prefill workers connect to, around the sans-IO registry.

Run by the router's event loop. Owns the socket and the registry. Woken by incoming messages and by a tick.
Anything may connect to this port: what is no message of the protocol is counted and dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Protocol

import zmq

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.router.config import RouterConfig
from flowprefill_sglang.router.log import event
from flowprefill_sglang.router.registry import (
    Answered,
    Changed,
    Effect,
    Lost,
    PrefillRegistry,
    PrefillWorker,
    Send,
    TurnedAway,
)
from flowprefill_sglang.wire.framing import Buffer, MalformedMessage, decode_from_worker, encode
from flowprefill_sglang.wire.messages import Answer, Dispatch
from flowprefill_sglang.wire.socket import EventSocket

log = logging.getLogger(__name__)
SEND_QUEUE_MESSAGES: Final = 10_000
"""A worker that reads nothing for so long counts as gone."""


class PrefillSink(Protocol):
    """Who waits for a prefill answer; called exactly once for each dispatch."""

    def on_prefill_answer(self, answer: Answer, body: Buffer) -> None: ...

    def on_prefill_lost(self, reason: str) -> None: ...


class PrefillLinks:
    """Dispatches requests to prefill workers and brings their answers back."""

    def __init__(self, config: RouterConfig, *, on_prefilled: Callable[[int, Buffer], None], router: str) -> None:
        """``on_prefilled`` gets each good answer's length of prompt and body, to learn from."""
        self.registry = PrefillRegistry(
            router=router, heartbeat_interval_s=config.heartbeat_interval_secs, dead_after_s=config.heartbeat_dead_secs
        )
        self.malformed_messages = 0
        self.refusals = 0
        """Greetings of workers that were refused; a refused worker asks again now and then."""
        self._config = config
        self._on_prefilled = on_prefilled
        self._sinks: dict[str, PrefillSink] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: EventSocket | None = None
        self._tick_handle: asyncio.TimerHandle | None = None
        self.endpoint = ""

    def open(self) -> None:
        """Bind. Raises StartupError when the endpoint is taken or malformed."""
        raw = self._context.socket(zmq.ROUTER)
        raw.setsockopt(zmq.ROUTER_MANDATORY, 1)  # say so when a peer is gone, instead of dropping its messages
        raw.setsockopt(zmq.MAXMSGSIZE, self._config.max_answer_bytes)
        raw.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
        raw.setsockopt(zmq.IPV6, int("[" in self._config.worker_bind))
        try:
            raw.bind(self._config.worker_bind)
        except zmq.ZMQError as error:
            raw.close(linger=0)
            self._context.term()
            raise StartupError(f"cannot listen for prefill workers on {self._config.worker_bind}: {error}") from error
        self.endpoint = raw.getsockopt_string(zmq.LAST_ENDPOINT)
        self._socket = EventSocket(raw, self._on_frames)
        self._tick()

    def close(self) -> None:
        if self._tick_handle is not None:
            self._tick_handle.cancel()
        if self._socket is not None:
            self._socket.close(linger_s=0.2)  # aborts that were just sent should still leave
        self._context.term()

    def dispatch(
        self,
        worker: PrefillWorker,
        message: Dispatch,
        body: bytes,
        *,
        tokens: int,
        prompt_bytes: int,
        sink: PrefillSink,
    ) -> None:
        """Hand a request to a worker. When that fails, ``sink`` hears of it before this returns."""
        self._sinks[message.rid] = sink
        send = self.registry.assign(worker.name, message, tokens=tokens, prompt_bytes=prompt_bytes, now=self._now())
        if not self._send(send.link, encode(message, body)):
            self._apply(self.registry.on_unreachable(send.link))

    def abort(self, rid: str) -> None:
        """Tell the holder to stop; its answer still goes to who waits."""
        self._apply(self.registry.abort(rid))

    def forget(self, rid: str) -> None:
        """Nobody waits for this answer any more, although it may still come."""
        self._sinks.pop(rid, None)

    @property
    def waiting_answers(self) -> int:
        """How many dispatches somebody still waits for."""
        return len(self._sinks)

    def drain(self, name: str) -> None:
        """Let one worker finish and leave."""
        self._apply(self.registry.drain(name))

    # ---- inside --------------------------------------------------------------------------------------------------

    def _on_frames(self, frames: list[bytes]) -> None:
        link, *rest = frames
        try:
            message, payload = decode_from_worker(rest)
        except MalformedMessage as error:
            self.malformed_messages += 1
            event(log, logging.WARNING, "malformed_message", count=self.malformed_messages, error=str(error))
            return
        effects = self.registry.on_message(link, message, self._now())
        if effects:
            self._apply(effects, payload[0] if payload else b"")

    def _apply(self, effects: list[Effect], payload: Buffer = b"") -> None:
        for effect in effects:
            match effect:
                case Send(link, message):
                    if not self._send(link, encode(message)):
                        self._apply(self.registry.on_unreachable(link))
                case Answered(answer, assignment):
                    if answer.status == 200:
                        self._on_prefilled(assignment.prompt_bytes, payload)
                    if (sink := self._sinks.pop(answer.rid, None)) is not None:
                        sink.on_prefill_answer(answer, payload)
                case Lost(rid, reason):
                    if (sink := self._sinks.pop(rid, None)) is not None:
                        sink.on_prefill_lost(reason)
                case Changed(name, state, reason):
                    event(log, logging.INFO, "worker_state", worker=name, type="prefill", state=state, reason=reason)
                case TurnedAway(name, version, reason):
                    self.refusals += 1
                    event(log, logging.WARNING, "worker_refused", worker=name, version=version, reason=reason)

    def _send(self, link: bytes, frames: list[Buffer]) -> bool:
        assert self._socket is not None
        return self._socket.try_send([link, *frames])

    def _tick(self) -> None:
        self._apply(self.registry.on_tick(self._now()))
        self._tick_handle = asyncio.get_running_loop().call_later(self._config.heartbeat_interval_secs / 2, self._tick)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
