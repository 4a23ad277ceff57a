"""How a request's terms (its deadline, class and priority) get from the router's dispatch into SGLang's scheduler.

The only place that knows the way. In the HTTP process, ``SGLangEngine.request`` calls SGLang's handler within
``dispatched``, a context variable, which SGLang's handlers and the tasks they start inherit. A hook where the tokenizer
manager makes the scheduler's request object (once a prompt, whatever the endpoint, batches included) writes the terms
into ``sampling_params.custom_params``: the one field of SGLang's own message for values of others. In the scheduler
process, ``terms_of`` reads them and takes them out again, so that a user's custom logit processor, the only other
reader, finds there what its user wrote.

A client that talks to a worker's SGLang port directly may say ``custom_params={"ttft_slo_ms": 250}`` itself. The other
keys are ours: what a client writes there is dropped, or it could put its requests in the past.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.integration.hooks import Hook, HookKind, sglang_version
from flowprefill_sglang.prefill_worker.scheduler import Request
from flowprefill_sglang.wire.messages import Dispatch

OBJECTIVE: Final = "ttft_slo_ms"
RECEIVED_AT: Final = "received_at_s"
SLO_CLASS: Final = "slo_class"
DISPATCH_RID: Final = "dispatch_rid"
PRIORITY: Final = "dispatch_priority"
SENT_AT: Final = "sent_at_s"
_OURS_ALONE: Final = (RECEIVED_AT, SLO_CLASS, DISPATCH_RID, PRIORITY, SENT_AT)
_ATTRIBUTE: Final = "_flowprefill_terms"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTerms:
    """What a request was promised. Points in time are seconds of this host's ``CLOCK_MONOTONIC``."""

    rid: str
    """SGLang's name for it, unique in the worker."""
    dispatch_rid: str
    """The link's name for the dispatch that brought it, shared by the prompts of a batch; empty without a router. A
    single prompt's is the same as ``rid``."""
    received_at: float
    """When the router received it; without one, when the scheduler did."""
    sent_at: float
    """When the HTTP process sent it to the scheduler, tokenized; without a router, when the scheduler received it. The
    moment from which the scheduler could have known of it."""
    objective_s: float
    deadline_at: float
    slo_class: str
    """Empty without a router."""
    priority: int


# ---- HTTP process --------------------------------------------------------------------------------------------------

_current: ContextVar[tuple[Dispatch, float] | None] = ContextVar("flowprefill_dispatch", default=None)


@contextmanager
def dispatched(dispatch: Dispatch, received_at: float) -> Iterator[None]:
    """Requests that SGLang takes in within this block, or in tasks started within it, are those of ``dispatch``, which
    the router received at ``received_at``."""
    token = _current.set((dispatch, received_at))
    try:
        yield
    finally:
        _current.reset(token)


def hooks() -> list[Hook]:
    """What ``integration.plugin`` registers."""
    return [
        Hook(
            target="sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
            kind=HookKind.AFTER,
            function=attach,
            why="the scheduler does not learn of deadlines",
        )
    ]


def check() -> None:
    """Raises StartupError unless SGLang has the field that the terms travel in."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    if "custom_params" not in getattr(SamplingParams, "__annotations__", {}):
        raise StartupError(f"SGLang {sglang_version()} has no SamplingParams.custom_params; install sglang==0.5.23")


def attach(result: Any, *_: Any, **__: Any) -> None:  # SGLang's TokenizedGenerateReqInput, or that of an embedding
    """After ``_create_tokenized_object``: put the terms into the scheduler's request.

    Raises ValueError, which SGLang answers with 400, for an objective that is none.
    """
    sampling_params = result.sampling_params
    own = sampling_params.custom_params
    current = _current.get()
    if own is None and current is None:
        return
    params = _checked(own)
    if current is not None:
        params |= _of_dispatch(*current)
        params[SENT_AT] = time.monotonic()
    sampling_params.custom_params = params


def _checked(own: Any) -> dict[str, Any]:  # from the client's JSON
    if own is None:
        return {}
    if not isinstance(own, dict):
        raise ValueError(f"custom_params must be an object, got {own!r:.100}")
    params = {key: value for key, value in own.items() if key not in _OURS_ALONE}
    objective_ms = params.get(OBJECTIVE)
    if objective_ms is None:
        params.pop(OBJECTIVE, None)
    elif isinstance(objective_ms, bool) or not isinstance(objective_ms, int | float) or not 0 < objective_ms < math.inf:
        raise ValueError(
            f"custom_params.{OBJECTIVE} must be a number of milliseconds above 0, got {objective_ms!r:.100}"
        )
    return params


def _of_dispatch(dispatch: Dispatch, received_at: float) -> dict[str, Any]:
    terms: dict[str, Any] = {
        RECEIVED_AT: received_at,
        SLO_CLASS: dispatch.slo_class,
        DISPATCH_RID: dispatch.rid,
    }
    if dispatch.ttft_slo_s is not None:
        terms[OBJECTIVE] = dispatch.ttft_slo_s * 1000
    if dispatch.priority is not None:
        terms[PRIORITY] = dispatch.priority
    return terms


# ---- scheduler process ---------------------------------------------------------------------------------------------


def terms_of(req: Any, now: float, default_objective_s: float) -> RequestTerms:  # SGLang's Req
    """The terms of a request, the same at every call.

    They are kept on ``req`` itself, which lives exactly as long as they are needed, because the first call takes them
    out of ``custom_params``. Call it before a batch with the request is made.
    """
    known = getattr(req, _ATTRIBUTE, None)
    if known is None:
        known = _read(req, now, default_objective_s)
        setattr(req, _ATTRIBUTE, known)
    return known


def as_request(req: Any, terms: RequestTerms) -> Request:  # SGLang's Req, with its prefix looked up
    """The request as our state machine knows it."""
    return Request(
        rid=terms.rid,
        slo_class=terms.slo_class,
        new_tokens=len(req.origin_input_ids) - req.prefix_len,
        cached_tokens=req.prefix_len,
        arrived_at=terms.received_at,
        deadline_at=terms.deadline_at,
        priority=terms.priority,
    )


def update_extent(request: Request, req: Any) -> None:
    """Take over what SGLang's cache has of the prompt now."""
    request.cached_tokens = req.prefix_len
    request.new_tokens = len(req.origin_input_ids) - req.prefix_len


def _read(req: Any, now: float, default_objective_s: float) -> RequestTerms:
    params = _take(req.sampling_params)
    objective_s = params[OBJECTIVE] / 1000 if OBJECTIVE in params else default_objective_s
    # SGLang's stamp is of time.perf_counter, the same clock on Linux. Its stamps of the HTTP process do not travel.
    first_seen_at = req.time_stats.scheduler_recv_time or now
    received_at = params.get(RECEIVED_AT, first_seen_at)
    # Higher first, as SGLang; None unless a client or SGLang's --enable-priority-scheduling gave one.
    priority = params.get(PRIORITY, req.priority)
    return RequestTerms(
        rid=req.rid,
        dispatch_rid=params.get(DISPATCH_RID, ""),
        received_at=received_at,
        sent_at=params.get(SENT_AT, first_seen_at),
        objective_s=objective_s,
        deadline_at=received_at + objective_s,
        slo_class=params.get(SLO_CLASS, ""),
        priority=0 if priority is None else priority,
    )


def _take(sampling_params: Any) -> dict[str, Any]:
    """Our keys, taken out of ``custom_params``. Nothing left is None, as it is when a client gives none."""
    params = sampling_params.custom_params
    if not isinstance(params, dict):
        return {}
    ours = {key: params[key] for key in (OBJECTIVE, *_OURS_ALONE) if key in params}
    if ours:
        sampling_params.custom_params = {key: value for key, value in params.items() if key not in ours} or None
    return ours
