"""A measurement as JSON and for people: numbers over all repeats, their spread, curves, and the raw rows. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.table import Table

from flowprefill_sglang.bench import curves
from flowprefill_sglang.bench.curves import SLO_SCALES, Curve, rate_curves, slo_scale_curves
from flowprefill_sglang.bench.experiment import Result, model_document
from flowprefill_sglang.bench.measurement import Measurement
from flowprefill_sglang.bench.objectives import REFERENCE
from flowprefill_sglang.bench.report import Report, pooled, summarize, to_document
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.workload.trace import mean_rate

SPREAD_OF = ("attainment", "goodput_rps")
SPREAD_OF_CLASS = ("attainment", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": round(median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def pooled_report(results: Sequence[Result]) -> Report:
    """All repeats together: counts add up, percentiles are over all their answers."""
    records = [record for result in results for record in result.records]
    return pooled([result.report for result in results], summarize(records, results[0].prepared.objectives))


def own_rate_row(result: Result, repeat: int) -> dict[str, Any] | None:
    """A repeat as a point of the curve against the rate; None for a workload that has no rate."""
    try:
        rate_rps = mean_rate(result.prepared.requests)
    except BadInput:
        return None
    classes = {c.name: {"requests": c.count, "attained": c.attained} for c in result.report.classes}
    counts = {"requests": result.report.requests, "attained": result.report.attained}
    return {"repeat": repeat, "rate_rps": round(rate_rps, 4), "cut_short": False} | counts | {"classes": classes}


def measured_curves(measurement: Measurement, scales: Sequence[float] = SLO_SCALES) -> tuple[list[Curve], list[Curve]]:
    """Against the objectives' scale, and against the rate."""
    results = measurement.results
    records = [record for result in results for record in result.records]
    own = [row for repeat, result in enumerate(results) if (row := own_rate_row(result, repeat)) is not None]
    return (
        slo_scale_curves(records, results[0].prepared.objectives, scales),
        rate_curves([*own, *measurement.rows]),
    )


def measurement_document(measurement: Measurement, scales: Sequence[float] = SLO_SCALES) -> dict[str, Any]:
    """The JSON document: the keys of one report over all repeats, and what else was measured."""
    results = measurement.results
    prepared = results[0].prepared
    by_scale, by_rate = measured_curves(measurement, scales)
    repeats = [to_document(result.report, prepared.objectives) for result in results]
    return (
        to_document(pooled_report(results), prepared.objectives)
        | _about(measurement)
        | {
            "repeats": repeats,
            "spread": repeats_spread(repeats),
            "attainment_by_slo_scale": curves.to_document(by_scale),
            "attainment_by_rate": curves.to_document(by_rate),
            "goodput_by_rate": [
                [rate, round(rate * share, 4)] for rate, share in curves.to_document(by_rate).get("all", [])
            ],
            "max_goodput": _max_goodput(measurement),
            "rate_rows": measurement.rows,
            "records": records_document(results),
        }
    )


def refusal_document(measurement: Measurement, reason: str) -> dict[str, Any]:
    """What is written when the client fell behind: the raw rows, which show it, and no result."""
    nothing: dict[str, Any] = {"attainment": None, "goodput_rps": None, "classes": {}}
    late = {"client_late": True, "refused": reason}
    return nothing | late | _about(measurement) | {"records": records_document(measurement.results)}


def _about(measurement: Measurement) -> dict[str, Any]:
    prepared = measurement.prepared
    is_measured = any(o.isolated_ttft_ms is not None for o in prepared.objectives.values())
    return {
        "length_factor": prepared.length_factor,
        "objectives_reference": REFERENCE if is_measured else None,
        "isolated_ttft_s": prepared.isolated_ttft_s,
        "model": model_document(prepared.model),
        "warm_up_requests": measurement.warm_up_requests,
    }


def records_document(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every request of every repeat."""
    return [{"repeat": n} | asdict(record) for n, result in enumerate(results) for record in result.records]


def repeats_spread(repeats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and most over the repeats, for everything that has a value in each of them."""
    found: dict[str, Any] = {key: _spread_of([r[key] for r in repeats]) for key in SPREAD_OF}
    found["classes"] = {
        name: {key: _spread_of([r["classes"].get(name, {}).get(key) for r in repeats]) for key in SPREAD_OF_CLASS}
        for name in repeats[0]["classes"]
    }
    return found


def _spread_of(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return spread(known) if len(known) == len(values) else None


def _max_goodput(measurement: Measurement) -> dict[str, Any] | None:
    if not measurement.found:
        return None
    return {
        "target_attainment": measurement.target,
        "rps": spread([found.rate_rps for found in measurement.found]),
        "is_bracketed": all(found.is_bracketed for found in measurement.found),
        "repeats": [asdict(found) for found in measurement.found],
    }


def sentences(measurement: Measurement) -> list[str]:
    """What does not fit the table of classes."""
    reports = [result.report for result in measurement.results]
    shares = spread([100 * report.attainment for report in reports])
    rates = spread([report.goodput_rps for report in reports])
    over = f"over {len(reports)} repeats: " if len(reports) > 1 else ""
    said = [
        f"{over}attainment {_range(shares, '%', 0)}, goodput {_range(rates, ' requests/s', 2)}; "
        f"99% of the requests left within {max(report.late_p99_ms for report in reports):.0f} ms of their time"
    ]
    if measurement.found:
        rates = spread([found.rate_rps for found in measurement.found])
        bound = "" if all(found.is_bracketed for found in measurement.found) else _bound(measurement)
        said.append(
            f"max goodput, the rate at which {100 * measurement.target:.0f}% of requests are in time: "
            f"{_range(rates, ' requests/s', 2)}{bound}"
        )
    return said


def _bound(measurement: Measurement) -> str:
    passed = any(found.passed_rps for found in measurement.found if not found.is_bracketed)
    direction = (
        "at least that: every rate that was tried passed" if passed else "less: every rate that was tried failed"
    )
    return f" ({direction}; more --probes would find it)"


def _range(values: dict[str, float], unit: str, digits: int) -> str:
    low, middle, high = (f"{values[key]:.{digits}f}" for key in ("min", "median", "max"))
    return f"{middle}{unit}" if low == high else f"{middle}{unit} (median; {low}–{high})"


def rate_table(curves_by_rate: Sequence[Curve]) -> Table:
    """Attainment at every rate, one column a class."""
    table = Table(title="Attainment by rate")
    table.add_column("requests/s", justify="right")
    for curve in curves_by_rate:
        table.add_column(curve.name, justify="right")
    table.add_column("goodput", justify="right")
    for place, rate in enumerate(curves_by_rate[0].x):
        shares = [curve.attainment[place] for curve in curves_by_rate]
        cells = ["–" if math.isnan(share) else f"{100 * share:.0f}%" for share in shares]
        table.add_row(f"{rate:.2f}", *cells, f"{rate * shares[0]:.2f}/s")
    return table
