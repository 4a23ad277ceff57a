"""Takes requests in, chooses a pair for each, and knows all that are running.

One owner: the router's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Iterable, Sequence

from starlette.types import Receive, Send

from flowprefill_sglang.core.work import TokenRatio
from flowprefill_sglang.errors import BadInput, FlowPrefillError
from flowprefill_sglang.router.admission import Admission
from flowprefill_sglang.router.answers import Refusal, dropped
from flowprefill_sglang.router.attempt import Pair
from flowprefill_sglang.router.config import RouterConfig
from flowprefill_sglang.router.decode_pool import DecodePool
from flowprefill_sglang.router.decode_registry import DecodeInstance
from flowprefill_sglang.router.exchange import Outcome
from flowprefill_sglang.router.handling import Handling
from flowprefill_sglang.router.http_client import Headers
from flowprefill_sglang.router.log import event
from flowprefill_sglang.router.merge import prompt_tokens
from flowprefill_sglang.router.metrics import RouterMetrics
from flowprefill_sglang.router.objectives import Intake
from flowprefill_sglang.router.pd_fields import ParsedRequest, parse
from flowprefill_sglang.router.policies import POLICIES
from flowprefill_sglang.router.prefill_links import PrefillLinks
from flowprefill_sglang.router.registry import PrefillWorker
from flowprefill_sglang.wire.framing import Buffer

log = logging.getLogger(__name__)

ANY_MODEL = "default"
"""SGLang's own default for the ``model`` field, which it otherwise ignores."""
PASSED_ON = frozenset(
    {b"authorization", b"x-request-id", b"traceparent", b"tracestate", b"x-smg-routing-key", b"x-override-priority"}
)
"""Request headers that both sides get."""
FAILURES = frozenset({Outcome.PREFILL_FAILED, Outcome.DECODE_FAILED, Outcome.EXPIRED})


class Dispatcher:
    """The router's core: both registries, the queue and the running requests."""

    def __init__(self, config: RouterConfig, *, rng: random.Random) -> None:
        self.config = config
        self.loop = asyncio.get_running_loop()
        self.name = f"router-{uuid.UUID(int=rng.getrandbits(128)).hex[:8]}"
        self.links = PrefillLinks(config, on_prefilled=self._learn, router=self.name)
        self.decodes = DecodePool(config)
        self.admission = Admission(
            limit=config.max_concurrent_requests, queue_size=config.queue_size, timeout_s=config.queue_timeout_secs
        )
        self.metrics = RouterMetrics(config.slo_classes_ms)
        self.retries = 0
        self.settling = False
        """Not ready any more, but still taking requests: load balancers need a moment to notice."""
        self.closing = False
        """Refusing new requests."""
        self.running: dict[str, Handling] = {}
        self._intake = Intake(config.slo_classes_ms, config.default_slo_class)
        self._rng = rng
        self._ratio = TokenRatio()
        self._turn = 0
        self._policies = POLICIES[config.prefill_policy], POLICIES[config.decode_policy]

    async def open(self) -> None:
        """Listen for prefill workers, start checking decode instances. Raises StartupError."""
        self.links.open()
        await self.decodes.open()

    async def close(self) -> None:
        await self.decodes.close()
        self.links.close()

    # ---- one request -----------------------------------------------------------------------------------------------

    async def serve(
        self, path: str, body: bytes, headers: Headers, receive: Receive, send: Send, *, received_at: float
    ) -> None:
        """Serve one request to its end. ``received_at``: of its last byte, by ``time.monotonic``.

        Raises FlowPrefillError for what can be refused at once, which ``refused`` then counts."""
        request = parse(path, body)
        terms = self._intake.terms(headers, request.terms)
        if self.closing:
            raise dropped("this router is shutting down", status=503, reason="no-endpoints", retry_after_s=1)
        self._check(request)
        rid = request.rid if isinstance(request.rid, str) else f"{self._rng.getrandbits(128):032x}"
        if rid in self.running or self.links.registry.holds(rid):
            raise BadInput(f"a request with the rid {rid!r} is running", code="duplicate_rid")
        tokens = request.exact_tokens or self._ratio.tokens(request.prompt_bytes)
        handling = Handling(
            self,
            request,
            terms,
            rid=rid,
            tokens=tokens,
            headers=[pair for pair in headers if pair[0] in PASSED_ON],
            received_at=received_at,
            receive=receive,
            send=send,
        )
        self.running[rid] = handling
        try:
            await handling.run()
        finally:
            del self.running[rid]
            self._account(handling)

    def refused(self, error: FlowPrefillError) -> None:
        """Count a request that ``serve`` was not given, or refused."""
        self.metrics.ended(Outcome.REJECTED if error.status < 500 else Outcome.SHED, error.status)

    def left(self) -> None:
        """Count a client that went away before its request was complete."""
        self.metrics.ended(Outcome.CLIENT_GONE, 0)

    def abort(self, rid: str, *, everything: bool = False) -> int:
        """Abort running requests by rid or its beginning, as SGLang's scheduler matches. Returns how many."""
        found = [
            one
            for one in self.running.values()
            if everything or (rid and (one.rid.startswith(rid) or any(name.startswith(rid) for name in one.names)))
        ]
        for handling in found:
            handling.abort()
        return len(found)

    def end_all(self) -> None:
        """End what is running at once, both sides aborted: this router stops."""
        for handling in list(self.running.values()):
            handling.end_now()

    def new_room(self) -> int:
        """A bootstrap room: 63 random bits, as SGLang's gateways draw it."""
        return self._rng.getrandbits(63)

    def pick(self, request: ParsedRequest, tokens: int, *, avoid: Sequence[Pair] = ()) -> Pair:
        """Workers for one attempt; others than those of ``avoid`` if there are any. Raises Refusal (503)."""
        decodes = [one for one in self.decodes.registry.ready() if _serves(one, request.model)]
        prefills = [one for one in self.links.registry.ready() if any(can_pair(one, decode) for decode in decodes)]
        if not prefills:
            raise dropped(self.why_no_pair(request.model), status=503, reason="no-endpoints", retry_after_s=1)
        prefill_policy, decode_policy = self._policies
        turn, self._turn = self._turn, self._turn + 1
        fresh = [one for one in prefills if all(one is not pair.prefill for pair in avoid)]
        prefill = prefill_policy(fresh or prefills, tokens, turn)
        decodes = [one for one in decodes if can_pair(prefill, one)]
        fresh_decodes = [one for one in decodes if all(one is not pair.decode for pair in avoid)]
        return Pair(prefill=prefill, decode=decode_policy(fresh_decodes or decodes, tokens, turn))

    # ---- the picture -----------------------------------------------------------------------------------------------

    def ready_pairs(self) -> Iterable[tuple[PrefillWorker, DecodeInstance]]:
        """Every prefill worker and decode instance that could serve a request together now."""
        return (
            (prefill, decode)
            for prefill in self.links.registry.ready()
            for decode in self.decodes.registry.ready()
            if can_pair(prefill, decode)
        )

    def is_ready(self) -> bool:
        return not self.settling and not self.closing and any(True for _ in self.ready_pairs())

    def model_names(self) -> list[str]:
        """Names that clients may ask for now."""
        return sorted({name for one in self.decodes.registry.ready() if one.facts for name in one.facts.names})

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _check(self, request: ParsedRequest) -> None:
        model, ready = request.model, self.decodes.registry.ready()
        if model is not None and ready and not any(_serves(one, model) for one in ready):
            names = ", ".join(self.model_names())
            raise Refusal(
                f"the model {model!r} is not served here; served: {names}", status=404, code="model_not_found"
            )
        if request.exact_tokens is not None and (prefills := self.links.registry.ready()):
            longest = max(one.hello.limits.max_context_tokens for one in prefills)
            if request.exact_tokens > longest:
                message = f"the prompt has {request.exact_tokens} tokens; the longest context here is {longest}"
                raise BadInput(message, status=413, code="context_length_exceeded")

    def why_no_pair(self, model: str | None) -> str:
        prefills, decodes = len(self.links.registry.ready()), len(self.decodes.registry.ready())
        if not prefills or not decodes:
            return f"at least one prefill worker and one decode instance must be ready; now: {prefills} and {decodes}"
        what = f"the model {model!r}" if model is not None else "the same model with the same transfer backend"
        return f"no prefill worker and decode instance that are ready serve {what}"

    def _learn(self, prompt_bytes: int, answer: Buffer) -> None:
        if prompt_bytes:
            self._ratio.observe(prompt_bytes, prompt_tokens(bytes(answer)))

    def tries_again(self, handling: Handling) -> None:
        """Count and log that a request goes to another pair."""
        self.retries += 1
        exchange = handling.exchange
        event(
            log,
            logging.INFO,
            "request_retried",
            rid=handling.rid,
            attempts=exchange.attempts,
            reason=exchange.last_failure,
        )

    def _account(self, handling: Handling) -> None:
        exchange, now = handling.exchange, time.monotonic()
        if exchange.outcome is None:  # the server cancelled it while it waited in the queue
            exchange.client_gone()
        assert exchange.outcome is not None
        handling.first_token.ended(exchange.outcome, now, streamed=handling.streams)
        self.metrics.ended(exchange.outcome, handling.status, handling.terms.tenant)
        level = logging.WARNING if exchange.outcome in FAILURES else logging.DEBUG
        if log.isEnabledFor(level):
            event(
                log, level, "request_ended", rid=handling.rid, outcome=exchange.outcome, attempts=exchange.attempts,
                wall_ms=round((now - handling.received_at) * 1000, 1), error=exchange.error or "",
            )  # fmt: skip


def can_pair(prefill: PrefillWorker, decode: DecodeInstance) -> bool:
    """Whether the two can hand KV over: the same model, and the same transfer backend where it is known."""
    facts = decode.facts
    return (
        facts is not None
        and facts.model == prefill.hello.model
        and facts.transfer_backend in (None, prefill.hello.transfer_backend)
    )


def _serves(decode: DecodeInstance, model: str | None) -> bool:
    if decode.facts is None:
        return False
    if model is None or model == ANY_MODEL or model in decode.facts.names:
        return True
    base, colon, _ = model.partition(":")  # SGLang's ``base-model:adapter-name``
    return bool(colon) and base in decode.facts.names
