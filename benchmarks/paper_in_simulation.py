"""The paper's main experiment in simulation: maximum goodput of three models under FlowPrefill and what it is measured
against, and how far the default policy is from the best that anyone could do.

Three models on A800-class GPUs (and on H800-class ones): Llama-3-8B on one, Qwen2.5-14B on two, Llama-3-70B on four.
Four classes with the paper's objectives for the 8B (text 0.25 s, image 0.5, search 4, file 6); those of another model
or GPU are scaled by how long the class's median prompt takes there alone, relative to the 8B on one A800. Maximum
goodput is the highest rate at which 90% of the requests are in time, by bisection over the load. Each repeat is another
workload from another seed; ratios are taken within a repeat.

The workload is the generated one unless ``--trace`` gives another. A seed gives the same figures on any machine.

    python benchmarks/paper_in_simulation.py --json result.json
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from results_file import write_result

from flowprefill_sglang.bench.goodput import TARGET
from flowprefill_sglang.sim.arrivals import Workload, generated, replayed
from flowprefill_sglang.sim.configuration import parse
from flowprefill_sglang.sim.cost_models import DEFAULT_COST_MODEL, load_machine
from flowprefill_sglang.sim.experiment import Experiment
from flowprefill_sglang.sim.machine import Machine
from flowprefill_sglang.workload.classes import CLASSES, assign_classes
from flowprefill_sglang.workload.formats import FORMATS, load_trace
from flowprefill_sglang.workload.trace import TraceRequest, spread_ties

SETUPS = tuple(
    f"{model}-{gpu}" for gpu in ("a800", "h800") for model in ("llama-3-8b-tp1", "qwen2.5-14b-tp2", "llama-3-70b-tp4")
)
OURS = ("feasible", "sedf")
BASELINES = ("fcfs", "fcfs@chunk8192", "fcfs@chunk2048", "sedf@chunk8192", "sedf@chunk2048", "sedf@layer")
LOADS = (0.5, 1.0, 2.0, 3.0)
"""For the distance to the bound."""
SWITCH_S = 100e-6
PARTS = ("goodput", "bound")
MOST_LOAD, LEAST_LOAD, RESOLUTION = 8.0, 0.01, 1.01


def objectives_s(machine: Machine) -> dict[str, float]:
    """The paper's for the 8B, times how much longer each class's median prompt takes on this machine."""
    reference = load_machine(DEFAULT_COST_MODEL)
    return {
        one.name: one.slo_s * machine.alone_s(one.median_input_tokens) / reference.alone_s(one.median_input_tokens)
        for one in CLASSES
    }


def max_goodput(experiment: Experiment, policy: str) -> dict[str, float]:
    """The highest load with the target attainment, and the requests in time per second there."""
    size, configuration = experiment.measure(), parse(policy)
    passed, failed = LEAST_LOAD, MOST_LOAD
    goodput_rps = 0.0
    while failed / passed > RESOLUTION:
        load = (passed * failed) ** 0.5
        tally = experiment.simulate(configuration, size.interval_factor(load, experiment.workers))
        if tally.attainment >= TARGET:
            passed, goodput_rps = load, tally.goodput_rps
        else:
            failed = load
    return {"load": round(passed, 4), "max_goodput_rps": round(goodput_rps, 4)}


def goodput_rows(setup: str, workload: Workload, repeat: int) -> list[dict[str, Any]]:
    machine = load_machine(setup)
    experiment = Experiment(workload=workload, machine=machine, objectives_s=objectives_s(machine), switch_s=SWITCH_S)
    return [
        {"part": "goodput", "setup": setup, "repeat": repeat, "policy": policy} | max_goodput(experiment, policy)
        for policy in (*OURS, *BASELINES)
    ]


def bound_rows(workload: Workload, repeat: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Of the default policy on the reference, with and without aging and batches."""
    machine = load_machine(DEFAULT_COST_MODEL)
    plain = Experiment(workload=workload, machine=machine, objectives_s=objectives_s(machine), switch_s=SWITCH_S)
    patient = replace(plain.aging, max_wait_s=1e9, max_suspend_s=1e9)
    default = parse("feasible")
    requests = plain.measure().requests
    rows = []
    for load in LOADS:
        factor = plain.measure().interval_factor(load, 1)
        alone = plain.without_batches(factor, options.whole_seconds)
        tallies = {
            (is_batching, is_aging): replace(
                plain, is_batching=is_batching, aging=plain.aging if is_aging else patient
            ).simulate(default, factor)
            for is_batching in (True, False)
            for is_aging in (True, False)
        }
        starts = [set(alone.chosen), set(range(requests))]
        searched = plain.with_hindsight(default, factor, starts, options.hindsight_rounds)
        found = max(alone.least, searched, *(tally.attained for tally in tallies.values()))
        known = {
            "best_known": round(found / requests, 4),
            "best_alone_least": round(alone.least / requests, 4),
            "best_alone_most": round(alone.most / requests, 4),
        }
        bounds = {}
        for is_batching in (True, False):
            linear = replace(plain, is_batching=is_batching).bound([default], factor, window=1 << 30)
            most = alone.most / requests
            if is_batching:
                most = plain.bound([default], factor, window=1 << 30, whole_s=options.whole_seconds)
            bounds[is_batching] = (most, linear)
        for (is_batching, is_aging), tally in tallies.items():
            most, linear = bounds[is_batching]
            rows.append(
                {"part": "bound", "repeat": repeat, "load": load, "is_batching": is_batching, "is_aging": is_aging}
                | {"attainment": round(tally.attainment, 4), "bound": round(most, 4), "linear_bound": round(linear, 4)}
                | known
                | {
                    "of_bound": round(tally.attainment / most, 4),
                    "of_best_known": round(tally.attained / found, 4),
                    "retractions": tally.retractions,
                }
                | {"longest_ttft_s": round(max(one.ttft.longest_s for one in tally.classes.values()), 1)}
            )
    return rows


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The default policy's maximum goodput over each other's: median, least and most of the repeats."""
    found: dict[str, Any] = {}
    rates = {
        (row["setup"], row["repeat"], row["policy"]): row["max_goodput_rps"] for row in rows if row["part"] == "goodput"
    }
    for setup in dict.fromkeys(setup for setup, _, _ in rates):
        repeats = sorted({repeat for its, repeat, _ in rates if its == setup})
        for baseline in (*OURS[1:], *BASELINES):
            values = [
                rates[setup, repeat, OURS[0]] / rates[setup, repeat, baseline]
                for repeat in repeats
                if rates[setup, repeat, baseline]
            ]
            if values:
                spread = {"median": median(values), "min": min(values), "max": max(values), "repeats": len(values)}
                found[f"{setup}: {OURS[0]}/{baseline}"] = {key: round(value, 3) for key, value in spread.items()}
    return found


def workloads(options: argparse.Namespace) -> list[Workload]:
    """One for each repeat: seeds of the generator, or consecutive windows of the trace."""
    if options.trace is None:
        return [generated(options.requests, options.seed + repeat) for repeat in range(options.repeats)]
    requests: Sequence[TraceRequest] = load_trace(options.trace, options.format).requests
    if options.format == "mooncake":  # its times are known to three seconds
        requests = spread_ties(requests, options.seed)
    requests = assign_classes(requests)
    step = len(requests) // options.repeats
    return [
        replayed(requests[first : first + min(step, options.requests)])
        for first in range(0, step * options.repeats, step)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="default: the generated workload")
    parser.add_argument("--format", choices=sorted(FORMATS))
    parser.add_argument("--requests", type=int, default=2000, help="of a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=PARTS, help="default: both")
    parser.add_argument("--whole-seconds", type=float, default=10, help="for each bound of whole requests")
    parser.add_argument("--hindsight-rounds", type=int, default=30, help="of the search for a schedule that knows all")
    parser.add_argument("--quick", action="store_true", help="a smoke run; its figures mean nothing")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if (options.trace is None) != (options.format is None):
        parser.error("--trace and --format go together")
    setups: Sequence[str] = SETUPS
    if options.quick:
        options.requests, options.repeats, setups = 150, 2, SETUPS[:1]
        options.whole_seconds, options.hindsight_rounds = 1, 2
    if options.only == "bound":
        setups = ()
    rows: list[dict[str, Any]] = []
    for repeat, workload in enumerate(workloads(options)):
        new = [row for setup in setups for row in goodput_rows(setup, workload, repeat)]
        if options.only != "goodput":
            new += bound_rows(workload, repeat, options)
        for row in new:
            print(*(f"{key} {value}" for key, value in row.items()), flush=True)
        rows += new
    found = ratios(rows)
    for name, spread in found.items():
        print(f"{name}: {spread['median']} ({spread['min']}–{spread['max']})")
    if options.json is not None:
        trace = None
        if options.trace is not None:
            trace = {"name": options.trace.name, "sha256": hashlib.sha256(options.trace.read_bytes()).hexdigest()}
        measured = {
            "requests": options.requests,
            "trace": trace,
            "whole_seconds": options.whole_seconds,
            "hindsight_rounds": options.hindsight_rounds,
            "objectives_s": {setup: objectives_s(load_machine(setup)) for setup in setups or (DEFAULT_COST_MODEL,)},
            "ratios": found,
            "rows": rows,
        }
        write_result(options.json, seed=options.seed, measured=measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
