"""``flowprefill bench``: open-loop load on any SGLang- or OpenAI-compatible server, its attainment and its goodput."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from flowprefill_sglang.bench.attainment_plot import RATE_FILE, SLO_SCALE_FILE, draw_rates, draw_slo_scales
from flowprefill_sglang.bench.curves import SLO_SCALES
from flowprefill_sglang.bench.experiment import Prepared
from flowprefill_sglang.bench.goodput import TARGET
from flowprefill_sglang.bench.measurement import Measurement
from flowprefill_sglang.bench.measurement_report import (
    measured_curves,
    measurement_document,
    pooled_report,
    rate_table,
    refusal_document,
    sentences,
)
from flowprefill_sglang.bench.objectives import REFERENCE
from flowprefill_sglang.bench.provenance import provenance, without_folders
from flowprefill_sglang.bench.report import errors_by_kind, to_table
from flowprefill_sglang.bench.timeline_plot import require_matplotlib
from flowprefill_sglang.cli.load_progress import LoadProgress
from flowprefill_sglang.cli.request_flags import (
    add_request_arguments,
    check_request_flags,
    check_url,
    class_names,
    request_settings,
)
from flowprefill_sglang.cli.results import check_folder, make_folder, write_json
from flowprefill_sglang.cli.stopping import run_until_told_to_stop
from flowprefill_sglang.cli.workload_flags import add_workload_arguments, check_trace_flags, load_workload
from flowprefill_sglang.errors import OutOfCapacity
from flowprefill_sglang.flag_values import count, factors, share, whole
from flowprefill_sglang.workload.trace import TraceRequest, mean_rate


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench``."""
    parser.epilog = "Also: flowprefill bench compare A.json B.json, flowprefill bench suite --trace FILE."
    parser.add_argument("--url", required=True, help="the server: http://HOST:PORT")
    load = parser.add_argument_group("workload (default: generated, the paper's four request classes)")
    add_workload_arguments(load)
    how = parser.add_argument_group("requests")
    add_request_arguments(how)
    how.add_argument(
        "--warm-up", type=whole, default=4, metavar="N", help="requests sent first, one after another (default 4)"
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument("--repeats", type=count, default=1, metavar="K", help="play the workload K times (default 1)")
    what.add_argument(
        "--rates", type=factors, default=(), metavar="A,B,C", help="also play it at these rates, in requests/s"
    )
    what.add_argument(
        "--max-goodput",
        action="store_true",
        help="search the highest rate at which --target of the requests are in time",
    )
    what.add_argument("--target", type=share, default=TARGET, metavar="F", help=f"attainment (default {TARGET})")
    what.add_argument("--probes", type=count, default=6, metavar="N", help="rates tried in a search (default 6)")
    what.add_argument(
        "--slo-scales",
        type=factors,
        default=SLO_SCALES,
        metavar="A,B,C",
        help=f"scales of the objectives for the curve (default {SLO_SCALES[0]:g} to {SLO_SCALES[-1]:g})",
    )
    results = parser.add_argument_group("results")
    results.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON, raw rows included")
    results.add_argument(
        "--plot", type=Path, metavar="DIR", help="draw attainment by SLO scale and by rate there (PNG)"
    )


def run_bench(namespace: argparse.Namespace) -> int:
    """0 when every request was answered in full; 1 when not, when the client fell behind, or the server broke."""
    check_url(namespace.url)
    check_trace_flags(namespace)
    check_request_flags(namespace)
    check_folder("--json", namespace.json)
    if namespace.plot is not None:
        require_matplotlib()
        make_folder("--plot", namespace.plot)
    requests, about = load_workload(namespace, class_names(namespace))
    if namespace.max_goodput or namespace.rates:
        mean_rate(requests)  # raises for a workload that has none, before anything is sent
    return run_until_told_to_stop(_bench(namespace, requests, about))


async def _bench(namespace: argparse.Namespace, requests: Sequence[TraceRequest], about: dict[str, Any]) -> int:
    started = datetime.now(UTC)
    console = Console(soft_wrap=True)
    with LoadProgress() as progress:
        measurement = Measurement(
            url=namespace.url,
            settings=request_settings(namespace),
            progress=progress,
            target=namespace.target,
            probes_per_search=namespace.probes,
            warm_up_requests=namespace.warm_up,
        )
        where = {
            "workload": about,
            "server": {"url": namespace.url},
            "seed": namespace.seed,
            **provenance(without_folders(["flowprefill", *sys.argv[1:]]), started),
        }
        try:
            with progress.waiting("measuring single requests, warming up"):
                prepared = await measurement.prepare(requests)
            _print_plan(prepared, about, console)
            await _measure(measurement, namespace)
        except OutOfCapacity as error:
            if namespace.json is not None:
                write_json(namespace.json, refusal_document(measurement, str(error)) | where)
            raise
    _print_results(measurement, console)
    if namespace.json is not None:
        write_json(namespace.json, measurement_document(measurement, namespace.slo_scales) | where)
    if namespace.plot is not None:
        _draw(measurement, namespace, about["name"], console)
    reports = [result.report for result in measurement.results]
    return 0 if all(report.succeeded == report.requests for report in reports) else 1


async def _measure(measurement: Measurement, namespace: argparse.Namespace) -> None:
    """Everything of one repeat before the next, so that a changing machine changes the repeats and not the curve."""
    for repeat in range(namespace.repeats):
        await measurement.repeat(f"repeat {repeat + 1} of {namespace.repeats}")
        for rate_rps in namespace.rates:
            await measurement.at_rate(rate_rps, repeat=repeat)
        if namespace.max_goodput:
            await measurement.search(repeat)


def _print_plan(prepared: Prepared, about: dict[str, Any], console: Console) -> None:
    requests = prepared.requests
    tokens = sum(r.input_tokens for r in requests)
    skipped = f", {about['skipped_rows']} broken rows left out" if about["skipped_rows"] else ""
    console.print(
        f"workload: {escape(about['name'])}: {len(requests)} requests in {requests[-1].arrival_s:.1f} s, {tokens:,} "
        f"prompt tokens, lengths × {prepared.length_factor:g}, answers of up to {about['max_output_tokens']} tokens"
        f"{skipped}"
    )
    is_measured = any(o.isolated_ttft_ms is not None for o in prepared.objectives.values())
    basis = f" (the paper's × what a class's median prompt takes alone here / on {REFERENCE})" if is_measured else ""
    console.print(f"TTFT objectives{basis}:")
    for name in sorted({r.class_name for r in requests}, key=list(prepared.objectives).index):
        console.print(f"  {escape(name):<7} {prepared.objectives[name].derivation()}")


def _print_results(measurement: Measurement, console: Console) -> None:
    report = pooled_report(measurement.results)
    console.print(to_table(report, measurement.prepared.objectives))
    for sentence in sentences(measurement):
        console.print(sentence)
    _, by_rate = measured_curves(measurement)
    if by_rate and len(by_rate[0].x) > 1:
        console.print(rate_table(by_rate))
    for _, times, example in errors_by_kind(report):
        console.print(f"{times} × {escape(example)}", style="red")


def _draw(measurement: Measurement, namespace: argparse.Namespace, workload: str, console: Console) -> None:
    by_scale, by_rate = measured_curves(measurement, namespace.slo_scales)
    repeats = len(measurement.results)
    about = f"{workload}, {len(measurement.prepared.requests)} requests, seed {namespace.seed}"
    about += f", {repeats} repeats together. " if repeats > 1 else ". "
    draw_slo_scales(
        namespace.plot / SLO_SCALE_FILE,
        by_scale,
        measurement.target,
        title="Attainment by SLO scale",
        about=about + "The same measured TTFTs against tighter and looser objectives; the server was told those of "
        "scale 1.",
    )
    names = [SLO_SCALE_FILE]
    if by_rate and len(by_rate[0].x) > 1:
        draw_rates(
            namespace.plot / RATE_FILE,
            by_rate,
            measurement.target,
            title="Attainment by rate",
            about=about + "Each point is the workload with its arrivals stretched or compressed to that rate.",
        )
        names.append(RATE_FILE)
    console.print(f"plots: {', '.join(escape(str(namespace.plot / name)) for name in names)}")
