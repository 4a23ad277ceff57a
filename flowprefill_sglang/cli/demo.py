"""``flowprefill demo``: one workload under FlowPrefill and under stock SGLang's prefill scheduler, side by side."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from flowprefill_sglang.bench.comparison import (
    Contestant,
    comparison_document,
    comparison_table,
    facts,
    outline,
    unevenness,
)
from flowprefill_sglang.bench.comparison_picture import draw_contestants
from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.experiment import ExperimentSettings
from flowprefill_sglang.bench.provenance import provenance
from flowprefill_sglang.bench.report import to_table
from flowprefill_sglang.bench.timeline_plot import check_suffix
from flowprefill_sglang.cli.demo_run import DemoRun
from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_sglang.errors import BadInput, StartupError
from flowprefill_sglang.flag_values import count, factor, seconds
from flowprefill_sglang.workload.classes import assign_classes
from flowprefill_sglang.workload.formats import FORMATS, load_trace
from flowprefill_sglang.workload.generator import generate_workload
from flowprefill_sglang.workload.tiny_model import make_tiny_model
from flowprefill_sglang.workload.trace import TraceRequest, scale_rate, window

DEFAULT_REQUESTS = 200
DEFAULT_RATE_RPS = 4.5
GENERATED_LENGTH_SCALE = 0.5
"""The generator's lengths suit an 8B model on a GPU. Half of them keep a tiny model's prefill worker on one core busy
for about 60% of the time, with prompts of over a second among others of 20 ms."""
DEFAULT_PREFILL, DEFAULT_DECODE = 1, 1
DEFAULT_TIMELINE = Path("flowprefill-timeline.png")


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``demo``."""
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--prefill", type=count, metavar="N", help=f"prefill workers (default {DEFAULT_PREFILL})")
    cluster.add_argument("--decode", type=count, metavar="M", help=f"decode instances (default {DEFAULT_DECODE})")
    cluster.add_argument(
        "--scheduler",
        choices=("both", "flowprefill", "stock"),
        help="prefill scheduler: FlowPrefill's, SGLang's own, or one after the other (default: both)",
    )
    cluster.add_argument("--model-path", type=Path, metavar="DIR", help="model folder (default: a tiny one made here)")
    cluster.add_argument(
        "--url", help="use the router (or SGLang server) at this address instead of starting a cluster"
    )
    load = parser.add_argument_group("workload (default: generated, the paper's four request classes)")
    load.add_argument("--trace", type=Path, metavar="FILE", help="replay this trace")
    load.add_argument("--format", choices=sorted(FORMATS), help="the trace's format")
    load.add_argument(
        "--skip-bad-rows", action="store_true", help="count broken rows of the trace, do not stop at them"
    )
    load.add_argument("--limit", type=count, metavar="N", help="only the first N requests of the trace's window")
    load.add_argument("--start-s", type=seconds, default=0.0, metavar="S", help="where the window starts (default 0)")
    load.add_argument("--duration-s", type=seconds, metavar="S", help="length of the window (default: all)")
    load.add_argument("--requests", type=count, metavar="N", help=f"requests to generate (default {DEFAULT_REQUESTS})")
    load.add_argument("--rate-scale", type=factor, default=1.0, metavar="R", help="times the request rate (default 1)")
    load.add_argument(
        "--length-scale",
        type=factor,
        metavar="L",
        help=f"times the lengths (default: {GENERATED_LENGTH_SCALE} for the generated workload; for a trace the "
        "largest up to 1 with which every prompt fits the model's context)",
    )
    load.add_argument(
        "--max-output-tokens", type=count, default=16, metavar="N", help="cut answers to this length (default 16)"
    )
    load.add_argument("--seed", type=int, default=0, help="seed of the generated workload and of prompts (default 0)")
    how = parser.add_argument_group("requests and results")
    how.add_argument("--endpoint", choices=sorted(ENDPOINTS), default="generate", help="default: generate")
    how.add_argument(
        "--prompts",
        choices=("bytes", "ids"),
        default="bytes",
        help="send text, exact in length for the tiny model (bytes, default), or token ids, exact for any model (ids)",
    )
    how.add_argument(
        "--slo-factor",
        type=factor,
        metavar="F",
        help="objectives: F times the paper's (default: measure single requests first and scale by those)",
    )
    how.add_argument("--timeout-s", type=factor, default=300.0, metavar="S", help="per request (default 300)")
    how.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    how.add_argument(
        "--timeline",
        type=Path,
        default=DEFAULT_TIMELINE,
        metavar="FILE",
        help=f"where to draw what ran when (default: {DEFAULT_TIMELINE})",
    )
    how.add_argument("--no-timeline", action="store_true", help="draw nothing")


def run_demo(namespace: argparse.Namespace) -> int:
    """0 when every request was answered in full, 1 when not, 2 for wrong use."""
    try:
        _check(namespace)
        requests, about = _load(namespace)
        return asyncio.run(_run(namespace, requests, about))
    except BadInput as error:
        print(f"flowprefill demo: {error}", file=sys.stderr)
        return 2
    except asyncio.CancelledError:  # SIGTERM
        return 128 + signal.SIGTERM


def _check(namespace: argparse.Namespace) -> None:
    """Raise BadInput for flags that do not go together."""
    if (namespace.trace is None) != (namespace.format is None):
        raise BadInput(f"--trace and --format go together; formats: {', '.join(sorted(FORMATS))}")
    if namespace.trace is not None and namespace.requests is not None:
        raise BadInput("--requests is for the generated workload; use --limit with --trace")
    if namespace.url is not None:
        for flag in ("prefill", "decode", "model_path", "scheduler"):
            if getattr(namespace, flag) is not None:
                raise BadInput(f"--{flag.replace('_', '-')} starts a cluster and --url uses one; give one of the two")
        if not namespace.url.startswith(("http://", "https://")):
            raise BadInput(f"--url: expected an address like http://127.0.0.1:30000, got {namespace.url!r}")
    for flag in ("json", "timeline"):
        path = getattr(namespace, flag)
        if path is not None and not path.absolute().parent.is_dir():
            raise BadInput(f"--{flag}: the folder {path.parent} does not exist")
    check_suffix("--timeline", namespace.timeline)


def _load(namespace: argparse.Namespace) -> tuple[tuple[TraceRequest, ...], dict[str, Any]]:
    """The workload before lengths are scaled, and what the results say about it."""
    if namespace.trace is not None:
        trace = load_trace(namespace.trace, namespace.format, skip_bad_rows=namespace.skip_bad_rows)
    else:
        count = namespace.requests or DEFAULT_REQUESTS
        trace = generate_workload(requests=count, rate_rps=DEFAULT_RATE_RPS, seed=namespace.seed)
    requests = window(trace.requests, namespace.start_s, namespace.duration_s)[: namespace.limit]
    if not requests:
        raise BadInput(f"no request of {trace.name} arrives in the chosen window")
    flags = (
        "format",
        "start_s",
        "duration_s",
        "limit",
        "rate_scale",
        "max_output_tokens",
        "seed",
        "endpoint",
        "prompts",
    )
    about = {"name": trace.name, "sha256": trace.sha256, "skipped_rows": trace.skipped_rows}
    about |= {flag: getattr(namespace, flag) for flag in flags}
    return assign_classes(scale_rate(requests, namespace.rate_scale)), about


async def _run(namespace: argparse.Namespace, requests: Sequence[TraceRequest], about: dict[str, Any]) -> int:
    started = datetime.now(UTC)
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    console = Console()
    contestants = await _contestants(namespace, requests, about["name"], console)
    _print_results(contestants, console)
    picture = None
    if not namespace.no_timeline:
        picture = _draw(namespace.timeline, contestants, console)
    if namespace.json is not None:
        server = {"url": namespace.url} if namespace.url is not None else _cluster_size(namespace)
        document = (
            comparison_document(contestants, str(picture) if picture else None)
            | {"workload": about, "server": server}
            | provenance(["flowprefill", *sys.argv[1:]], started)
        )
        _write_json(namespace.json, document)
    reports = [contestant.result.report for contestant in contestants]
    return 0 if all(report.succeeded == report.requests for report in reports) else 1


async def _contestants(
    namespace: argparse.Namespace, requests: Sequence[TraceRequest], name: str, console: Console
) -> list[Contestant]:
    """Every scheduler's run, one after another; FlowPrefill's comes first in the result.

    Stock SGLang runs first: what single requests take there sets the objectives for both.
    """
    runner = DemoRun(_settings(namespace), requests, name, console)
    if namespace.url is not None:
        return [await runner.on_server(namespace.url)]
    model_path = (namespace.model_path or make_tiny_model()).resolve()
    size = _cluster_size(namespace)
    schedulers = ("stock", "flowprefill") if namespace.scheduler in (None, "both") else (namespace.scheduler,)
    contestants = []
    for scheduler in schedulers:
        spec = ClusterSpec(model_path=model_path, prefill=size["prefill"], decode=size["decode"])
        contestants.append(await runner.on_new_cluster(scheduler, spec))
    return contestants[::-1]


def _cluster_size(namespace: argparse.Namespace) -> dict[str, int]:
    return {"prefill": namespace.prefill or DEFAULT_PREFILL, "decode": namespace.decode or DEFAULT_DECODE}


def _settings(namespace: argparse.Namespace) -> ExperimentSettings:
    generated_scale = GENERATED_LENGTH_SCALE if namespace.trace is None else None
    return ExperimentSettings(
        endpoint=namespace.endpoint,
        prompts=namespace.prompts,
        seed=namespace.seed,
        length_scale=namespace.length_scale or generated_scale,
        max_output_tokens=namespace.max_output_tokens,
        slo_factor=namespace.slo_factor,
        timeout_s=namespace.timeout_s,
    )


def _print_results(contestants: Sequence[Contestant], console: Console) -> None:
    if len(contestants) == 2:
        console.print(comparison_table(*contestants))
        console.print(facts(*contestants), soft_wrap=True)
        if warning := unevenness(*contestants):
            console.print(warning, style="yellow", soft_wrap=True)
    for contestant in contestants:
        report = contestant.result.report
        if len(contestants) == 1:
            console.print(to_table(report, contestant.result.prepared.objectives))
        else:
            console.print(f"{contestant.name}: {outline(contestant)}", soft_wrap=True)
        for error, times in report.errors[:5]:
            console.print(f"{contestant.name}: {times} × {escape(error)}", style="red", soft_wrap=True)
        if report.is_client_late:
            console.print(
                f"{contestant.name}: the load client was late: 1% of the requests left over {report.late_p99_ms:.0f} "
                "ms after their time, so that the load was not quite the one asked for",
                style="yellow",
                soft_wrap=True,
            )


def _draw(path: Path, contestants: Sequence[Contestant], console: Console) -> Path | None:
    """The picture's path; None, with a word about why, when there is none."""
    try:
        shown = draw_contestants(path, contestants)
    except (StartupError, OSError) as error:
        console.print(f"no timeline drawn: {escape(str(error))}", style="yellow", soft_wrap=True)
        return None
    console.print(f"timeline: {escape(f'{path} shows {shown}')}", soft_wrap=True)
    return path


def _write_json(path: Path, document: dict[str, Any]) -> None:
    """In one step, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
