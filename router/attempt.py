"""What one attempt at a request is made of: who works on it, and what each side is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flowprefill_sglang.router.decode_registry import DecodeInstance
from flowprefill_sglang.router.http_client import Headers
from flowprefill_sglang.router.objectives import Terms
from flowprefill_sglang.router.pd_fields import ParsedRequest, with_pd_fields
from flowprefill_sglang.router.registry import PrefillWorker
from flowprefill_sglang.wire.messages import Dispatch


@dataclass(slots=True, kw_only=True)
class Pair:
    """Who works on one attempt."""

    prefill: PrefillWorker
    decode: DecodeInstance


def body_for(
    request: ParsedRequest, terms: Terms, names: list[str], pair: Pair, *, new_room: Callable[[], int]
) -> bytes:
    """The body that both sides of the pair get."""
    return with_pd_fields(
        request,
        names,
        host=pair.prefill.hello.bootstrap_host,
        port=pair.prefill.hello.bootstrap_port,
        new_room=new_room,
        priority=terms.header_priority,
    )


def dispatch_for(path: str, terms: Terms, *, rid: str, headers: Headers, age_s: float) -> Dispatch:
    """The message to the prefill worker, to be sent at once: ``age_s`` is the request's age of this moment."""
    return Dispatch(
        rid=rid,
        path=path,
        headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers],
        age_s=age_s,
        ttft_slo_s=terms.ttft_slo_s,
        slo_class=terms.slo_class,
        priority=terms.priority,
    )
