"""``flowprefill demo``: bring a cluster up, replay a workload through it, print a table, take it down again."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.experiment import ExperimentSettings, Prepared, Result, prepare, run
from flowprefill_sglang.bench.objectives import REFERENCE
from flowprefill_sglang.bench.provenance import provenance
from flowprefill_sglang.bench.report import to_table
from flowprefill_sglang.cluster.launcher import ClusterSpec, LaunchEvent, LocalCluster
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.workload.classes import assign_classes
from flowprefill_sglang.workload.formats import FORMATS, load_trace
from flowprefill_sglang.workload.generator import generate_workload
from flowprefill_sglang.workload.tiny_model import make_tiny_model
from flowprefill_sglang.workload.trace import TraceRequest, scale_rate, window

DEFAULT_REQUESTS = 100
DEFAULT_RATE_RPS = 4.0
GENERATED_LENGTH_SCALE = 0.25
"""The generator's lengths suit an 8B model on a GPU; a quarter of them suits a tiny model on two cores."""
DEFAULT_PREFILL, DEFAULT_DECODE = 2, 1


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``demo``."""
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--prefill", type=_count, metavar="N", help=f"prefill workers (default {DEFAULT_PREFILL})")
    cluster.add_argument("--decode", type=_count, metavar="M", help=f"decode instances (default {DEFAULT_DECODE})")
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
    load.add_argument("--limit", type=_count, metavar="N", help="only the first N requests of the trace's window")
    load.add_argument("--start-s", type=_seconds, default=0.0, metavar="S", help="where the window starts (default 0)")
    load.add_argument("--duration-s", type=_seconds, metavar="S", help="length of the window (default: all)")
    load.add_argument("--requests", type=_count, metavar="N", help=f"requests to generate (default {DEFAULT_REQUESTS})")
    load.add_argument("--rate-scale", type=_factor, default=1.0, metavar="R", help="times the request rate (default 1)")
    load.add_argument(
        "--length-scale",
        type=_factor,
        metavar="L",
        help=f"times the lengths (default: {GENERATED_LENGTH_SCALE} for the generated workload; for a trace the "
        "largest up to 1 with which every prompt fits the model's context)",
    )
    load.add_argument(
        "--max-output-tokens", type=_count, default=16, metavar="N", help="cut answers to this length (default 16)"
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
        type=_factor,
        metavar="F",
        help="objectives: F times the paper's (default: measure single requests first and scale by those)",
    )
    how.add_argument("--timeout-s", type=_factor, default=300.0, metavar="S", help="per request (default 300)")
    how.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")


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
        for flag in ("prefill", "decode", "model_path"):
            if getattr(namespace, flag) is not None:
                raise BadInput(f"--{flag.replace('_', '-')} starts a cluster and --url uses one; give one of the two")
        if not namespace.url.startswith(("http://", "https://")):
            raise BadInput(f"--url: expected an address like http://127.0.0.1:30000, got {namespace.url!r}")
    if namespace.json is not None and not namespace.json.absolute().parent.is_dir():
        raise BadInput(f"--json: the folder {namespace.json.parent} does not exist")


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
    async with _server(namespace, console) as (url, cluster, server):
        work = asyncio.create_task(_replay(namespace, requests, about["name"], url, console))
        result = await (work if cluster is None else _while_alive(cluster, work))
    report = result.report
    console.print(to_table(report, result.prepared.objectives))
    for error, count in report.errors[:5]:
        console.print(f"{count} × {escape(error)}", style="red", soft_wrap=True)
    if report.is_client_late:
        console.print(
            f"the load client was late: 1% of the requests left over {report.late_p99_ms:.0f} ms after their time, "
            "so that the load was not quite the one asked for",
            style="yellow",
            soft_wrap=True,
        )
    if namespace.json is not None:
        document = (
            result.to_document()
            | {"workload": about, "server": server}
            | provenance(["flowprefill", *sys.argv[1:]], started)
        )
        _write_json(namespace.json, document)
    return 0 if report.succeeded == report.requests else 1


@contextlib.asynccontextmanager
async def _server(
    namespace: argparse.Namespace, console: Console
) -> AsyncIterator[tuple[str, LocalCluster | None, dict[str, Any]]]:
    """Where to send requests, the cluster if one was started for it, and what the results say about it."""
    if namespace.url is not None:
        yield namespace.url, None, {"url": namespace.url}
        return
    spec = ClusterSpec(
        model_path=(namespace.model_path or make_tiny_model()).resolve(),
        prefill=namespace.prefill or DEFAULT_PREFILL,
        decode=namespace.decode or DEFAULT_DECODE,
    )
    console.print(
        f"starting 1 router, {spec.prefill} prefill and {spec.decode} decode; model {spec.model_path.name}",
        soft_wrap=True,
    )
    async with contextlib.AsyncExitStack() as stack:
        with console.status("loading") as status:

            def show(event: LaunchEvent) -> None:
                status.update(f"{event.elapsed_s:.0f} s: {event.name} {event.state}")
                if event.state in ("ready", "failed"):
                    console.print(f"  {event.name:<10} {event.state:<6} after {event.elapsed_s:.1f} s")

            cluster = await stack.enter_async_context(LocalCluster(spec, show))
        yield cluster.url, cluster, {"prefill": spec.prefill, "decode": spec.decode}


async def _while_alive(cluster: LocalCluster, work: asyncio.Task[Result]) -> Result:
    """The work's result. Raises PeerFault when the cluster cannot serve any more before it is done."""
    watching = asyncio.create_task(cluster.watch())
    try:
        await asyncio.wait([work, watching], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            await watching  # raises: it returns for no other reason
        return await work
    finally:
        for task in (work, watching):
            task.cancel()
        await asyncio.gather(work, watching, return_exceptions=True)


async def _replay(
    namespace: argparse.Namespace, requests: Sequence[TraceRequest], name: str, url: str, console: Console
) -> Result:
    generated_scale = GENERATED_LENGTH_SCALE if namespace.trace is None else None
    settings = ExperimentSettings(
        endpoint=namespace.endpoint,
        prompts=namespace.prompts,
        seed=namespace.seed,
        length_scale=namespace.length_scale or generated_scale,
        max_output_tokens=namespace.max_output_tokens,
        slo_factor=namespace.slo_factor,
        timeout_s=namespace.timeout_s,
    )
    with console.status("measuring single requests"):
        prepared = await prepare(url, requests, settings)
    _print_plan(prepared, name, console)
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("replaying", total=len(requests))
        return await run(url, prepared, settings, lambda record: progress.advance(bar))


def _print_plan(prepared: Prepared, name: str, console: Console) -> None:
    requests, factor = prepared.requests, prepared.length_factor
    tokens = sum(r.input_tokens for r in requests)
    console.print(
        f"workload: {escape(name)}: {len(requests)} requests in {requests[-1].arrival_s:.0f} s, "
        f"{tokens:,} prompt tokens, lengths × {factor:g}",
        soft_wrap=True,
    )
    measured = any(o.isolated_ttft_ms is not None for o in prepared.objectives.values())
    basis = f"what single requests take here / on {REFERENCE}" if measured else "the stated factor"
    console.print(f"TTFT objectives: the paper's × {basis}", soft_wrap=True)
    for class_name, objective in prepared.objectives.items():
        console.print(f"  {class_name:<7} {objective.class_slo_ms:5.0f} ms × {objective.factor:.3f}")


def _write_json(path: Path, document: dict[str, Any]) -> None:
    """In one step, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _count(text: str) -> int:
    return int(_number(text, "a whole number of at least 1", lambda v: v >= 1 and v.is_integer()))


def _factor(text: str) -> float:
    return _number(text, "a number above 0", lambda v: v > 0)


def _seconds(text: str) -> float:
    return _number(text, "a number of seconds, 0 or more", lambda v: v >= 0)


def _number(text: str, expected: str, is_right: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and is_right(value)):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value
