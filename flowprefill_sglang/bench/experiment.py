"""One workload on one server, from the model's limits to the report: ``demo`` and ``bench`` once a server is there."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from flowprefill_sglang.bench.client import PlannedRequest, RequestRecord, replay
from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.objectives import (
    REFERENCE,
    Objective,
    median_prompts,
    scaled_objectives,
    stated_objectives,
    unscaled_objectives,
)
from flowprefill_sglang.bench.plan import PromptKind, plan_requests
from flowprefill_sglang.bench.probe import ServedModel, fetch_model, measure_isolated_ttft
from flowprefill_sglang.bench.report import Report, summarize, to_document
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.workload.trace import TraceRequest, at_rate, cap_outputs, fitting_length_factor, scale_lengths


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings:
    """How to run a workload."""

    endpoint: Literal["chat", "completions", "generate"] = "generate"
    prompts: PromptKind = "bytes"
    seed: int = 0
    length_scale: float | None = None
    """None: the largest factor up to 1 with which every prompt fits the model's context."""
    max_output_tokens: int = 16
    slo_factor: float | None = None
    """Objectives are this many times the paper's; None: measure single requests first and scale by those."""
    slo_ms: Mapping[str, float] = field(default_factory=dict)
    """Objectives that the user states, by class; these are neither measured nor scaled."""
    model: str | None = None
    """None: the first that the server lists."""
    api_key: str | None = None
    timeout_s: float = 300.0
    """For one request."""

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def content_seed(self, number: int) -> int:
        """Seed of the prompts' content of the ``number``-th load on a server.

        Lengths and times are the same for all loads; content is not, or the prefix cache would know it already.
        """
        return self.seed + 1_000_003 * number


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A workload that fits a server, and what is asked of the server."""

    model: ServedModel
    requests: tuple[TraceRequest, ...]
    length_factor: float
    objectives: dict[str, Objective]
    isolated_ttft_s: dict[str, list[float]]
    """TTFTs of each class's median prompt, alone on this server; empty when it was not asked."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out."""

    prepared: Prepared
    records: list[RequestRecord]
    report: Report
    started_unix_at: float
    """Time of day of the records' zero, in seconds."""

    def to_document(self) -> dict[str, Any]:
        """The JSON document, raw rows included."""
        prepared = self.prepared
        measured = any(o.isolated_ttft_ms is not None for o in prepared.objectives.values())
        return to_document(self.report, prepared.objectives) | {
            "length_factor": prepared.length_factor,
            "objectives_reference": REFERENCE if measured else None,
            "model": model_document(prepared.model),
            "records": [asdict(record) for record in self.records],
        }


def model_document(model: ServedModel) -> dict[str, Any]:
    """A JSON object; a model's name is often the path of its folder, which is nobody's business."""
    return {"name": Path(model.name).name, "max_context_tokens": model.max_context_tokens}


async def prepare(url: str, requests: Sequence[TraceRequest], settings: ExperimentSettings) -> Prepared:
    """Scale the workload to the server's model, and set objectives. Every request needs one of the four classes.

    Raises PeerFault when the server does not answer single requests, BadInput when a stated length scale is too large
    for its model, or the server has no such model.
    """
    model = await fetch_model(url, settings.model, headers=settings.headers)
    fitted, factor = _fit(requests, model, settings)
    medians = {name: n for name, n in median_prompts(fitted).items() if name not in settings.slo_ms}
    isolated_ttft_s: dict[str, list[float]] = {}
    if settings.slo_factor is not None:
        objectives = unscaled_objectives(settings.slo_factor)
    elif medians:
        isolated_ttft_s = await measure_isolated_ttft(
            url,
            medians,
            endpoint=ENDPOINTS[settings.endpoint],
            model=model.name,
            prompts=settings.prompts,
            seed=settings.seed,
            headers=settings.headers,
        )
        objectives = scaled_objectives(medians, isolated_ttft_s, factor)
    else:
        objectives = {}
    return Prepared(
        model=model,
        requests=fitted,
        length_factor=factor,
        objectives=objectives | stated_objectives(settings.slo_ms),
        isolated_ttft_s=isolated_ttft_s,
    )


def _fit(
    requests: Sequence[TraceRequest], model: ServedModel, settings: ExperimentSettings
) -> tuple[tuple[TraceRequest, ...], float]:
    """The requests at a length that fits the model, as far as it states a limit, and the factor."""
    context, output_tokens = model.max_context_tokens, settings.max_output_tokens
    fitting = 1.0 if context is None else fitting_length_factor(requests, context, output_tokens)
    factor = fitting if settings.length_scale is None else settings.length_scale
    fitted = cap_outputs(scale_lengths(requests, factor), output_tokens)
    longest = max(r.input_tokens + r.output_tokens for r in fitted)
    if context is not None and longest > context:
        raise BadInput(
            f"--length-scale {factor:g} makes a request of {longest} tokens, the model's context has {context}; "
            f"the largest scale that fits is about {fitting:g}"
        )
    return fitted, factor


def plan(
    prepared: Prepared, settings: ExperimentSettings, *, number: int = 0, rate_rps: float | None = None
) -> list[PlannedRequest]:
    """The workload as requests to send, at its own rate or another. Request ids are new for each call.

    ``number`` tells loads on one server apart (``ExperimentSettings.content_seed``).
    """
    requests = prepared.requests if rate_rps is None else at_rate(prepared.requests, rate_rps)
    return plan_requests(
        requests,
        run_id=f"load-{uuid.uuid4().hex[:12]}",
        seed=settings.content_seed(number),
        endpoint=ENDPOINTS[settings.endpoint],
        model=prepared.model.name,
        prompts=settings.prompts,
        objectives=prepared.objectives,
    )


async def run(
    url: str,
    prepared: Prepared,
    settings: ExperimentSettings,
    on_record: Callable[[RequestRecord], None] | None = None,
    *,
    number: int = 0,
) -> Result:
    """Replay the workload and sum it up. ``number``: see ``plan``."""
    planned = plan(prepared, settings, number=number)
    started_at, started_unix_at = time.perf_counter(), time.time()
    records = await replay(
        url,
        planned,
        timeout_s=settings.timeout_s,
        on_record=on_record,
        headers=settings.headers,
        started_at=started_at,
    )
    return Result(
        prepared=prepared,
        records=records,
        report=summarize(records, prepared.objectives),
        started_unix_at=started_unix_at,
    )
