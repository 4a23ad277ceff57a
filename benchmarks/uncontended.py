"""What FlowPrefill costs when nothing contends: throughput of back-to-back prefills, over stock SGLang's.

Two live workers take turns in pairs, in alternating order. Each time some prompts of one length, none sharing a prefix,
queue up behind another one, so that they are all there when their turn comes; each is computed alone
(``--prefill-max-requests 1`` on both sides), so that both do the same work. Times are taken from the worker's own
events, without HTTP:

* ``back_to_back_s``: from the start of the one in front to the end of the last one, less what the one in front takes
  when nothing comes behind it (measured just before). All that the scheduler's thread does for a prompt is in it,
  wherever it does it: SGLang takes messages in between two forwards, FlowPrefill stops a forward for them.
* ``forwards_s``: inside the forwards alone, those of the prompts behind: boundaries, greenlets, state, and with
  FlowPrefill what messages a forward was stopped for.

A third, ``cpu_s``, is the CPU time of the scheduler process for the group and the one in front, in the kernel's ticks
of 10 ms: coarse, but nearly blind to what else the machine does.

Throughput ratio: stock's time over ours, median of the pairs; 1 is no cost at all. Two processes of the same code
differ by one or two hundredths for as long as they live (where their memory happens to lie), so the pairs are divided
among several starts of both workers.

    python benchmarks/uncontended.py --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from results_file import write_result

from flowprefill_sglang.bench.client import replay
from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.objectives import unscaled_objectives
from flowprefill_sglang.bench.plan import plan_requests
from flowprefill_sglang.bench.report import percentile
from flowprefill_sglang.cluster.configurations import flowprefill, stock
from flowprefill_sglang.cluster.side_by_side import LiveWorker, LiveWorkers
from flowprefill_sglang.observe.events import TaskFinished, TaskPreempted, TaskStarted
from flowprefill_sglang.workload.tiny_model import make_deep_model
from flowprefill_sglang.workload.trace import TraceRequest

ALONE = ("--prefill-max-requests", "1", "--chunked-prefill-size", "-1")
OURS, STOCK = flowprefill("feasible", *ALONE), stock("stock", *ALONE)
OBJECTIVES = unscaled_objectives(500)
"""Nobody is urgent: the order is that of arrival on both sides."""
FRONT_TOKENS = 2_048
MAX_SHARED_TOKENS = 8
"""All prompts begin with the same special token, and a few with the same letters: the radix cache has those."""
MEASURES = ("back_to_back_s", "forwards_s", "cpu_s")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="128,1024,4096")
    parser.add_argument("--starts", type=int, default=4, help="of both workers, afresh")
    parser.add_argument("--pairs", type=int, default=10, help="for each length and start")
    parser.add_argument("--group-tokens", type=int, default=8_192, help="about so many tokens go in a row")
    parser.add_argument("--layers", type=int, default=None, help="of the model")
    parser.add_argument("--seconds", type=float, default=210, help="no pair begins later than this after its start")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("--quick", action="store_true", help="smoke run: one start, three pairs")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if options.quick:
        options.starts, options.pairs = 1, 3
    model, shape = make_deep_model(options.layers)
    rows: list[dict[str, Any]] = []
    for start in range(options.starts):
        found, is_pinned = asyncio.run(measure(options, model, start))
        rows += found
    summaries = summarize(rows)
    for row in summaries:
        print(row)
    if options.json:
        measured = {"model": asdict(shape), "pinned": is_pinned, "summary": summaries, "rows": rows}
        write_result(options.json, seed=options.seed, measured=measured)
    return 0


async def measure(options: argparse.Namespace, model: Path, start: int) -> tuple[list[dict[str, Any]], bool]:
    """A row for each group of prompts; groups with the same start and pair number belong together."""
    rng = random.Random(f"{options.seed} {start}")
    lengths = [int(length) for length in options.lengths.split(",")]
    rows: list[dict[str, Any]] = []
    async with LiveWorkers(model, [OURS, STOCK], log_dir=options.log_dir) as live:
        deadline_at = time.monotonic() + options.seconds
        for pair in range(-1, options.pairs):  # the first one warms up
            for length in lengths:
                if time.monotonic() > deadline_at:
                    print(f"out of time after {pair} pairs", flush=True)
                    return rows, live.is_pinned
                count = max(2, min(10, options.group_tokens // length))
                order = [OURS.name, STOCK.name] if pair % 2 else [STOCK.name, OURS.name]
                for name in order:
                    alone = await one_group(live[name], length, 0, rng.randrange(1 << 30))
                    found = await one_group(live[name], length, count, rng.randrange(1 << 30))
                    found["back_to_back_s"] = round(found["whole_s"] - alone["whole_s"], 6)
                    if pair >= 0:
                        place = {"start": start, "pair": pair, "worker": name, "tokens": length, "prompts": count}
                        rows.append(place | found)
        return rows, live.is_pinned


async def one_group(worker: LiveWorker, length: int, count: int, seed: int) -> dict[str, Any]:
    """Times of one group. Raises RuntimeError when it was not computed as meant."""
    front = TraceRequest(arrival_s=0.0, input_tokens=FRONT_TOKENS, output_tokens=1, class_name="file")
    # Later than the one in front, so that it is in front; all of them long before it has ended.
    prompts = [
        TraceRequest(arrival_s=0.02, input_tokens=length, output_tokens=1, class_name="file") for _ in range(count)
    ]
    plan = plan_requests(
        [front, *prompts],
        run_id=f"uncontended-{uuid.uuid4().hex[:12]}",
        seed=seed,
        endpoint=ENDPOINTS["generate"],
        model="",
        objectives=OBJECTIVES,
    )
    began_at, cpu_before_s = time.monotonic(), worker.scheduler_cpu_s()
    for record in await replay(worker.url, plan, timeout_s=120):
        if record.error is not None:
            raise RuntimeError(f"{worker.name}: {record.rid} failed: {record.error}")
    await worker.drained()
    cpu_s = worker.scheduler_cpu_s() - cpu_before_s
    recording = await worker.timeline(time.monotonic() - began_at + 0.5)
    events = [event for event in recording.events if event.at >= began_at]
    tasks = sorted((e for e in events if isinstance(e, TaskFinished)), key=lambda e: e.at)
    began = min((e for e in events if isinstance(e, TaskStarted)), key=lambda e: e.at)
    expected = [FRONT_TOKENS, *[length] * count]
    if [len(task.rids) for task in tasks] != [1] * len(expected) or any(
        abs(task.new_tokens - tokens) > MAX_SHARED_TOKENS for task, tokens in zip(tasks, expected, strict=True)
    ):
        raise RuntimeError(f"{worker.name}: not one forward a prompt: {[task.new_tokens for task in tasks]}")
    if any(isinstance(event, TaskPreempted) for event in events):
        raise RuntimeError(f"{worker.name}: something was preempted although nothing is urgent")
    return {
        "whole_s": round(tasks[-1].at - began.at, 6),
        "forwards_s": round(sum(task.executed_s for task in tasks[1:]), 6),
        "cpu_s": round(cpu_s, 2),
    }


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each length and measure: the median of the pairs' ratios, their quartiles and range."""
    summaries = []
    for length in sorted({row["tokens"] for row in rows}):
        times: dict[tuple[tuple[int, int], str], dict[str, Any]] = {
            ((row["start"], row["pair"]), row["worker"]): row for row in rows if row["tokens"] == length
        }
        whole = [pair for pair, name in times if name == OURS.name and (pair, STOCK.name) in times]
        starts = sorted({start for start, _ in whole})
        for measure_name in MEASURES:
            ratio_of = {p: times[p, STOCK.name][measure_name] / times[p, OURS.name][measure_name] for p in whole}
            ratios = list(ratio_of.values())
            medians = [percentile([ratio_of[p] for p in whole if p[0] == start], 50) for start in starts]
            ours = sorted(times[p, OURS.name][measure_name] for p in whole)
            theirs = sorted(times[p, STOCK.name][measure_name] for p in whole)
            prompts = times[whole[0], OURS.name]["prompts"]
            summaries.append(
                {
                    "tokens": length,
                    "measure": measure_name,
                    "pairs": len(ratios),
                    "throughput_ratio": {
                        "median": round(percentile(ratios, 50), 4),
                        "p25": round(percentile(ratios, 25), 4),
                        "p75": round(percentile(ratios, 75), 4),
                        "min": round(min(ratios), 4),
                        "max": round(max(ratios), 4),
                    },
                    "median_of_each_start": [round(median, 4) for median in medians],
                    # The fastest of each is the least disturbed by the machine.
                    "ratio_of_sums": round(sum(theirs) / sum(ours), 4),
                    "ratio_of_fastest": round(theirs[0] / ours[0], 4),
                    "ours_ms_per_prompt": round(1_000 * percentile(ours, 50) / prompts, 3),
                    "stock_ms_per_prompt": round(1_000 * percentile(theirs, 50) / prompts, 3),
                }
            )
    return summaries


if __name__ == "__main__":
    sys.exit(main())
