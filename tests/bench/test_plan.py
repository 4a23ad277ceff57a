from __future__ import annotations

import json

from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.objectives import unscaled_objectives
from flowprefill_sglang.bench.plan import plan_requests
from flowprefill_sglang.workload.generator import generate_workload
from flowprefill_sglang.workload.trace import TraceRequest


def test_rows_become_requests_one_to_one() -> None:
    rows = generate_workload(requests=30, rate_rps=3, seed=1).requests
    planned = plan_requests(
        rows, run_id="x", seed=1, endpoint=ENDPOINTS["completions"], model="m", objectives=unscaled_objectives(2)
    )
    assert len({p.rid for p in planned}) == 30
    for row, request in zip(rows, planned, strict=True):
        body = json.loads(request.body)
        assert (request.at_s, request.class_name) == (row.arrival_s, row.class_name)
        assert len(body["prompt"]) + 1 == row.input_tokens
        assert (body["model"], body["max_tokens"], body["stream"]) == ("m", row.output_tokens, True)
        assert request.slo_ms == 2 * {"text": 250, "image": 500, "search": 4_000, "file": 6_000}[row.class_name]


def test_token_ids_and_answers_of_no_token() -> None:
    row = TraceRequest(arrival_s=0, input_tokens=7, output_tokens=0, class_name="text")
    (planned,) = plan_requests([row], run_id="x", seed=1, endpoint=ENDPOINTS["generate"], model="m", prompts="ids")
    body = json.loads(planned.body)
    assert len(body["input_ids"]) == 7
    assert "text" not in body
    assert body["sampling_params"]["max_new_tokens"] == planned.output_tokens == 1
    assert planned.slo_ms is None
