"""Records and results of loads that never ran, for tests of what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence

from flowprefill_sglang.bench.client import RequestRecord
from flowprefill_sglang.bench.experiment import ExperimentSettings, Prepared, Result
from flowprefill_sglang.bench.measurement import Measurement
from flowprefill_sglang.bench.objectives import stated_objectives
from flowprefill_sglang.bench.probe import ServedModel
from flowprefill_sglang.bench.report import summarize
from flowprefill_sglang.workload.trace import TraceRequest

OBJECTIVES = stated_objectives({"text": 100.0, "file": 1_000.0})


def record(class_name: str, ttft_s: float | None, *, at: float = 0.0, late_s: float = 0.0) -> RequestRecord:
    """A request; without a TTFT, one that failed."""
    return RequestRecord(
        rid=f"{class_name}-{at}",
        class_name=class_name,
        input_tokens=10,
        output_tokens=1,
        scheduled_at=at,
        sent_at=at + late_s,
        first_token_at=None if ttft_s is None else at + late_s + ttft_s,
        finished_at=at + late_s + (ttft_s or 0.1),
        status=200 if ttft_s is not None else 503,
        error=None if ttft_s is not None else "HTTP 503: no worker 17",
        output_chars=1,
        output_sha256="",
    )


def result(ttfts_s: Sequence[float | None], class_name: str = "text") -> Result:
    """A load of one request a second."""
    records = [record(class_name, ttft_s, at=float(n)) for n, ttft_s in enumerate(ttfts_s)]
    requests = tuple(
        TraceRequest(arrival_s=float(n), input_tokens=10, output_tokens=1, class_name=class_name)
        for n in range(len(records))
    )
    prepared = Prepared(
        model=ServedModel(name="/models/tiny", max_context_tokens=1_000),
        requests=requests,
        length_factor=1.0,
        objectives=OBJECTIVES,
        isolated_ttft_s={},
    )
    return Result(prepared=prepared, records=records, report=summarize(records, OBJECTIVES), started_unix_at=0.0)


class NoProgress:
    """Shows nothing."""

    def load(self, what: str, requests: int):
        return lambda: None


def measurement(*results: Result) -> Measurement:
    """One that has these repeats."""
    found = Measurement(url="http://x", settings=ExperimentSettings(), progress=NoProgress())
    found.prepared = results[0].prepared
    found.results = list(results)
    return found
