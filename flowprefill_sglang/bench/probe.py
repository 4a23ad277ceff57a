"""What to ask a server before loading it: which model it serves, and how fast single requests are."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from flowprefill_sglang.bench.client import replay
from flowprefill_sglang.bench.endpoints import Endpoint
from flowprefill_sglang.bench.plan import PromptKind, plan_requests
from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.workload.trace import TraceRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A model as ``/v1/models`` lists it."""

    name: str
    max_context_tokens: int


async def fetch_model(url: str, *, timeout_s: float = 10.0) -> ServedModel:
    """The first model that the server lists. Raises PeerFault when there is none or the server is not to be had."""
    listing = f"{url.rstrip('/')}/v1/models"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session,
            session.get(listing, raise_for_status=True) as response,
        ):
            document: Any = await response.json()  # checked below, field by field
        first = document["data"][0]
        return ServedModel(name=str(first["id"]), max_context_tokens=int(first["max_model_len"]))
    except TimeoutError as error:
        raise PeerFault(f"no answer from {listing} within {timeout_s:g} s") from error
    except aiohttp.ClientError as error:
        raise PeerFault(f"no model list from {listing}: {error}") from error
    except (LookupError, TypeError, ValueError) as error:
        raise PeerFault(f"{listing} does not list a model with its max_model_len") from error


async def measure_isolated_ttft(
    url: str,
    medians: Mapping[str, int],
    *,
    endpoint: Endpoint,
    model: str,
    prompts: PromptKind,
    seed: int,
    repeats: int = 3,
) -> dict[str, list[float]]:
    """Send one request at a time, each class's median prompt ``repeats`` times in turn; TTFTs in seconds per class.

    One more round goes first and does not count: it warms every process up. No two prompts share a prefix. Raises
    PeerFault when a request fails.
    """
    ttfts: dict[str, list[float]] = {name: [] for name in medians}
    rounds = [name for _ in range(repeats + 1) for name in medians]
    rows = [TraceRequest(arrival_s=0, input_tokens=medians[n], output_tokens=1, class_name=n) for n in rounds]
    # A seed of their own, so that the load's prompts are not in a cache yet.
    plan = plan_requests(
        rows, run_id=f"isolated-{uuid.uuid4().hex[:12]}", seed=~seed, endpoint=endpoint, model=model, prompts=prompts
    )
    for number, planned in enumerate(plan):
        (record,) = await replay(url, [planned], timeout_s=120)
        if record.error is not None or record.ttft_s is None:
            raise PeerFault(f"a single request of {record.input_tokens} tokens failed: {record.error}")
        if number >= len(medians):
            ttfts[record.class_name].append(record.ttft_s)
    return ttfts
