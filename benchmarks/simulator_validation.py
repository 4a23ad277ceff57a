"""Whether the simulator says what a real cluster on this machine does: same trace, same policy, three loads.

First the machine is measured, and nothing of the loads that are compared: ``flowprefill profile`` on the core that the
worker will compute on; what a request costs that core beside its forward pass (messages, batches, results, the handoff
of its KV), from bursts of two lengths on the live worker; and what lies between a client and the worker, from single
requests. Then each load is played to the live cluster and simulated, FlowPrefill
and stock ``fcfs`` side by side, and attainment and mean time to first token are compared.

    python benchmarks/simulator_validation.py --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from msgspec.structs import replace as replace_struct
from results_file import write_result

from flowprefill_sglang.bench.client import RequestRecord, replay
from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.objectives import Objective, median_prompts, scaled_objectives, unscaled_objectives
from flowprefill_sglang.bench.plan import plan_requests
from flowprefill_sglang.bench.probe import measure_isolated_ttft
from flowprefill_sglang.cluster.configurations import STOCK_UNCHUNKED, flowprefill
from flowprefill_sglang.cluster.side_by_side import LiveWorker, LiveWorkers
from flowprefill_sglang.core.cost_file import load as load_cost
from flowprefill_sglang.core.prefill_cost import CostModel, Extent
from flowprefill_sglang.observe.events import TaskFinished, TaskStarted
from flowprefill_sglang.sim.arrivals import replayed
from flowprefill_sglang.sim.configuration import parse
from flowprefill_sglang.sim.experiment import Experiment
from flowprefill_sglang.sim.machine import LLAMA_LIKE, Machine
from flowprefill_sglang.workload.classes import assign_classes
from flowprefill_sglang.workload.formats import load_trace
from flowprefill_sglang.workload.tiny_model import make_deep_model
from flowprefill_sglang.workload.trace import TraceRequest, cap_outputs, scale_lengths

TRACE = Path(__file__).resolve().parents[2] / "shared" / "traces" / "azure_llm_conv_2023.csv"
SIMULATED = {"flowprefill": "feasible", STOCK_UNCHUNKED.name: "fcfs"}
"""Live configuration, and its name in the simulator."""
ENDPOINT = ENDPOINTS["generate"]
BURSTS = {250: 48, 2_000: 16}
"""Lengths of the prompts of two bursts, and how many of them."""
BURST_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What a request costs a worker beside its forward pass, while others wait."""

    request_s: float
    token_s: float

    def added_to(self, cost: CostModel) -> CostModel:
        """The cost of everything."""
        return replace_struct(
            cost,
            request_s=cost.request_s + self.request_s,
            short_token_s=cost.short_token_s + self.token_s,
            long_token_s=cost.long_token_s + self.token_s,
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """This machine, for the simulator."""

    cost: CostModel
    """Of everything."""
    beside: Beside
    way_s: float
    """Of a single request: all of its TTFT but that."""

    def machine(self, layers: int) -> Machine:
        """A prefill worker of it."""
        return Machine(name="this one", cost=self.cost, layers=layers, operators=LLAMA_LIKE, handoff_base_s=self.way_s)


def main() -> int:
    """Measure, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=TRACE, help="in Azure's format")
    parser.add_argument("--requests", type=int, default=300, help="for each load")
    parser.add_argument("--loads", default="0.3,0.6,0.9", help="offered work over capacity")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="smoke run: one load of 40 requests")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if options.quick:
        options.requests, options.loads, options.repeats = 40, "0.5", 1
    if not options.trace.is_file():
        print(f"no trace at {options.trace}: --trace", file=sys.stderr)
        return 2
    model, shape = make_deep_model()
    cost_file = Path(tempfile.mkdtemp(prefix="flowprefill-validation-")) / "cost.json"
    profile(model, cost_file, seconds=10 if options.quick else 60)
    measured = asyncio.run(measure(options, model, cost_file, shape.num_hidden_layers))
    if options.json:
        write_result(options.json, seed=options.seed, measured={"model": asdict(shape)} | measured)
    return 0


def profile(model: Path, output: Path, *, seconds: float) -> None:
    """Fit the cost model where the worker's scheduler will run: on the first core, with one thread."""
    command = [sys.executable, "-m", "flowprefill_sglang", "profile", "--model-path", str(model), "--threads", "1"]
    command += ["--seconds", str(seconds), "--output", str(output), "--max-total-tokens", "32768"]
    core = min(os.sched_getaffinity(0))
    subprocess.run(command, check=True, preexec_fn=lambda: os.sched_setaffinity(0, {core}))


async def measure(options: argparse.Namespace, model: Path, cost_file: Path, layers: int) -> dict[str, Any]:
    """A row for each configuration, load and repeat, and the machine as it was measured."""
    trace = load_trace(options.trace, "azure")
    rows = [row for row in assign_classes(cap_outputs(trace.requests, 1)) if row.input_tokens <= 12_000]
    first = len(rows) // 3
    scaled = scale_lengths(rows[first : first + options.requests], 0.5)
    window = [replace(row, arrival_s=row.arrival_s - scaled[0].arrival_s) for row in scaled]
    found: list[dict[str, Any]] = []
    configurations = [flowprefill("feasible", "--cost-file", str(cost_file)), STOCK_UNCHUNKED]
    async with LiveWorkers(model, configurations) as live:
        worker = live["flowprefill"]
        objectives, machine_facts = await calibrate(worker, window, load_cost(cost_file))
        machine = machine_facts.machine(layers)
        experiment = Experiment(
            workload=replayed(window),
            machine=machine,
            objectives_s={name: objective.slo_ms / 1_000 for name, objective in objectives.items()},
            seed=options.seed,
        )
        for repeat in range(options.repeats):
            for load in map(float, options.loads.split(",")):
                interval_factor = experiment.measure().interval_factor(load, 1)
                for name in SIMULATED:
                    played = await play(live[name], window, interval_factor, objectives, options.seed + repeat)
                    tally = experiment.simulate(parse(SIMULATED[name]), interval_factor)
                    mean_ttft_s = fmean(record.ttft_s or 0.0 for record in played)
                    attained = sum(objectives[record.class_name].is_met_by(record) for record in played)
                    attainment = attained / len(played)
                    found.append(
                        {
                            "configuration": name,
                            "load": load,
                            "repeat": repeat,
                            "requests": len(played),
                            "attainment": round(attainment, 4),
                            "simulated_attainment": round(tally.attainment, 4),
                            "attainment_points_off": round(100 * (tally.attainment - attainment), 2),
                            "mean_ttft_s": round(mean_ttft_s, 4),
                            "simulated_mean_ttft_s": round(tally.mean_ttft_s, 4),
                            "mean_ttft_off": round(tally.mean_ttft_s / mean_ttft_s - 1, 4),
                        }
                    )
                    print(found[-1], flush=True)
        is_pinned = live.is_pinned
    return {
        "trace": {"file": trace.name, "sha256": trace.sha256, "first_row": first, "length_scale": 0.5},
        "pinned": is_pinned,
        "machine": {
            "beside_request_ms": round(1_000 * machine_facts.beside.request_s, 3),
            "beside_token_us": round(1e6 * machine_facts.beside.token_s, 3),
            "way_ms": round(1_000 * machine_facts.way_s, 3),
            "cost": {name: getattr(machine_facts.cost, name) for name in machine_facts.cost.__struct_fields__},
        },
        "objectives": {name: round(objective.slo_ms, 2) for name, objective in objectives.items()},
        "rows": found,
    }


async def calibrate(
    worker: LiveWorker, window: Sequence[TraceRequest], cost: CostModel
) -> tuple[dict[str, Objective], Measured]:
    """Objectives for this machine, and what the cost model does not know of it."""
    medians = median_prompts(window)
    isolated = await measure_isolated_ttft(
        worker.url, medians, endpoint=ENDPOINT, model="", prompts="bytes", seed=1, repeats=7
    )
    objectives = scaled_objectives(medians, isolated, 0.5)
    beside = await measure_beside(worker, cost)
    whole = beside.added_to(cost)
    way_s = fmean(median(isolated[name]) - whole.seconds((Extent(tokens),)) for name, tokens in medians.items())
    return objectives, Measured(cost=whole, beside=beside, way_s=max(0.0, way_s))


async def measure_beside(worker: LiveWorker, cost: CostModel) -> Beside:
    """Two bursts: how much longer each request of them takes than its part of a forward pass."""
    more_s: dict[int, list[float]] = {tokens: [] for tokens in BURSTS}
    for seed in range(BURST_REPEATS):
        for tokens, count in BURSTS.items():
            burst = [
                TraceRequest(arrival_s=0, input_tokens=tokens, output_tokens=1, class_name="file") for _ in range(count)
            ]
            began_at = time.monotonic()
            await send(worker, burst, unscaled_objectives(100), seed=1_000 + seed)
            events = (await worker.timeline(time.monotonic() - began_at + 0.1)).events
            started = [event for event in events if isinstance(event, TaskStarted) and event.at >= began_at]
            ended = [event for event in events if isinstance(event, TaskFinished) and event.at >= began_at]
            forwards_s = sum(cost.seconds([Extent(tokens)] * len(event.rids)) for event in ended)
            more_s[tokens].append((ended[-1].at - started[0].at - forwards_s) / count)
    (short, less_s), (long, most_s) = ((tokens, median(values)) for tokens, values in more_s.items())
    token_s = max(0.0, (most_s - less_s) / (long - short))
    return Beside(request_s=max(0.0, less_s - short * token_s), token_s=token_s)


async def play(
    worker: LiveWorker,
    window: Sequence[TraceRequest],
    interval_factor: float,
    objectives: Mapping[str, Objective],
    seed: int,
) -> list[RequestRecord]:
    """The window at a load, on the live worker. Raises RuntimeError when a request failed."""
    stretched = [replace(row, arrival_s=row.arrival_s * interval_factor) for row in window]
    return await send(worker, stretched, objectives, seed)


async def send(
    worker: LiveWorker, rows: Sequence[TraceRequest], objectives: Mapping[str, Objective], seed: int
) -> list[RequestRecord]:
    run_id = f"validation-{uuid.uuid4().hex[:12]}"
    plan = plan_requests(rows, run_id=run_id, seed=seed, endpoint=ENDPOINT, model="", objectives=objectives)
    records = await replay(worker.url, plan, timeout_s=300)
    failed = [record.error for record in records if record.error is not None]
    if failed:
        raise RuntimeError(f"{worker.name}: {len(failed)} requests failed: {failed[0]}")
    await worker.drained()
    return list(records)


if __name__ == "__main__":
    sys.exit(main())
