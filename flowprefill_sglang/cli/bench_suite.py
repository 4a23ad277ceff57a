"""``flowprefill bench suite``: max goodput of FlowPrefill and of every stock scheduler, on this machine, in turns."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from flowprefill_sglang.bench.attainment_plot import RATE_FILE, SLO_SCALE_FILE, draw_rates, draw_slo_scales
from flowprefill_sglang.bench.goodput import TARGET
from flowprefill_sglang.bench.provenance import provenance, without_folders
from flowprefill_sglang.bench.suite import Contender, Suite, SuiteSettings
from flowprefill_sglang.bench.suite_report import (
    SMOKE_RUN,
    footnotes,
    markdown,
    rates_by_configuration,
    slo_scales_by_configuration,
    suite_document,
    suite_table,
)
from flowprefill_sglang.bench.timeline_plot import require_matplotlib
from flowprefill_sglang.bench.windows import Window, cut_windows
from flowprefill_sglang.cli.request_flags import add_objective_arguments, class_names
from flowprefill_sglang.cli.results import check_folder, make_folder, write_json
from flowprefill_sglang.cli.stopping import run_until_told_to_stop
from flowprefill_sglang.cli.workload_flags import add_row_arguments, add_window_arguments, chosen_window, read_trace
from flowprefill_sglang.cluster.alive import while_alive
from flowprefill_sglang.cluster.configurations import OPTIONAL, SUITE, Configuration
from flowprefill_sglang.cluster.side_by_side import KV_POOL_TOKENS, LiveWorkers
from flowprefill_sglang.errors import BadInput, StartupError
from flowprefill_sglang.flag_values import count, factor, share
from flowprefill_sglang.workload.classes import assign_classes
from flowprefill_sglang.workload.formats import COARSE_TIMES, FORMATS
from flowprefill_sglang.workload.tiny_model import make_deep_model
from flowprefill_sglang.workload.trace import TraceRequest, cap_outputs, poisson_arrivals, scale_lengths, spread_ties

KNOWN = {configuration.name: configuration for configuration in (*SUITE, *OPTIONAL)}
QUICK = {"requests": 20, "windows": 1, "probes": 2}
JSON_FILE, REPORT_FILE = "result.json", "report.md"


def add_bench_suite_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench suite``; others go to every SGLang server."""
    load = parser.add_argument_group("load")
    load.add_argument(
        "--trace", type=Path, action="append", required=True, metavar="FILE", help="several are merged by their times"
    )
    load.add_argument(
        "--format", choices=sorted(FORMATS), action="append", required=True, help="of each --trace, in their order"
    )
    add_row_arguments(load)
    add_window_arguments(load)
    load.add_argument("--length-scale", type=factor, default=0.25, metavar="L", help="times the lengths (default 0.25)")
    load.add_argument(
        "--max-tokens",
        type=count,
        default=8_000,
        metavar="N",
        help="leave longer prompts out, after scaling (default 8000)",
    )
    load.add_argument("--prompts", choices=("bytes", "ids"), default="bytes", help="text or token ids (default: bytes)")
    load.add_argument("--seed", type=int, default=0, help="of the prompts' content (default 0)")
    add_objective_arguments(load)
    how = parser.add_argument_group("measurement")
    how.add_argument("--model-path", type=Path, metavar="DIR", help="model folder (default: a tiny one made here)")
    how.add_argument(
        "--only",
        type=_configurations,
        default=SUITE,
        metavar="NAMES",
        help=f"names with commas between, of {', '.join(KNOWN)} (default: all but "
        f"{', '.join(c.name for c in OPTIONAL)}); ratios are those of the first",
    )
    how.add_argument(
        "--windows",
        "--repeats",
        dest="windows",
        type=count,
        default=3,
        metavar="K",
        help="parts of the trace, each a repeat (default 3)",
    )
    how.add_argument("--requests", type=count, default=160, metavar="N", help="of a window, at most (default 160)")
    how.add_argument("--probes", type=count, default=4, metavar="N", help="rates tried for each (default 4)")
    how.add_argument("--target", type=share, default=TARGET, metavar="F", help=f"attainment (default {TARGET})")
    how.add_argument(
        "--minutes",
        type=factor,
        default=28,
        metavar="M",
        help="about how long to measure; decides how many requests a window has (default 28)",
    )
    how.add_argument(
        "--quick",
        action="store_true",
        help="a smoke run whose figures mean nothing: one window of 20 requests, two probes",
    )
    how.add_argument("--log-dir", type=Path, metavar="DIR", help="where each process writes its log")
    results = parser.add_argument_group("results")
    results.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON, raw rows included")
    results.add_argument("--report", type=Path, metavar="DIR", help="write a report there: Markdown, JSON and plots")


def _configurations(text: str) -> tuple[Configuration, ...]:
    names = list(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in KNOWN]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected names of {', '.join(KNOWN)}, got {', '.join(unknown)}")
    return tuple(KNOWN[name] for name in names)


def run_bench_suite(namespace: argparse.Namespace) -> int:
    """0 when everything was measured; 1 when a server broke or the client fell behind; 2 for wrong use."""
    if len(namespace.trace) != len(namespace.format):
        raise BadInput(
            f"each --trace needs its --format: {len(namespace.trace)} traces, {len(namespace.format)} formats"
        )
    if namespace.quick:
        for key, value in QUICK.items():
            setattr(namespace, key, value)
    check_folder("--json", namespace.json)
    if namespace.report is not None:
        require_matplotlib()
        make_folder("--report", namespace.report)
    model = namespace.model_path
    if model is not None and not (model / "config.json").is_file():
        raise StartupError(f"no model at {model}: it has no config.json")
    windows, about = load_windows(namespace)
    return run_until_told_to_stop(_suite(namespace, windows, {"trace": about}))


def load_windows(namespace: argparse.Namespace) -> tuple[list[Window], dict[str, Any]]:
    """Windows at equal distances in the trace, and what the result says about it. Raises BadInput."""
    rows: list[TraceRequest] = []
    files, skipped = [], 0
    for path, name in zip(namespace.trace, namespace.format, strict=True):
        trace = read_trace(path, name, namespace)
        part = chosen_window(trace, namespace)
        if not trace.has_arrivals:
            part = poisson_arrivals(part, 1.0, namespace.seed)  # only their pattern matters: probes set the rate
        rows += spread_ties(part, namespace.seed) if name in COARSE_TIMES else part
        files.append({"file": trace.name, "format": name, "sha256": trace.sha256})
        skipped += trace.skipped_rows
    rows.sort(key=lambda row: row.arrival_s)
    classed = assign_classes(rows, by=namespace.class_by, names=class_names(namespace))
    scaled = cap_outputs(scale_lengths(classed, namespace.length_scale), 1)
    fitting = [row for row in scaled if row.input_tokens <= namespace.max_tokens]
    if len(files) > 1:  # ids of two traces could meet
        fitting = [replace(row, hash_ids=()) for row in fitting]
    about = {
        "files": files,
        "requests": len(rows),
        "skipped_rows": skipped,
        "left_out_as_too_long": len(scaled) - len(fitting),
        "length_scale": namespace.length_scale,
        "prompts": namespace.prompts,
    }
    return cut_windows(fitting, namespace.windows, namespace.requests), about


async def _suite(namespace: argparse.Namespace, windows: list[Window], about: dict[str, Any]) -> int:
    started, console = datetime.now(UTC), Console(soft_wrap=True, highlight=False)
    model = namespace.model_path.resolve() if namespace.model_path is not None else make_deep_model()[0]
    configurations: tuple[Configuration, ...] = namespace.only
    console.print(f"starting {len(configurations)} prefill workers, each with a router, and one decode instance")
    flags = ("--max-total-tokens", str(KV_POOL_TOKENS), *namespace.rest)
    async with LiveWorkers(model, configurations, log_dir=namespace.log_dir, flags=flags) as live:
        suite = Suite(
            contenders=[
                Contender(
                    name=c.name,
                    server=live[c.name],
                    sends_priority=c.sends_priority,
                )
                for c in configurations
            ],
            windows=windows,
            settings=_settings(namespace),
            say=lambda line: console.print(escape(line)),
        )
        placement = "scheduler on the first core, all else on the others" if live.is_pinned else "not pinned"
        await while_alive(live.watch(), suite.run())
    about |= {
        "model": {"name": model.name},
        "placement": placement,
        "flags": {c.name: list(c.flags) for c in configurations},
        "seed": namespace.seed,
        "quick": namespace.quick,
        **provenance(without_folders(["flowprefill", *sys.argv[1:]]), started),
    }
    console.print(suite_table(suite))
    for note in footnotes(suite):
        console.print(escape(note.removeprefix("\\")))
    if namespace.quick:
        console.print(SMOKE_RUN, style="yellow")
    _write(suite, about, namespace, console)
    return 0


def _settings(namespace: argparse.Namespace) -> SuiteSettings:
    return SuiteSettings(
        seed=namespace.seed,
        prompts=namespace.prompts,
        length_factor=namespace.length_scale,
        target=namespace.target,
        probes=namespace.probes,
        minutes=namespace.minutes,
        slo_ms=dict(namespace.slo),
        slo_factor=namespace.slo_factor,
    )


def _write(suite: Suite, about: dict[str, Any], namespace: argparse.Namespace, console: Console) -> None:
    document = suite_document(suite) | about
    if namespace.json is not None:
        write_json(namespace.json, document)
    folder: Path | None = namespace.report
    if folder is None:
        return
    write_json(folder / JSON_FILE, document)
    pictures = _draw(suite, folder)
    (folder / REPORT_FILE).write_text(markdown(suite, about, pictures), encoding="utf-8")
    console.print(f"report: {escape(str(folder / REPORT_FILE))}")


def _draw(suite: Suite, folder: Path) -> list[str]:
    """The file names of the pictures."""
    count = len(suite.windows)
    windows = f"{count} window{'s' if count > 1 else ''} of {len(suite.windows[0].requests)} requests of the trace."
    draw_rates(
        folder / RATE_FILE,
        rates_by_configuration(suite),
        suite.settings.target,
        title="Attainment by rate",
        about=f"{windows} Every configuration was tried at rates around its own maximum; probes that were cut short as "
        "hopeless are not drawn. Smoothed to fall with the rate.",
        is_logarithmic=True,
    )
    rates = ", ".join(f"{rate:.2f}" for rate in suite.fixed_rate.values())
    draw_slo_scales(
        folder / SLO_SCALE_FILE,
        slo_scales_by_configuration(suite),
        suite.settings.target,
        title="Attainment by SLO scale",
        about=f"{windows} All configurations at the same rate, {rates} requests/s. The same measured TTFTs against "
        "tighter and looser objectives; servers were told those of scale 1.",
    )
    return [RATE_FILE, SLO_SCALE_FILE]
