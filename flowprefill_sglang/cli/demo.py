"""``flowprefill demo``: one workload under FlowPrefill and under stock SGLang's prefill scheduler, side by side."""

from __future__ import annotations

import argparse
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
from flowprefill_sglang.bench.provenance import provenance
from flowprefill_sglang.bench.report import errors_by_kind, to_table
from flowprefill_sglang.bench.timeline_plot import check_suffix
from flowprefill_sglang.cli.demo_run import DemoRun
from flowprefill_sglang.cli.request_flags import (
    add_request_arguments,
    check_request_flags,
    check_url,
    class_names,
    request_settings,
)
from flowprefill_sglang.cli.results import check_folder, write_json
from flowprefill_sglang.cli.stopping import run_until_told_to_stop
from flowprefill_sglang.cli.workload_flags import (
    add_workload_arguments,
    check_trace_flags,
    load_workload,
)
from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_sglang.errors import BadInput, StartupError
from flowprefill_sglang.flag_values import count
from flowprefill_sglang.workload.tiny_model import make_tiny_model
from flowprefill_sglang.workload.trace import TraceRequest

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
    add_workload_arguments(load)
    how = parser.add_argument_group("requests and results")
    add_request_arguments(how)
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
        requests, about = load_workload(namespace, class_names(namespace))
        return run_until_told_to_stop(_run(namespace, requests, about))
    except BadInput as error:
        print(f"flowprefill demo: {error}", file=sys.stderr)
        return 2


def _check(namespace: argparse.Namespace) -> None:
    """Raise BadInput for flags that do not go together."""
    check_trace_flags(namespace)
    check_request_flags(namespace)
    if namespace.url is not None:
        for flag in ("prefill", "decode", "model_path", "scheduler"):
            if getattr(namespace, flag) is not None:
                raise BadInput(f"--{flag.replace('_', '-')} starts a cluster and --url uses one; give one of the two")
        check_url(namespace.url)
    check_folder("--json", namespace.json)
    check_folder("--timeline", namespace.timeline)
    check_suffix("--timeline", namespace.timeline)


async def _run(namespace: argparse.Namespace, requests: Sequence[TraceRequest], about: dict[str, Any]) -> int:
    started = datetime.now(UTC)
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
        write_json(namespace.json, document)
    reports = [contestant.result.report for contestant in contestants]
    return 0 if all(report.succeeded == report.requests for report in reports) else 1


async def _contestants(
    namespace: argparse.Namespace, requests: Sequence[TraceRequest], name: str, console: Console
) -> list[Contestant]:
    """Every scheduler's run, one after another; FlowPrefill's comes first in the result.

    Stock SGLang runs first: what single requests take there sets the objectives for both.
    """
    runner = DemoRun(request_settings(namespace), requests, name, console)
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
        for _, times, example in errors_by_kind(report)[:5]:
            console.print(f"{contestant.name}: {times} × {escape(example)}", style="red", soft_wrap=True)
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
