from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from flowprefill_sglang.bench.goodput import Estimate
from flowprefill_sglang.bench.measurement_report import (
    measured_curves,
    measurement_document,
    pooled_report,
    rate_table,
    refusal_document,
    sentences,
)
from flowprefill_testing.loads import measurement, result

TWO = result([0.05] * 10), result([0.05] * 8 + [0.5, None])
"""Ten in time, then eight, one late and one failed."""


def test_repeats_are_pooled_and_their_spread_kept() -> None:
    document = json.loads(json.dumps(measurement_document(measurement(*TWO)), allow_nan=False))
    assert (document["requests"], document["succeeded"], document["attainment"]) == (20, 19, 0.9)
    assert document["classes"]["text"]["count"] == 20
    assert document["spread"]["attainment"] == {"median": 0.9, "min": 0.8, "max": 1.0}
    assert document["spread"]["classes"]["text"]["ttft_p99_ms"]["max"] > 100
    assert [repeat["attainment"] for repeat in document["repeats"]] == [1.0, 0.8]
    assert [record["repeat"] for record in document["records"]] == [0] * 10 + [1] * 10
    assert document["errors_by_kind"] == {"HTTP 503": 1}
    assert document["client_late"] is False
    assert document["model"]["name"] == "tiny"
    assert document["max_goodput"] is None


def test_goodput_is_per_second_of_all_repeats_together() -> None:
    pooled = pooled_report(TWO)
    assert pooled.wall_s == pytest.approx(sum(r.report.wall_s for r in TWO))
    assert pooled.goodput_rps == pytest.approx(18 / pooled.wall_s)


def test_own_rate_is_a_point_of_the_curve() -> None:
    measured = measurement(*TWO)
    measured.rows = [
        {
            "rate_rps": 3.0,
            "requests": 10,
            "attained": 5,
            "cut_short": False,
            "classes": {"text": {"requests": 10, "attained": 5}},
        }
    ]
    by_scale, by_rate = measured_curves(measured, (1.0, 20.0))
    assert by_scale[0].attainment == (0.9, 0.95)
    assert (by_rate[0].x, by_rate[0].attainment) == ((1.0, 3.0), (0.9, 0.5))
    assert measurement_document(measured)["goodput_by_rate"] == [[1.0, 0.9], [3.0, 1.5]]
    console = Console(file=io.StringIO(), width=100)
    console.print(rate_table(by_rate))
    assert "1.50/s" in console.file.getvalue()


def test_sentences_say_when_a_rate_is_only_a_bound() -> None:
    measured = measurement(*TWO)
    measured.found = [
        Estimate(rate_rps=4.0, passed_rps=3.5, is_bracketed=True),
        Estimate(rate_rps=6.0, passed_rps=6.0, is_bracketed=False),
    ]
    repeats, found = sentences(measured)
    assert "over 2 repeats: attainment 90% (median; 80–100)" in repeats
    assert repeats.endswith("99% of the requests left within 0 ms of their time")
    assert sentences(measurement(TWO[0]))[0].startswith("attainment 100%, goodput 1.1")
    assert "90% of requests are in time: 5.00 requests/s (median; 4.00–6.00) (at least that" in found
    assert measurement_document(measured)["max_goodput"]["rps"] == {"median": 5.0, "min": 4.0, "max": 6.0}


def test_a_refusal_keeps_the_rows_and_has_no_numbers() -> None:
    document = refusal_document(measurement(TWO[0]), "fell behind")
    assert (document["client_late"], document["attainment"], document["goodput_rps"]) == (True, None, None)
    assert document["classes"] == {}
    assert len(document["records"]) == 10
