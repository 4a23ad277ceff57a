"""What a scheduling round costs, and how many there are.

First the decision alone, in this process: rounds of the worker's scheduler as its loop runs them (rank, walk the
ranking, fill the batch, note the start), with 10, 100 and 1,000 requests waiting, for each policy. Each round comes
after an event, an arrival or a completion in turn, and the number of those waiting stays what it is.

Then a live worker: rounds per request, and the round's own time as the worker reports it, which has SGLang's process
around it. First under a burst of many requests at once, of which it serves most while the others come; then in a crowd:
long prompts first, with equal objectives, so that a thousand short ones wait behind them.

    python benchmarks/scheduling_rounds.py --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from results_file import write_result

from flowprefill_sglang.bench.client import replay
from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.objectives import unscaled_objectives
from flowprefill_sglang.bench.plan import plan_requests
from flowprefill_sglang.bench.report import percentile
from flowprefill_sglang.cluster.configurations import flowprefill
from flowprefill_sglang.cluster.side_by_side import KV_POOL_TOKENS, LiveWorker, LiveWorkers
from flowprefill_sglang.core.aging import AgingLimits
from flowprefill_sglang.core.batching import BatchLimits
from flowprefill_sglang.core.policies import POLICIES
from flowprefill_sglang.core.prefill_cost import CostModel, Predictor
from flowprefill_sglang.observe.events import RequestEnded, RoundDone, TaskFinished, TaskPreempted
from flowprefill_sglang.prefill_worker.scheduler import PrefillScheduler, Request, Task
from flowprefill_sglang.workload.generator import generate_workload
from flowprefill_sglang.workload.tiny_model import make_deep_model
from flowprefill_sglang.workload.trace import TraceRequest, cap_outputs, scale_lengths

COST = CostModel(base_s=0.01, short_token_s=1e-4, long_token_s=1e-4, pair_s=1e-8)
"""Any cost model: rounds do not depend on how long prefills take, only on whether they are predicted to be on time."""
KV_TOKENS = 1_000_000
CROWD_FRONT_TOKENS = (16_000, 16_000)
"""What a crowd waits behind: it must take longer than the crowd takes to come."""
SHORT_TOKENS = 64
OBJECTIVES_S = {"text": 0.25, "image": 0.5, "search": 4.0, "file": 6.0}


class Rounds:
    """A scheduler with so many requests waiting, whose rounds are timed."""

    def __init__(self, policy: str, waiting: int, seed: int) -> None:
        self._waiting = waiting
        self._now = 1_000.0
        self._core = PrefillScheduler(
            Predictor(COST), policy=policy, aging=AgingLimits(), batching=BatchLimits(), now=self._now
        )
        self._rng = random.Random(seed)
        self._names = count()
        drawn = generate_workload(requests=500, rate_rps=1, seed=seed).requests
        self._lengths = [(r.class_name, r.input_tokens) for r in drawn]
        self.promoted = 0
        for _ in range(waiting):
            self._arrive(self._now - self._rng.uniform(0, 50))

    def round(self, *, after_arrival: bool) -> tuple[float, float]:
        """One event and the round after it; wall and CPU seconds that the round took."""
        core, now = self._core, self._now
        self._now += 0.01
        if after_arrival or core.running is None:
            self._arrive(now)
        else:
            core.finished(now)
        began_at, cpu_before_s = time.perf_counter(), time.thread_time()
        ranking = core.ranking(now)
        candidate = ranking.order[0]
        task = core.task_of(candidate)
        if task is not None:
            self._go_on(task, now)
        else:
            head = core.request_of(candidate)
            requests = core.batch_of(head, ranking.order[1:], now, KV_TOKENS)
            if core.running is not None:
                core.preempted(now)
            core.started(requests, [request.extent for request in requests], now)
        took_s = time.perf_counter() - began_at, time.thread_time() - cpu_before_s
        self.promoted += ranking.promoted
        for _ in range(self._waiting - core.waiting):
            self._arrive(now)
        return took_s

    def _go_on(self, task: Task, now: float) -> None:
        if task is self._core.running:
            return
        if self._core.running is not None:
            self._core.preempted(now)
        self._core.resumed(task, now)

    def _arrive(self, at: float) -> None:
        class_name, tokens = self._rng.choice(self._lengths)
        self._core.arrived(
            Request(
                rid=str(next(self._names)),
                slo_class=class_name,
                new_tokens=tokens,
                cached_tokens=0,
                arrived_at=at,
                deadline_at=at + OBJECTIVES_S[class_name] * self._rng.uniform(1, 40),
            )
        )


def measure_rounds(policy: str, waiting: int, rounds: int, seed: int) -> dict[str, Any]:
    """Percentiles of the time of a round. Garbage is collected as the worker collects it: by Python, at its moments."""
    bench = Rounds(policy, waiting, seed)
    for number in range(50):
        bench.round(after_arrival=number % 2 == 0)
    gc.collect()
    took_s = [bench.round(after_arrival=number % 2 == 0) for number in range(rounds)]
    return {
        "part": "decision",
        "policy": policy,
        "waiting": waiting,
        "rounds": rounds,
        "seed": seed,
        "promoted": bench.promoted,
        "us": _percentiles_us([wall_s for wall_s, _ in took_s]),
        "cpu_us": _percentiles_us([cpu_s for _, cpu_s in took_s]),
    }


def _percentiles_us(values_s: Sequence[float]) -> dict[str, float]:
    values_us = [1e6 * value for value in values_s]
    return {f"p{p}": round(percentile(values_us, p), 1) for p in (50, 90, 99, 99.9)} | {"max": round(max(values_us), 1)}


def burst_of(requests: int, seed: int) -> list[TraceRequest]:
    """All within a second, of all lengths."""
    return cap_outputs(
        scale_lengths(generate_workload(requests=requests, rate_rps=requests, seed=seed).requests, 0.05), 1
    )


def crowd_of(requests: int) -> list[TraceRequest]:
    """Long ones, and then so many short ones at once. With one objective for all, nobody overtakes."""
    lengths = [*CROWD_FRONT_TOKENS, *[SHORT_TOKENS] * requests]
    return [
        TraceRequest(
            arrival_s=0.0 if place < len(CROWD_FRONT_TOKENS) else 0.1,
            input_tokens=tokens,
            output_tokens=1,
            class_name="file",
        )
        for place, tokens in enumerate(lengths)
    ]


async def measure_worker(
    worker: LiveWorker, kind: str, trace: Sequence[TraceRequest], *, objective_s: float, seed: int
) -> dict[str, Any]:
    """Rounds, preemptions and their times from the worker's own events."""
    requests = len(trace)
    plan = plan_requests(
        trace,
        run_id=f"rounds-{uuid.uuid4().hex[:12]}",
        seed=seed,
        endpoint=ENDPOINTS["generate"],
        model="",
        objectives=unscaled_objectives(objective_s),
    )
    began_at = time.monotonic()
    records = await replay(worker.url, plan, timeout_s=300)
    await worker.drained()
    recording = await worker.timeline(time.monotonic() - began_at + 1)
    events = [event for event in recording.events if event.at >= began_at]
    rounds = [event for event in events if isinstance(event, RoundDone)]
    ended = sum(isinstance(event, RequestEnded) for event in events)
    preemptions = sum(isinstance(event, TaskPreempted) for event in events)
    crowded_s = [event.duration_s for event in rounds if event.waiting >= requests / 2]
    return {
        "part": "worker",
        "kind": kind,
        "requests": requests,
        "failed": sum(record.error is not None for record in records),
        "ended": ended,
        "events_lost": recording.lost,
        "tasks": sum(isinstance(event, TaskFinished) for event in events),
        "preemptions": preemptions,
        "rounds": len(rounds),
        "rounds_by_trigger": dict(Counter(event.trigger.value for event in rounds)),
        "rounds_per_request": round(len(rounds) / max(1, ended), 3),
        "allowed_per_request": round((2 * ended + preemptions) / max(1, ended), 3),
        "most_waiting": max((event.waiting for event in rounds), default=0),
        "us": _percentiles_us([event.duration_s for event in rounds]),
        "rounds_with_half_or_more_waiting": len(crowded_s),
        "us_with_half_or_more_waiting": _percentiles_us(crowded_s) if crowded_s else None,
    }


async def live_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    model, _ = make_deep_model()
    # A waiting request has a slot on both sides, and its decode instance has set aside KV for prompt and answer.
    flags = ["--max-total-tokens", str(4 * KV_POOL_TOKENS), "--max-running-requests", str(options.burst + 100)]
    flags += ["--num-reserved-decode-tokens", "1"]
    async with LiveWorkers(model, [flowprefill()], log_dir=options.log_dir, flags=flags) as live:
        worker, seed = live["flowprefill"], options.seed
        await measure_worker(worker, "warm-up", burst_of(20, seed + 100), objective_s=20.0, seed=seed + 100)
        burst = await measure_worker(worker, "burst", burst_of(options.burst, seed), objective_s=20.0, seed=seed)
        crowd = await measure_worker(worker, "crowd", crowd_of(options.burst), objective_s=600.0, seed=seed + 1)
        return [burst, crowd]


def main() -> int:
    """Measure, print, write; 1 when there were more rounds than two a request and one a preemption."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", default="10,100,1000")
    parser.add_argument("--rounds", type=int, default=2_000, help="for each policy and number of those waiting")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--burst", type=int, default=1_000, help="requests at once to the live worker; 0: none")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("--quick", action="store_true", help="smoke run")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.repeats, options.burst = 200, 1, min(options.burst, 100)
    rows = []
    for repeat in range(options.repeats):
        for waiting in map(int, options.waiting.split(",")):
            for policy in sorted(POLICIES):
                row = measure_rounds(policy, waiting, options.rounds, options.seed + repeat)
                rows.append(row)
                print(f"{waiting:5} waiting  {policy:9} us {row['us']}  CPU us {row['cpu_us']}", flush=True)
    if options.burst:
        live = asyncio.run(live_part(options))
        rows += live
        for row in live:
            print({key: value for key, value in row.items() if key != "part"})
    if options.json:
        write_result(options.json, seed=options.seed, measured={"rows": rows})
    worker_rows = [row for row in rows if row["part"] == "worker"]
    return 1 if any(row["rounds_per_request"] > row["allowed_per_request"] for row in worker_rows) else 0


if __name__ == "__main__":
    sys.exit(main())
