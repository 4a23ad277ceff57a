"""How long an urgent request is blocked by a prefill under way, against the length of that prefill.

For each prompt length: a long prompt runs alone, and while it does, short urgent ones arrive, each at a random moment.
*Blocked* is the time from the urgent request's receipt at the router until what was running had stopped, be it
suspended at an operator boundary (FlowPrefill) or at its end (stock SGLang: the whole prompt, or a chunk of it).
*Started* is until the urgent one's own prefill began: behind a chunk, stock SGLang goes on with the next one.

Configurations take turns, one long prompt after another. Every time is from the worker's own events, except for the
receipt, which is the router's. FlowPrefill also reports the blocking time proper, from the arrival at the scheduler
process until the task had stopped, which has no way through two processes in it.

Beside it, in a process of its own: the longest operator of a prompt of that length, that is the longest time between
two boundaries of an undisturbed forward. The blocking time proper should not exceed it, but for the machine's noise.

With ``--max-blocking-ms`` FlowPrefill is compared with itself, in slices for these targets (0: whole operators).

    python benchmarks/blocking_time.py --json result.json
    python benchmarks/blocking_time.py --max-blocking-ms 0,20 --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from results_file import write_result

from flowprefill_sglang.bench.client import PlannedRequest, replay
from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.objectives import Objective
from flowprefill_sglang.bench.plan import plan_requests
from flowprefill_sglang.bench.report import percentile
from flowprefill_sglang.cluster.configurations import STOCK_UNCHUNKED, Configuration, flowprefill, stock_chunked
from flowprefill_sglang.cluster.side_by_side import LiveWorker, LiveWorkers
from flowprefill_sglang.observe.events import (
    Event,
    RequestArrived,
    TaskFinished,
    TaskPreempted,
    TaskResumed,
    TaskStarted,
)
from flowprefill_sglang.workload.tiny_model import make_deep_model
from flowprefill_sglang.workload.trace import TraceRequest

AGAINST_STOCK = (flowprefill(), STOCK_UNCHUNKED, stock_chunked(2048), stock_chunked(512))
URGENT_TOKENS = 16
LONG, URGENT = "file", "text"
"""Classes that every router knows."""
PATIENT_S, URGENT_S = 3_600.0, 5.0
"""Objectives: the urgent one's deadline is always the earlier one, and both can be met."""
OBJECTIVES = {
    name: Objective(slo_ms=1_000 * slo_s, class_slo_ms=1_000 * slo_s, factor=1.0)
    for name, slo_s in ((LONG, PATIENT_S), (URGENT, URGENT_S))
}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16000", help="of the long prompt, in tokens")
    parser.add_argument("--preemptions", type=int, default=30, help="least number, for each length, of FlowPrefill's")
    parser.add_argument(
        "--stock-urgent", type=int, default=10, help="urgent requests for each length and stock setting"
    )
    parser.add_argument("--forwards", type=int, default=3, help="undisturbed forwards whose operators are timed")
    parser.add_argument(
        "--max-blocking-ms", metavar="MS,…", help="compare FlowPrefill with these targets instead of with stock SGLang"
    )
    parser.add_argument("--layers", type=int, default=None, help="of the model")
    parser.add_argument("--seconds", type=float, default=300, help="no long prompt begins after this")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("--quick", action="store_true", help="smoke run: two lengths, few arrivals")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.preemptions, options.stock_urgent = "1024,4096", 4, 2
    lengths = [int(length) for length in options.lengths.split(",")]
    model, shape = make_deep_model(options.layers)
    targets_ms = configurations(options.max_blocking_ms)
    operators = time_operators(str(model), lengths, sorted(set(targets_ms.values())), options.forwards, options.seed)
    rows, is_pinned = asyncio.run(measure(options, model, lengths, targets_ms, operators))
    summaries = summarize(lengths, rows, targets_ms, operators)
    for row in summaries:
        print_summary(row)
    if options.json:
        measured = {"model": asdict(shape), "pinned": is_pinned, "summary": summaries}
        write_result(options.json, seed=options.seed, measured=measured | {"rows": [*operators, *rows]})
    return 0


def configurations(targets: str | None) -> dict[Configuration, float]:
    """What takes turns, each with its blocking target in milliseconds; 0: operators are whole."""
    if targets is None:
        return dict.fromkeys(AGAINST_STOCK, 0.0)
    found = {}
    for target_ms in map(float, targets.split(",")):
        flags = ("--max-blocking-ms", f"{target_ms:g}")
        name = f"slices-{target_ms:g}" if target_ms else "whole"
        found[flowprefill("feasible", *flags, name=name)] = target_ms
    return found


def time_operators(
    model: str, lengths: Sequence[int], targets_ms: Sequence[float], forwards: int, seed: int
) -> list[dict[str, Any]]:
    """Times between successive boundaries of undisturbed forwards, in a process of their own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_time_operators, args=(model, lengths, targets_ms, forwards, seed, sender))
    process.start()
    sender.close()  # so that a process that dies is noticed
    try:
        rows: list[dict[str, Any]] = receiver.recv()
    finally:
        process.join()
    return rows


def _time_operators(
    model: str, lengths: Sequence[int], targets_ms: Sequence[float], forwards: int, seed: int, out: Any
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # as the workers' schedulers
    from operator_gaps import OperatorGaps

    operators, rng, rows = OperatorGaps(model, max(lengths)), random.Random(seed), []
    for number in range(-1, forwards):  # the first one warms up
        for length in lengths:
            for target_ms in targets_ms:
                gaps_ms = operators.gaps_ms(length, target_ms, rng)
                if number < 0:
                    continue
                rows.append(
                    {
                        "part": "operators",
                        "tokens": length,
                        "target_ms": target_ms,
                        "boundaries": len(gaps_ms) - 1,
                        "forward_ms": round(sum(gaps_ms), 3),
                        "longest_ms": round(max(gaps_ms), 3),
                        "median_ms": round(percentile(gaps_ms, 50), 3),
                    }
                )
    out.send(rows)


async def measure(
    options: argparse.Namespace,
    model: Path,
    lengths: Sequence[int],
    targets_ms: Mapping[Configuration, float],
    operators: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], bool]:
    """One row for each urgent request that met a running long prompt."""
    rng = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    async with LiveWorkers(model, list(targets_ms), log_dir=options.log_dir) as live:
        for configuration in targets_ms:
            await one_prompt(live[configuration.name], 512, [0.01], rng)  # warms it up
        deadline_at = time.monotonic() + options.seconds
        open_cases = [(length, c) for length in lengths for c in targets_ms]
        while open_cases and time.monotonic() < deadline_at:
            for length, configuration in list(open_cases):
                wanted = options.stock_urgent if configuration.is_stock else options.preemptions
                many = 1 if configuration.is_stock else max(1, min(8, length // 512))
                forward_s = forward_ms(operators, length, targets_ms[configuration]) / 1_000
                gaps_s = [rng.uniform(0.05, 0.9) * forward_s for _ in range(many)]
                found = await one_prompt(live[configuration.name], length, gaps_s, rng)
                rows += [{"part": "blocking", "configuration": configuration.name, "tokens": length} | r for r in found]
                have = sum(r["configuration"] == configuration.name and r["tokens"] == length for r in rows)
                if have >= wanted:
                    open_cases.remove((length, configuration))
        for length, configuration in open_cases:
            print(f"out of time: too few arrivals for {configuration.name} at {length} tokens", flush=True)
        return rows, live.is_pinned


async def one_prompt(
    worker: LiveWorker, length: int, urgent_at_s: Sequence[float], rng: random.Random
) -> list[dict[str, Any]]:
    """A long prompt, and urgent ones so long after it was sent; what became of those that met it running."""
    traffic = [TraceRequest(arrival_s=0.0, input_tokens=length, output_tokens=1, class_name=LONG)]
    traffic += [
        TraceRequest(arrival_s=at_s, input_tokens=URGENT_TOKENS, output_tokens=1, class_name=URGENT)
        for at_s in sorted(urgent_at_s)
    ]
    plan: list[PlannedRequest] = plan_requests(
        traffic,
        run_id=f"blocking-{uuid.uuid4().hex[:12]}",
        seed=rng.randrange(1 << 30),
        endpoint=ENDPOINTS["generate"],
        model="",
        objectives=OBJECTIVES,
    )
    began_at = time.monotonic()
    for record in await replay(worker.url, plan, timeout_s=300):
        if record.error is not None:
            raise RuntimeError(f"{worker.name}: {record.rid} failed: {record.error}")
    await worker.drained()
    recording = await worker.timeline(time.monotonic() - began_at + 0.5)
    return blockings([event for event in recording.events if event.at >= began_at])


def blockings(events: Sequence[Event]) -> list[dict[str, Any]]:
    """For each urgent request that was received while a task of the long prompt ran: when that task had stopped, and
    when the urgent one began, in milliseconds after the receipt."""
    urgent = {e.rid: e for e in events if isinstance(e, RequestArrived) and e.slo_class == URGENT}
    stretches = list(running_stretches(events))
    begins = [(e.at, rid) for e in events if isinstance(e, TaskStarted) for rid in e.rids]
    first_began_at = {rid: at for at, rid in sorted(begins, reverse=True)}
    proper_ms = {e.at: 1_000 * e.blocking_s for e in events if isinstance(e, TaskPreempted)}
    rows = []
    for rid, arrived in urgent.items():
        met = [s for s in stretches if s[0] <= arrived.received_at < s[1] and not set(s[2]) & urgent.keys()]
        if not met or rid not in first_began_at:
            continue
        _, stopped_at, _ = met[0]
        rows.append(
            {
                "blocked_ms": round(1_000 * (stopped_at - arrived.received_at), 3),
                "started_ms": round(1_000 * (first_began_at[rid] - arrived.received_at), 3),
                "proper_ms": round(proper_ms[stopped_at], 3) if stopped_at in proper_ms else None,
            }
        )
    return rows


def running_stretches(events: Sequence[Event]) -> list[tuple[float, float, list[str]]]:
    """When which requests' tasks ran: beginning, end, request ids."""
    stretches = []
    since: dict[int, float] = {}
    for event in sorted(events, key=lambda e: e.at):
        if isinstance(event, TaskStarted | TaskResumed):
            since[event.task] = event.at
        elif isinstance(event, TaskPreempted | TaskFinished) and event.task in since:
            stretches.append((since.pop(event.task), event.at, event.rids))
    return stretches


def forward_ms(operators: Sequence[dict[str, Any]], length: int, target_ms: float) -> float:
    """Of an undisturbed forward pass, the median."""
    mine = [row for row in operators if (row["tokens"], row["target_ms"]) == (length, target_ms)]
    return percentile([row["forward_ms"] for row in mine], 50)


def summarize(
    lengths: Sequence[int],
    rows: Sequence[dict[str, Any]],
    targets_ms: Mapping[Configuration, float],
    operators: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Percentiles for each length and configuration."""
    summaries = []
    for length in lengths:
        for configuration, target_ms in targets_ms.items():
            forwards = [row for row in operators if (row["tokens"], row["target_ms"]) == (length, target_ms)]
            mine = [r for r in rows if r["tokens"] == length and r["configuration"] == configuration.name]
            summaries.append(
                {
                    "tokens": length,
                    "configuration": configuration.name,
                    "urgent": len(mine),
                    # Of the least disturbed pass: one hiccup of the machine would excuse any blocking time.
                    "longest_operator_ms": min((row["longest_ms"] for row in forwards), default=None),
                    "forward_ms": forward_ms(operators, length, target_ms),
                }
                | {key: _percentiles([r[key] for r in mine]) for key in ("blocked_ms", "started_ms", "proper_ms")}
            )
    return summaries


def _percentiles(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {f"p{p}": round(percentile(known, p), 2) for p in (50, 99)} | {"max": round(max(known), 2)}


def print_summary(row: dict[str, Any]) -> None:
    proper = row["proper_ms"]
    print(
        f"{row['tokens']:6} tokens  {row['configuration']:12} {row['urgent']:3} urgent  blocked {row['blocked_ms']}  "
        f"started {row['started_ms']}" + (f"  proper {proper}" if proper else "")
    )
    if proper:
        print(f"       forward {row['forward_ms']:.1f} ms, its longest operator {row['longest_operator_ms']:.1f} ms")


if __name__ == "__main__":
    sys.exit(main())
