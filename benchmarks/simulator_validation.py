"""Whether the simulator says what a real cluster on this machine does: same trace, same policy, three loads.

First the machine is measured, and nothing of what is compared: each configuration as ``live_machine.py`` says, with
another window of the trace, at one load. Then each load is played to the live cluster and simulated, FlowPrefill and
stock ``fcfs`` side by side, and attainment and mean time to first token are compared. Load is relative to the capacity
that was measured: what FlowPrefill's worker takes for all prompts one by one, gaps included, over the time in which
they arrive.

    python benchmarks/simulator_validation.py --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from live_machine import ENDPOINT, Cluster, Measured, Played, measure_machine
from msgspec.structs import asdict as asdict_struct
from results_file import write_result

from flowprefill_sglang.bench.objectives import Objective, median_prompts, scaled_objectives
from flowprefill_sglang.bench.probe import measure_isolated_ttft
from flowprefill_sglang.cluster.configurations import STOCK_UNCHUNKED, flowprefill
from flowprefill_sglang.cluster.side_by_side import LiveWorkers
from flowprefill_sglang.core.cost_file import load as load_cost
from flowprefill_sglang.sim.arrivals import replayed
from flowprefill_sglang.sim.configuration import parse
from flowprefill_sglang.sim.experiment import Experiment
from flowprefill_sglang.sim.tally import Tally
from flowprefill_sglang.workload.classes import assign_classes
from flowprefill_sglang.workload.formats import load_trace
from flowprefill_sglang.workload.tiny_model import make_deep_model
from flowprefill_sglang.workload.trace import TraceRequest, cap_outputs, scale_lengths

TRACE = Path(__file__).resolve().parents[2] / "shared" / "traces" / "azure_llm_conv_2023.csv"
SIMULATED = {"flowprefill": "feasible", STOCK_UNCHUNKED.name: "fcfs"}
"""Live configuration, and its name in the simulator."""
LENGTH_SCALE = 0.5
CALIBRATION_REQUESTS = 200
BUSY_SHARE = 0.45
"""Of the calibration, by forwards alone; with what lies between them that is about the middle one of the loads that are
compared. Work costs less the busier the machine is: caches stay warm."""
SWITCH_S = 30e-6
"""``boundary_cost.py``'s figure for a stop and going on."""


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


def stretch_of(rows: Sequence[TraceRequest], first: int, count: int) -> list[TraceRequest]:
    """A part of the trace at the scaled length, from time zero on."""
    scaled = scale_lengths(rows[first : first + count], LENGTH_SCALE)
    return [replace(row, arrival_s=row.arrival_s - scaled[0].arrival_s) for row in scaled]


async def measure(options: argparse.Namespace, model: Path, cost_file: Path, layers: int) -> dict[str, Any]:
    """A row for each configuration, load and repeat, and the machine as it was measured."""
    trace = load_trace(options.trace, "azure")
    rows = [row for row in assign_classes(cap_outputs(trace.requests, 1)) if row.input_tokens <= 12_000]
    first = len(rows) // 3
    window = stretch_of(rows, first, options.requests)
    other = stretch_of(rows, 2 * len(rows) // 3, min(options.requests, CALIBRATION_REQUESTS))
    loads = list(map(float, options.loads.split(",")))
    cost = load_cost(cost_file)
    configurations = [flowprefill("feasible", "--cost-file", str(cost_file)), STOCK_UNCHUNKED]
    found: list[dict[str, Any]] = []
    experiments: dict[str, Experiment] = {}
    measured: dict[str, Measured] = {}
    machines: dict[str, Any] = {}
    async with LiveWorkers(model, configurations) as live:
        cluster = Cluster(live)
        medians = median_prompts(window)
        isolated = await measure_isolated_ttft(
            live["flowprefill"].url, medians, endpoint=ENDPOINT, model="", prompts="bytes", seed=1, repeats=7
        )
        objectives = scaled_objectives(medians, isolated, 0.5)
        objectives_s = {name: objective.slo_ms / 1_000 for name, objective in objectives.items()}
        for name in SIMULATED:
            its, figures = await measure_machine(
                cluster,
                name,
                profiled=cost,
                lengths=list(medians.values()),
                window=other,
                busy_share=BUSY_SHARE,
                objectives=objectives,
                seed=options.seed,
            )
            measured[name] = its
            machines[name] = asdict(its) | {
                "forward": asdict_struct(its.forward),
                "measured": {key: round(value, 4) for key, value in figures.items()},
            }
            print(name, machines[name], flush=True)
            experiments[name] = Experiment(
                workload=replayed(window),
                machine=its.machine(layers),
                objectives_s=objectives_s,
                switch_s=SWITCH_S,
                seed=options.seed,
            )
        for repeat in range(options.repeats):
            for load in loads:
                interval_factor = experiments["flowprefill"].measure().interval_factor(load, 1)
                stretched = [replace(row, arrival_s=row.arrival_s * interval_factor) for row in window]
                for name, simulated in SIMULATED.items():
                    played = await cluster.play(name, stretched, objectives, options.seed + repeat)
                    tally = experiments[name].simulate(parse(simulated), interval_factor)
                    row = {"configuration": name, "load": load, "repeat": repeat, "requests": len(window)}
                    found.append(row | compared(played, tally, objectives) | measured[name].against(played))
                    print(found[-1], flush=True)
        is_pinned = live.is_pinned
    return {
        "trace": {"file": trace.name, "sha256": trace.sha256, "first_row": first, "length_scale": LENGTH_SCALE},
        "pinned": is_pinned,
        "profiled": asdict_struct(cost),
        "calibration_busy_share": BUSY_SHARE,
        "machines": machines,
        "objectives": {name: round(objective.slo_ms, 2) for name, objective in objectives.items()},
        "mean": means(found),
        "rows": found,
    }


def compared(played: Played, tally: Tally, objectives: Mapping[str, Objective]) -> dict[str, Any]:
    """One run, live and simulated."""
    records = played.records
    mean_ttft_s = fmean(record.ttft_s or 0.0 for record in records)
    attainment = fmean(objectives[record.class_name].is_met_by(record) for record in records)
    return {
        "attainment": round(attainment, 4),
        "simulated_attainment": round(tally.attainment, 4),
        "attainment_points_off": round(100 * (tally.attainment - attainment), 2),
        "mean_ttft_s": round(mean_ttft_s, 4),
        "simulated_mean_ttft_s": round(tally.mean_ttft_s, 4),
        "mean_ttft_off": round(tally.mean_ttft_s / mean_ttft_s - 1, 4),
        "core_cpu_s": round(played.scheduler_cpu_s, 3),
        "simulated_core_s": round(tally.busy_s, 3),
        "host_cpu_s": round(played.host_cpu_s, 3),
        "took_s": round(played.took_s, 3),
        "forwards": len(played.forwards()),
        "simulated_forwards": tally.forwards,
        "simulated_preemptions": tally.preemptions,
    }


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The repeats of each configuration and load together."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["configuration"], row["load"]), []).append(row)
    return [
        {
            "configuration": name,
            "load": load,
            "attainment_points_off": round(fmean(row["attainment_points_off"] for row in group), 2),
            "mean_ttft_off": round(
                sum(row["simulated_mean_ttft_s"] for row in group) / sum(row["mean_ttft_s"] for row in group) - 1, 4
            ),
        }
        for (name, load), group in groups.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
