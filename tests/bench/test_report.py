from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from flowprefill_sglang.bench.client import RequestRecord
from flowprefill_sglang.bench.objectives import unscaled_objectives
from flowprefill_sglang.bench.report import errors_by_kind, percentile, summarize, to_document, to_table

OBJECTIVES = unscaled_objectives()


def record(
    class_name: str, ttft_s: float | None, error: str | None = None, late_s: float = 0.0, at: float = 0.0
) -> RequestRecord:
    return RequestRecord(
        rid="r",
        class_name=class_name,
        input_tokens=100,
        output_tokens=10,
        scheduled_at=at,
        sent_at=at + late_s,
        first_token_at=None if ttft_s is None else at + late_s + ttft_s,
        finished_at=at + late_s + (ttft_s or 0) + 0.5,
        status=200,
        error=error,
        output_chars=10,
        output_sha256="",
    )


records = st.lists(
    st.builds(
        record,
        st.sampled_from(["text", "image", "search", "file"]),
        st.one_of(st.none(), st.floats(0, 10)),
        st.sampled_from([None, None, "broken"]),
    ),
    max_size=40,
)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-9)


@given(records)
def test_nothing_is_lost_and_nothing_counted_twice(rows: list[RequestRecord]) -> None:
    report = summarize(rows, OBJECTIVES)
    assert report.requests == len(rows)
    assert report.succeeded == sum(r.error is None for r in rows)
    assert sum(count for _, count in report.errors) == report.requests - report.succeeded
    assert report.attained <= report.succeeded
    for c in report.classes:
        assert 0 <= c.attained <= c.succeeded <= c.count
        assert c.succeeded == 0 or math.isnan(c.ttft_p50_ms) or c.ttft_p50_ms <= c.ttft_p90_ms <= c.ttft_p99_ms


@given(records)
def test_the_document_has_the_stable_keys_and_is_plain_json(rows: list[RequestRecord]) -> None:
    report = summarize(rows, OBJECTIVES)
    document = json.loads(json.dumps(to_document(report, OBJECTIVES), allow_nan=False))
    assert {"requests", "succeeded", "wall_s", "classes", "attainment", "goodput_rps", "client_late"} <= set(document)
    assert set(document["classes"]) == {r.class_name for r in rows}
    for numbers in document["classes"].values():
        stable = {"count", "slo_ms", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "attainment"}
        assert stable <= set(numbers)


def test_numbers() -> None:
    rows = [
        record("text", 0.1),
        record("text", 0.25, late_s=0.2),
        record("text", 0.3, at=9.0),
        record("text", 0.01, error="the stream ended before [DONE]"),
        record("file", 5.0),
    ]
    report = summarize(rows, OBJECTIVES)
    text, file = report.classes
    assert (text.count, text.succeeded, text.attained, text.attainment) == (4, 3, 2, 0.5)
    assert (text.ttft_p50_ms, text.ttft_p99_ms) == (pytest.approx(250), pytest.approx(299))
    assert (file.name, file.slo_ms, file.attainment) == ("file", 6_000, 1)
    document = to_document(report, OBJECTIVES)
    assert document["wall_s"] == 9.8
    assert document["goodput_rps"] == pytest.approx(3 / 9.8, abs=1e-3)
    assert document["input_tokens_per_s"] == pytest.approx(400 / 9.8, abs=0.1)
    assert document["attainment"] == 0.6
    assert (document["client_late"], document["client_late_max_ms"]) == (True, 200)
    assert document["errors"] == [{"error": "the stream ended before [DONE]", "count": 1}]


def test_the_table_says_it_in_eighty_columns() -> None:
    report = summarize([record("text", 0.1), record("file", None, error="x")], OBJECTIVES)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(to_table(report, OBJECTIVES))
    text = console.export_text()
    for word in ("text", "file", "100 ms", "250 ms", "6,000 ms", "100%", "0%", "–", "1 of 2 requests succeeded"):
        assert word in text
    assert "…" not in text


def test_a_class_without_an_objective_is_our_bug() -> None:
    with pytest.raises(KeyError):
        summarize([record("video", 0.1)], OBJECTIVES)


def test_errors_of_one_cause_are_one_kind() -> None:
    errors = [
        "HTTP 503: no worker 17",
        "HTTP 503: no worker 4",
        "HTTP 500: x",
        "41 tokens instead of 64 (finish: stop)",
    ]
    rows = [record("text", None, error) for error in [*errors, "40 tokens instead of 64 (finish: stop)", errors[0]]]
    kinds = errors_by_kind(summarize(rows, OBJECTIVES))
    assert kinds == [
        ("HTTP 503", 3, "HTTP 503: no worker 17"),
        ("N tokens instead of N", 2, "41 tokens instead of 64 (finish: stop)"),
        ("HTTP 500", 1, "HTTP 500: x"),
    ]
