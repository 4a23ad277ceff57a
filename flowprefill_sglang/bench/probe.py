"""What to ask a server before loading it: which model it serves, and how fast single requests are."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from flowprefill_sglang.bench.client import PlannedRequest, replay
from flowprefill_sglang.bench.endpoints import Endpoint
from flowprefill_sglang.bench.plan import PromptKind, plan_requests
from flowprefill_sglang.errors import BadInput, PeerFault
from flowprefill_sglang.workload.trace import TraceRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A model as ``/v1/models`` lists it."""

    name: str
    max_context_tokens: int | None
    """None where the server does not say; ``max_model_len`` is an extension of SGLang and vLLM."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How an SGLang server forms its batches, by its own word."""

    schedule_policy: str
    chunked_prefill_size: int
    """Most new tokens of one forward pass; -1: no limit of this kind."""
    max_prefill_tokens: int

    def flags(self) -> str:
        """As SGLang's command line takes them."""
        return (
            f"--schedule-policy {self.schedule_policy} --chunked-prefill-size {self.chunked_prefill_size} "
            f"--max-prefill-tokens {self.max_prefill_tokens}"
        )


async def fetch_engine_settings(worker_url: str, *, timeout_s: float = 10.0) -> EngineSettings:
    """Those of the SGLang server at ``worker_url``. Raises PeerFault when it does not say."""
    address = f"{worker_url.rstrip('/')}/server_info"
    info = await _get_json(address, timeout_s)
    try:
        return EngineSettings(
            schedule_policy=str(info["schedule_policy"]),
            chunked_prefill_size=int(info["chunked_prefill_size"]),
            max_prefill_tokens=int(info["max_prefill_tokens"]),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise PeerFault(f"{address} does not say how the server forms its batches") from error


async def fetch_model(
    url: str, name: str | None = None, *, headers: Mapping[str, str] | None = None, timeout_s: float = 10.0
) -> ServedModel:
    """The model of this name that the server lists, or the first.

    Raises PeerFault when the server is not to be had or lists no model, BadInput when it does not list this one.
    """
    listing = f"{url.rstrip('/')}/v1/models"
    document = await _get_json(listing, timeout_s, headers)
    try:
        models = {str(model["id"]): model for model in document["data"]}
        chosen = next(iter(models)) if name is None else name
        if chosen not in models:
            raise BadInput(f"the server has no model {chosen!r}; it lists {', '.join(models)}")
        context = models[chosen].get("max_model_len")
        return ServedModel(name=chosen, max_context_tokens=None if context is None else int(context))
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise PeerFault(f"{listing} does not list a model") from error


async def _get_json(
    address: str, timeout_s: float, headers: Mapping[str, str] | None = None
) -> Any:  # any JSON document, checked by the caller
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s), headers=headers) as session,
            session.get(address, raise_for_status=True) as response,
        ):
            return await response.json()
    except TimeoutError as error:
        raise PeerFault(f"no answer from {address} within {timeout_s:g} s") from error
    except aiohttp.ClientError as error:
        raise PeerFault(f"nothing from {address}: {error}") from error
    except ValueError as error:
        raise PeerFault(f"{address} did not answer with JSON") from error


async def measure_isolated_ttft(
    url: str,
    medians: Mapping[str, int],
    *,
    endpoint: Endpoint,
    model: str,
    prompts: PromptKind,
    seed: int,
    repeats: int = 3,
    headers: Mapping[str, str] | None = None,
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
        ttft_s = await _send_alone(url, planned, headers)
        if number >= len(medians):
            ttfts[planned.class_name].append(ttft_s)
    return ttfts


async def warm_up(
    url: str,
    requests: Sequence[TraceRequest],
    *,
    endpoint: Endpoint,
    model: str,
    prompts: PromptKind,
    seed: int,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Send these requests one after another, with content that no load of the same seed repeats. Raises PeerFault."""
    plan = plan_requests(
        requests, run_id=f"warm-{uuid.uuid4().hex[:12]}", seed=~seed, endpoint=endpoint, model=model, prompts=prompts
    )
    for planned in plan:
        await _send_alone(url, planned, headers)


async def _send_alone(url: str, planned: PlannedRequest, headers: Mapping[str, str] | None) -> float:
    """Its TTFT in seconds. Raises PeerFault when it fails."""
    (record,) = await replay(url, [planned], timeout_s=120, headers=headers)
    if record.error is not None or record.ttft_s is None:
        raise PeerFault(f"a single request of {record.input_tokens} tokens failed: {record.error}")
    return record.ttft_s
