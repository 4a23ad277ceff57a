from __future__ import annotations

import io
import json
from collections.abc import Sequence

from rich.console import Console

from flowprefill_sglang.bench.client import RequestRecord
from flowprefill_sglang.bench.comparison import (
    Contestant,
    comparison_document,
    comparison_table,
    facts,
    outline,
    unevenness,
)
from flowprefill_sglang.bench.experiment import Prepared, Result
from flowprefill_sglang.bench.objectives import unscaled_objectives
from flowprefill_sglang.bench.probe import EngineSettings, ServedModel
from flowprefill_sglang.bench.report import summarize
from flowprefill_sglang.observe.events import Event, TaskFinished, TaskPreempted, TaskStarted
from flowprefill_sglang.observe.recording import Recording

STARTED_UNIX_AT = 1_000.0
OBJECTIVES = unscaled_objectives()


def record(number: int, class_name: str, ttft_s: float | None, error: str | None = None) -> RequestRecord:
    return RequestRecord(
        rid=f"r-{number}",
        class_name=class_name,
        input_tokens=100,
        output_tokens=10,
        scheduled_at=number,
        sent_at=number,
        first_token_at=None if ttft_s is None else number + ttft_s,
        finished_at=number + 1.0,
        status=200,
        error="HTTP 503" if ttft_s is None else error,
        output_chars=10,
        output_sha256="",
    )


def contestant(
    scheduler: str, records: Sequence[RequestRecord], events: Sequence[Event] = (), isolated_ttft_s: float = 0.01
) -> Contestant:
    """On a host whose monotonic clock read 500 when the load started."""
    prepared = Prepared(
        model=ServedModel(name="/models/tiny", max_context_tokens=1_000),
        requests=(),
        length_factor=1.0,
        objectives=OBJECTIVES,
        isolated_ttft_s={"text": [isolated_ttft_s, 2 * isolated_ttft_s]},
    )
    report = summarize(records, OBJECTIVES)
    return Contestant(
        scheduler=scheduler,
        result=Result(prepared=prepared, records=list(records), report=report, started_unix_at=STARTED_UNIX_AT),
        recordings=[Recording(worker="w", monotonic_now=600.0, unix_now=1_100.0, events=list(events), lost=3)],
        engine=EngineSettings(schedule_policy="fcfs", chunked_prefill_size=4_096, max_prefill_tokens=16_384),
    )


def preempted(at: float, task: int = 1) -> TaskPreempted:
    return TaskPreempted(at=at, task=task, rids=["r-1"], victim_class="file", by_class="text", blocking_s=0.001)


def ran(task: int, rid: str, start_at: float, end_at: float) -> list[Event]:
    spent = {"new_tokens": 10, "predicted_s": 0.1}
    return [
        TaskStarted(at=start_at, task=task, rids=[rid], cached_tokens=0, deadline_at=1e9, **spent),
        TaskFinished(at=end_at, task=task, rids=[rid], executed_s=end_at - start_at, preemptions=0, **spent),
    ]


FLOW = contestant(
    "flowprefill",
    [record(1, "text", 0.1), record(2, "text", 0.2), record(3, "file", 5.0)],
    [preempted(499.0), preempted(501.0), preempted(502.0)],
)
STOCK = contestant(
    "stock", [record(1, "text", 1.1), record(2, "text", 0.2), record(3, "file", None)], ran(1, "r-1", 499.0, 501.5)
)


def test_preemptions_are_those_of_the_run() -> None:
    assert (FLOW.preemptions, STOCK.preemptions) == (2, 0), "one came with the single requests before"


def test_busy_share_is_within_the_run() -> None:
    wall_s = STOCK.result.report.wall_s
    assert STOCK.busy_share == 1.5 / wall_s
    assert "prefill workers computed 50% of the time, and" in outline(STOCK)
    assert "computed" not in outline(contestant("stock", [record(1, "text", 0.1)]))


def test_the_time_after_the_prefill_is_that_of_the_last_chunk() -> None:
    chunks = [*ran(1, "r-1", 501.0, 502.0), *ran(2, "r-1", 502.0, 502.5)]
    one = contestant("stock", [record(1, "text", 1.75), record(2, "text", None)], chunks)
    assert one.after_prefill_ms() == [250.0]
    assert "the first token came 250 ms (p50), 250 ms (p99) after the end of the prefill" in outline(one)
    document = comparison_document([one], None)
    assert document["schedulers"]["stock"]["after_prefill_ms"] == {"p50": 250.0, "p90": 250.0, "p99": 250.0}
    assert FLOW.after_prefill_ms() == [], "its end was not recorded"


def test_the_table_has_both_runs_in_eighty_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(FLOW, STOCK))
    text = console.export_text()
    assert "FlowPrefill | stock SGLang" in text
    rows = {words[0]: words for line in text.splitlines() if (words := line.split())}
    assert rows["text"][1:6] == ["2", "250", "150", "|", "650"]
    assert rows["text"][-3:] == ["100%", "|", "50%"]
    assert rows["file"][-3:] == ["100%", "|", "0%"]
    assert rows["all"] == ["all", "3", "100%", "|", "33%"]
    assert "–" in rows["file"], "a class without an answer has no percentiles"
    assert "…" not in text


def test_facts_are_counts() -> None:
    assert facts(FLOW, STOCK) == (
        "Of the same 3 requests, 3 had their first token in time under FlowPrefill and 1 under stock SGLang; "
        "FlowPrefill suspended running prefills 2 times, stock SGLang 0 times."
    )


def test_a_machine_that_was_busy_in_one_run_is_noticed() -> None:
    rows = [record(1, "text", 0.1)]
    assert unevenness(FLOW, STOCK) is None
    assert unevenness(contestant("flowprefill", rows, isolated_ttft_s=0.0115), STOCK) is None
    for isolated_ttft_s, said in ((0.03, "3.00 times"), (0.005, "0.50 times")):
        warning = unevenness(contestant("flowprefill", rows, isolated_ttft_s=isolated_ttft_s), STOCK)
        assert warning is not None
        assert warning.startswith(f"single requests took {said} as long in FlowPrefill's run as in stock SGLang's")


def test_the_document_keeps_its_keys_and_has_every_scheduler() -> None:
    document = json.loads(json.dumps(comparison_document([FLOW, STOCK], "t.png"), allow_nan=False))
    assert {"requests", "succeeded", "wall_s", "classes", "records"} <= set(document)
    assert (document["requests"], document["succeeded"], document["timeline"]) == (3, 3, "t.png")
    assert list(document["schedulers"]) == ["flowprefill", "stock"]
    stock = document["schedulers"]["stock"]
    assert (stock["requests"], stock["succeeded"], stock["preemptions"], stock["events_lost"]) == (3, 2, 0, 3)
    stable = {"count", "slo_ms", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "attainment"}
    assert stable <= set(stock["classes"]["text"])
    assert stock["engine"]["chunked_prefill_size"] == 4_096
    assert stock["isolated_ttft_ms"] == {"text": [10, 20]}
    assert len(stock["records"]) == 3
    assert document["schedulers"]["flowprefill"]["busy_share"] is None, "nothing ran that was recorded"


def test_its_panel_has_the_clients_own_times() -> None:
    (task, waited) = STOCK.panel().tasks
    (request,) = task.requests
    assert (request.number, request.slo_class, request.arrived_at, request.is_late) == (1, "text", 1.0, True)
    assert [(s.start_at, s.end_at) for s in task.segments] == [(-1.0, 1.5)]
    assert (waited.requests[0].number, waited.segments, waited.end_at) == (3, (), 4.0), "the request that failed"
    broken = contestant("stock", [record(1, "text", 0.1, error="the stream ended before [DONE]")])
    assert [t.requests[0].first_token_at for t in broken.panel().tasks] == [None]
