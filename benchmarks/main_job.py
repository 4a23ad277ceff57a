"""The main job: trace requests through a whole cluster, every answer compared with one stock SGLang engine's.

The first rows of a trace are replayed at their (scaled) times against ``flowprefill``'s router with two prefill workers
and one decode instance, then against one stock SGLang server that is not disaggregated, on the same model. A request is
wrong when it is not answered, has another number of tokens than asked for, or another text than the stock engine's.

    python benchmarks/main_job.py --trace AzureLLMInferenceTrace_conv.csv --format azure --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parent))
from results_file import write_result

from flowprefill_sglang.bench.client import RequestRecord, replay
from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.plan import plan_requests
from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_sglang.cluster.pool_starting import pool_here
from flowprefill_sglang.cluster.ports import free_ports
from flowprefill_sglang.workload.classes import assign_classes
from flowprefill_sglang.workload.formats import FORMATS, load_trace
from flowprefill_sglang.workload.tiny_model import make_tiny_model
from flowprefill_sglang.workload.trace import TraceRequest, cap_outputs, scale_lengths, scale_rate

TIMEOUT_S = 600.0
MAX_OUTPUT_TOKENS = 16


def main() -> int:
    """Run both servers, compare; 0 only when every request was answered and none wrong."""
    parser = argparse.ArgumentParser(description="Trace requests through a cluster, compared with stock SGLang.")
    parser.add_argument("--trace", type=Path, default=default_trace())
    parser.add_argument("--format", choices=sorted(FORMATS), default="azure")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--length-scale", type=float, default=1.0, help="prompt lengths are multiplied by this")
    parser.add_argument("--rate-scale", type=float, default=1.0, help="arrival rate is multiplied by this")
    parser.add_argument("--json", type=Path, help="write provenance, summary and raw rows here")
    options = parser.parse_args()
    if not options.trace.is_file():
        print(f"skipped: no trace at {options.trace}; set --trace, or FLOWPREFILL_TRACES to the folder that holds it")
        return 0
    model = make_tiny_model()
    rows = load(options)
    ours = asyncio.run(through_cluster(model, rows))
    stock = asyncio.run(through_stock(model, rows))
    wrong = [o.rid for o, s in zip(ours, stock, strict=True) if o.error or o.output_sha256 != s.output_sha256]
    stock_failed = sum(1 for record in stock if record.error)
    ttft_ms = sorted(record.ttft_s * 1000 for record in ours if record.ttft_s is not None)
    summary = {
        "requests": len(rows),
        "answered": sum(1 for record in ours if record.error is None),
        "wrong": len(wrong),
        "stock_failed": stock_failed,
        "distinct_answers": len({record.output_sha256 for record in ours}),
        "prompt_tokens": sum(record.input_tokens for record in ours),
        "wall_s": round(max(record.finished_at for record in ours), 1),
        "ttft_p50_ms": round(ttft_ms[len(ttft_ms) // 2], 1) if ttft_ms else None,
    }
    print(json.dumps(summary, indent=1))
    if options.json:
        write(options, summary, ours, stock)
    return 0 if not wrong and not stock_failed else 1


def default_trace() -> Path:
    """The Azure conversation trace, in the folder that the variable names or in one beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "traces"
    return Path(os.environ.get("FLOWPREFILL_TRACES", beside)) / "azure_llm_conv_2023.csv"


def load(options: argparse.Namespace) -> list[TraceRequest]:
    """The trace's first rows, scaled."""
    rows = load_trace(options.trace, options.format).requests[: options.limit]
    scaled = scale_rate(scale_lengths(assign_classes(rows), options.length_scale), options.rate_scale)
    return list(cap_outputs(scaled, MAX_OUTPUT_TOKENS))


async def through_cluster(model: Path, rows: list[TraceRequest]) -> list[RequestRecord]:
    """Replay through router, two prefill workers and a decode instance."""
    async with pool_here(ClusterSpec(model_path=model, prefill=2, decode=1), replaces=False) as cluster:
        return await replay_at(cluster.url, rows)


async def through_stock(model: Path, rows: list[TraceRequest]) -> list[RequestRecord]:
    """Replay through one stock server."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        try:
            await until_healthy(url, process)
            return await replay_at(url, rows)
        finally:
            process.terminate()
            await process.wait()


async def until_healthy(url: str, process: asyncio.subprocess.Process) -> None:
    """Wait for the stock server. Raises RuntimeError when it ends or takes too long."""
    async with aiohttp.ClientSession() as session, asyncio.timeout(TIMEOUT_S):
        while process.returncode is None:
            try:
                async with session.get(f"{url}/health_generate") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)
    raise RuntimeError("the stock server did not start")


async def replay_at(url: str, rows: list[TraceRequest]) -> list[RequestRecord]:
    """The same prompts for both servers: they depend on row and seed only."""
    plan = plan_requests(rows, run_id="main-job", seed=0, endpoint=ENDPOINTS["generate"], model="")
    return await replay(url, plan, timeout_s=TIMEOUT_S)


def write(options: argparse.Namespace, summary: dict[str, Any], ours: list[RequestRecord], stock: list[Any]) -> None:
    """Provenance, summary and a row for each request."""
    measured = {
        "trace": {
            "file": options.trace.name,
            "sha256": hashlib.sha256(options.trace.read_bytes()).hexdigest(),
            "limit": options.limit,
            "length_scale": options.length_scale,
            "rate_scale": options.rate_scale,
            "max_output_tokens": MAX_OUTPUT_TOKENS,
        },
        **summary,
        "rows": [asdict(o) | {"stock_output_sha256": s.output_sha256} for o, s in zip(ours, stock, strict=True)],
    }
    write_result(options.json, seed=0, measured=measured)


if __name__ == "__main__":
    sys.exit(main())
