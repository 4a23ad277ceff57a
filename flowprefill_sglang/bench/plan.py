"""From trace rows to requests that can be sent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from flowprefill_sglang.bench.client import PlannedRequest
from flowprefill_sglang.bench.endpoints import Endpoint
from flowprefill_sglang.bench.objectives import Objective
from flowprefill_sglang.workload.prompts import prompt_ids, prompt_text
from flowprefill_sglang.workload.trace import TraceRequest

PromptKind = Literal["bytes", "ids"]


def plan_requests(
    requests: Sequence[TraceRequest],
    *,
    run_id: str,
    seed: int,
    endpoint: Endpoint,
    model: str,
    prompts: PromptKind = "bytes",
    objectives: Mapping[str, Objective] | None = None,
    priorities: Mapping[str, int] | None = None,
) -> list[PlannedRequest]:
    """One planned request for each row, in the rows' order, with ``rid`` ``<run_id>-<row>``.

    ``prompts``: ``bytes`` sends text, exact for a byte-level tokenizer; ``ids`` sends token ids, exact for any model.
    Without ``objectives`` the server is told none. ``priorities`` are SGLang's, higher first, by class.
    A ``run_id`` that repeats on a server repeats its request ids too.
    """
    make_prompt = prompt_text if prompts == "bytes" else prompt_ids
    planned = []
    for row, request in enumerate(requests):
        rid = f"{run_id}-{row}"
        output_tokens = max(1, request.output_tokens)
        body = endpoint.build_body(rid, make_prompt(request, row, seed), output_tokens, model)
        if priorities is not None:
            body["priority"] = priorities[request.class_name]
        planned.append(
            PlannedRequest(
                rid=rid,
                class_name=request.class_name,
                at_s=request.arrival_s,
                input_tokens=request.input_tokens,
                output_tokens=output_tokens,
                endpoint=endpoint,
                body=json.dumps(body).encode(),
                slo_ms=objectives[request.class_name].slo_ms if objectives else None,
            )
        )
    return planned
