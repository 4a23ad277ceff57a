"""A suite's result as JSON, as a table, and as a report in Markdown. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from flowprefill_sglang.bench import curves
from flowprefill_sglang.bench.curves import Curve, rate_curves, slo_scale_curves
from flowprefill_sglang.bench.goodput import falling
from flowprefill_sglang.bench.measurement_report import spread
from flowprefill_sglang.bench.objectives import REFERENCE
from flowprefill_sglang.bench.suite import Suite

SMOKE_RUN = "A smoke run (--quick): one short window, whose figures mean nothing."


def rates_of(suite: Suite) -> dict[str, list[float]]:
    """Maximum goodput of each configuration in each window, in requests per second."""
    return {name: [estimate.rate_rps for estimate in found.values()] for name, found in suite.found.items()}


def ratios_of(suite: Suite) -> dict[str, dict[str, float]]:
    """The first configuration's maximum goodput over each other's, taken within a window; median, least and most."""
    rates = rates_of(suite)
    first, *others = rates
    return {
        f"{first}/{name}": spread([a / b for a, b in zip(rates[first], rates[name], strict=True)]) for name in others
    }


def is_bracketed(suite: Suite, name: str) -> bool:
    """Whether a configuration's maximum lies between probes in every window; else it is a bound."""
    return all(estimate.is_bracketed for estimate in suite.found[name].values())


def suite_document(suite: Suite) -> dict[str, Any]:
    """The JSON document, raw rows included."""
    ratios = ratios_of(suite)
    is_measured = any(objective.isolated_ttft_ms is not None for objective in suite.objectives.values())
    return {
        "configs": {
            name: {
                "max_goodput_rps": spread(rates),
                "is_bracketed": is_bracketed(suite, name),
                "windows": {str(number): asdict(estimate) for number, estimate in suite.found[name].items()},
            }
            for name, rates in rates_of(suite).items()
        },
        "ratios": {name: ratio["median"] for name, ratio in ratios.items()},
        "ratio_spread": ratios,
        "target_attainment": suite.settings.target,
        "client_late": False,  # a suite in which the client was late has no result
        "windows": [window.to_document() for window in suite.windows],
        "busy_at_rps": round(suite.capacity_rps, 3),
        "objectives_reference": REFERENCE if is_measured else None,
        "objectives": {name: asdict(objective) for name, objective in suite.objectives.items()},
        "isolated_ttft_s": suite.isolated_ttft_s,
        "fixed_rate_rps": {str(number): round(rate, 4) for number, rate in suite.fixed_rate.items()},
        "attainment_by_slo_scale": curves.to_document(slo_scales_by_configuration(suite)),
        "attainment_by_rate": curves.to_document(rates_by_configuration(suite)),
        "fixed_rate_records": [
            {"configuration": name} | asdict(record)
            for name, records in suite.fixed_rate_records.items()
            for record in records
        ],
        "rows": suite.rows,
    }


def slo_scales_by_configuration(suite: Suite) -> list[Curve]:
    """Attainment at the fixed rates against the objectives' scale, over all classes and windows."""
    found = []
    for name, records in suite.fixed_rate_records.items():
        everything, *_ = slo_scale_curves(
            records, suite.objectives, suite.settings.slo_scales, suite.fixed_rate_requests
        )
        found.append(Curve(name=name, x=everything.x, attainment=everything.attainment))
    return found


def rates_by_configuration(suite: Suite) -> list[Curve]:
    """Attainment against the rate, over all windows; smoothed to fall with the rate, as in the search."""
    found = []
    for name in suite.found:
        rows = [row for row in suite.rows if row["configuration"] == name]
        if measured := rate_curves(rows):
            shares = falling(measured[0].attainment, [1.0] * len(measured[0].x))
            found.append(Curve(name=name, x=measured[0].x, attainment=tuple(shares)))
    return found


def _cells(suite: Suite) -> list[tuple[str, str, str]]:
    """Name, maximum goodput, and how many times as much the first configuration has."""
    ratios, cells = ratios_of(suite), []
    first = next(iter(suite.found))
    for name, rates in rates_of(suite).items():
        ratio = ratios.get(f"{first}/{name}")
        bound = _bound(suite, name)
        times = _with_spread(ratio) + (bound or _bound(suite, first)) if ratio else "–"
        cells.append((name, _with_spread(spread(rates)) + bound, times))
    return cells


def _bound(suite: Suite, name: str) -> str:
    """A sign at a number that is only a bound in some window."""
    return "" if is_bracketed(suite, name) else " *"


def _with_spread(values: Mapping[str, float]) -> str:
    middle, low, high = (f"{values[key]:.2f}" for key in ("median", "min", "max"))
    return middle if low == high else f"{middle} ({low}–{high})"


def suite_table(suite: Suite) -> Table:
    """For people."""
    first = next(iter(suite.found))
    table = Table(
        title=f"Max goodput: requests/s with {100 * suite.settings.target:.0f}% in time",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
    )
    for heading in ("configuration", "requests/s", f"{first} has so many times that"):
        table.add_column(heading, justify="left" if heading == "configuration" else "right")
    for cells in _cells(suite):
        table.add_row(*cells)
    return table


def footnotes(suite: Suite) -> list[str]:
    """What the table's numbers mean."""
    notes = [
        f"Median (least–most) of {len(suite.windows)} windows of the trace; ratios are taken within a window."
        if len(suite.windows) > 1
        else "One window of the trace, so the spread is not known."
    ]
    bounds = [name for name in suite.found if not is_bracketed(suite, name)]
    if bounds:
        notes.append(
            "\\* A bound in some window, since all rates that were tried passed, or all failed: "
            f"{', '.join(bounds)}. A ratio to a bound says little."
        )
    return notes


def markdown(suite: Suite, about: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The report. ``about``: what the JSON document says beside the measurement. ``pictures``: file names."""
    target = f"{100 * suite.settings.target:.0f}%"
    first = next(iter(suite.found))
    lines = [
        "# Goodput of prefill schedulers",
        "",
        f"The highest request rate at which {target} of requests have their first token within their objective.",
        *(["", f"**{SMOKE_RUN}**"] if about.get("quick") else []),
        "",
        f"| configuration | flags | requests/s | {first} has so many times that |",
        "| --- | --- | ---: | ---: |",
        *(f"| `{n}` | `{' '.join(about['flags'][n])}` | {rate} | {ratio} |" for n, rate, ratio in _cells(suite)),
        "",
        *footnotes(suite),
        "",
        *(f"![{name}]({name})\n" for name in pictures),
        "## Load",
        "",
        *_load_lines(suite, about),
        "",
        "## Objectives",
        "",
        "| class | requests | TTFT alone, median | objective |",
        "| --- | ---: | ---: | --- |",
        *(_objective_line(suite, name) for name in suite.objectives),
        "",
        "## Where it ran",
        "",
        *(f"- {key}: {value}" for key, value in _machine(about)),
        "",
    ]
    return "\n".join(lines)


def _load_lines(suite: Suite, about: Mapping[str, Any]) -> list[str]:
    trace = about["trace"]
    files = ", ".join(f"`{file['file']}` (sha256 `{file['sha256'][:12]}…`)" for file in trace["files"])
    fixed = ", ".join(f"{rate:.2f}" for rate in suite.fixed_rate.values())
    return [
        f"- Trace: {files}; {trace['requests']} requests, lengths × {trace['length_scale']:g}, "
        f"{trace['left_out_as_too_long']} left out as too long for the model, {trace['skipped_rows']} broken rows.",
        f"- Windows: {len(suite.windows)} of {len(suite.windows[0].requests)} requests; "
        f"{suite.settings.probes} rates tried for each configuration and window.",
        f"- Attainment by SLO scale was measured at {fixed} requests/s, the same for every configuration.",
        f"- Seed: {suite.settings.seed}. Each configuration got the same prompts at the same times.",
        "- Open-loop client; no probe in which it was late is used.",
    ]


def _objective_line(suite: Suite, name: str) -> str:
    count = sum(r.class_name == name for window in suite.windows for r in window.requests)
    alone_ms = 1_000 * median(suite.isolated_ttft_s[name]) if name in suite.isolated_ttft_s else math.nan
    return f"| {name} | {count} | {alone_ms:.0f} ms | {' '.join(suite.objectives[name].derivation().split())} |"


def _machine(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("command", f"`{' '.join(about['command'])}`"),
        ("commit", str(about["commit"])),
        ("hardware", ", ".join(f"{key} {value}" for key, value in about["hardware"].items())),
        ("versions", ", ".join(f"{key} {value}" for key, value in about["versions"].items())),
        ("model", str(about["model"]["name"])),
        ("placement", str(about["placement"])),
    ]
