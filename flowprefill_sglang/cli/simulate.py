"""``flowprefill simulate``: the product's scheduling on a virtual clock, for any policy, load, model and GPU."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from flowprefill_sglang.bench.provenance import provenance
from flowprefill_sglang.cli.simulate_workload import add_workload_arguments, chosen_workload
from flowprefill_sglang.core.aging import AgingLimits
from flowprefill_sglang.core.batching import BatchLimits
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.flag_values import count, factor, number, positive_seconds
from flowprefill_sglang.prefill_worker.settings import SchedulerSettings
from flowprefill_sglang.router.policies import DEFAULT_POLICY, POLICIES
from flowprefill_sglang.sim import configuration
from flowprefill_sglang.sim.configuration import Configuration
from flowprefill_sglang.sim.cost_models import DEFAULT_COST_MODEL, DEFAULT_LAYERS, built_in, load_machine
from flowprefill_sglang.sim.experiment import Experiment, result_row
from flowprefill_sglang.sim.report import table

DEFAULT_POLICIES = "feasible,sedf,fcfs,fcfs@chunk2048"
DEFAULT_SWITCH_US = 100.0
DEFAULT_BOUND_S = 10.0
WIDTH = 140
"""Columns of the table where nobody says how wide the output is."""
"""A round of the scheduler and the switch; both were measured in tens of microseconds on a CPU."""


def add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``simulate``."""
    defaults = SchedulerSettings()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "POLICY" + (configuration.__doc__ or "").partition("::")[2].rstrip()
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--policy",
        type=_policies,
        default=_policies(DEFAULT_POLICIES),
        metavar="A,B,…",
        help=f"{configuration.GRAMMAR}, see below (default {DEFAULT_POLICIES})",
    )
    what.add_argument(
        "--load",
        type=_loads,
        default=[1.0],
        metavar="X,Y,…",
        help="offered work over the workers' capacity, prompts computed one by one (default 1)",
    )
    what.add_argument("--bound", action="store_true", help="print what anyone could reach who knew the future")
    what.add_argument(
        "--bound-window", type=count, default=2_000, metavar="N", help="requests of one linear program (default 2000)"
    )
    what.add_argument(
        "--bound-seconds",
        type=positive_seconds,
        default=DEFAULT_BOUND_S,
        metavar="S",
        help="to spend on each for a bound that counts whole requests only; needs SciPy (default %(default)g)",
    )
    add_workload_arguments(parser)
    machine = parser.add_argument_group("cluster")
    machine.add_argument(
        "--cost-model",
        default=DEFAULT_COST_MODEL,
        metavar="NAME|FILE",
        help=f"a file of 'flowprefill profile' or of a roofline, or MODEL-tpN-GPU with {', '.join(built_in('models'))} "
        f"and {', '.join(built_in('gpus'))} (default {DEFAULT_COST_MODEL})",
    )
    machine.add_argument(
        "--layers",
        type=count,
        default=DEFAULT_LAYERS,
        metavar="N",
        help=f"of the model behind a file of 'flowprefill profile' (default {DEFAULT_LAYERS})",
    )
    machine.add_argument("--workers", type=count, default=1, metavar="W", help="prefill workers (default 1)")
    machine.add_argument("--routers", type=count, default=1, metavar="R", help="routers that share them (default 1)")
    machine.add_argument("--dispatch", choices=sorted(POLICIES), default=DEFAULT_POLICY, help="default: %(default)s")
    machine.add_argument(
        "--switch-us",
        type=lambda text: number(text, "a number of microseconds, 0 or more", lambda v: v >= 0),
        default=DEFAULT_SWITCH_US,
        metavar="US",
        help="device time lost when another task starts or goes on (default %(default)g)",
    )
    machine.add_argument(
        "--prediction-error",
        type=lambda text: number(text, "a number from 0 to 2", lambda v: 0 <= v <= 2),
        default=0.0,
        metavar="E",
        help="standard deviation of log(real / predicted seconds) of a forward (default 0)",
    )
    rules = parser.add_argument_group("the product's scheduler")
    rules.add_argument("--max-wait-secs", type=positive_seconds, default=defaults.max_wait_s, metavar="S")
    rules.add_argument("--max-suspend-secs", type=positive_seconds, default=defaults.max_suspend_s, metavar="S")
    rules.add_argument("--batch-tokens", type=count, default=defaults.batch_tokens, metavar="N")
    rules.add_argument("--no-batching", action="store_true", help="one request a forward, also in SGLang's scheduler")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")


def run_simulate(namespace: argparse.Namespace) -> int:
    """Simulate, print, write. Raises BadInput."""
    started = datetime.now(UTC)
    if namespace.json is not None and not namespace.json.absolute().parent.is_dir():
        raise BadInput(f"--json: the folder {namespace.json.parent} does not exist")
    if namespace.workers < namespace.routers:
        raise BadInput(f"--routers: {namespace.routers} routers need at least as many --workers")
    workload = chosen_workload(namespace)
    defaults = SchedulerSettings()
    machine = load_machine(namespace.cost_model, namespace.layers)
    experiment = Experiment(
        workload=workload.play,
        machine=machine,
        objectives_s=workload.objectives_s(machine, namespace),
        workers=namespace.workers,
        routers=namespace.routers,
        dispatch=namespace.dispatch,
        aging=AgingLimits(max_wait_s=namespace.max_wait_secs, max_suspend_s=namespace.max_suspend_secs),
        batching=BatchLimits(max_new_tokens=namespace.batch_tokens, alpha=defaults.slack_fraction),
        is_batching=not namespace.no_batching,
        max_tasks=defaults.max_tasks,
        switch_s=namespace.switch_us / 1e6,
        error=namespace.prediction_error,
        seed=namespace.seed,
    )
    console = Console(width=None if sys.stdout.isatty() else WIDTH)  # a file has no width, and Rich would take 80
    with console.status("measuring the workload") as status:
        size = experiment.measure()
        rows: dict[str, list[dict[str, Any]]] = {one.name: [] for one in namespace.policy}
        bounds: list[dict[str, float]] = []
        timing: list[dict[str, Any]] = []
        for load in namespace.load:
            interval_factor = size.interval_factor(load, namespace.workers)
            for policy in namespace.policy:
                status.update(f"load {load:g}: {policy.name}")
                began = time.perf_counter()
                tally = experiment.simulate(policy, interval_factor)
                wall_s = time.perf_counter() - began
                rows[policy.name].append(result_row(load, tally, namespace.workers))
                timing.append(_timing(policy, load, tally.events, wall_s))
            if namespace.bound:
                status.update(f"load {load:g}: the bound")
                bounds.append({"load": load} | _bounds(experiment, namespace, interval_factor, size.requests))
    title = f"{size.requests:,} requests of {workload.about['name']} on {namespace.workers} × {machine.name}"
    console.print(table(rows, bounds, title))
    events, wall_s = sum(one["events"] for one in timing), sum(one["wall_s"] for one in timing)
    console.print(f"simulated {events:,} events in {wall_s:.1f} s: {events / wall_s:,.0f} a second", soft_wrap=True)
    if namespace.json is not None:
        document = {
            "policies": rows,
            "bound": bounds,
            "workload": workload.about | asdict(size),
            "settings": _settings(namespace, experiment),
            "timing": timing,
            "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,  # Linux counts in KiB
        }
        _write_json(namespace.json, document | provenance(["flowprefill", *sys.argv[1:]], started))
    return 0


def _bounds(
    experiment: Experiment, namespace: argparse.Namespace, interval_factor: float, requests: int
) -> dict[str, float]:
    """What no policy passes, as attainment; and where one window holds all, what one worker reaches for sure."""
    most = experiment.bound(namespace.policy, interval_factor, namespace.bound_window, namespace.bound_seconds)
    found = {"attainment": round(most, 6)}
    if namespace.workers == 1 and requests <= namespace.bound_window:
        alone = experiment.without_batches(interval_factor, namespace.bound_seconds)
        found |= {"surely": round(alone.least / requests, 6), "without_batches": round(alone.most / requests, 6)}
    return found


def _timing(policy: Configuration, load: float, events: int, wall_s: float) -> dict[str, Any]:
    return {
        "policy": policy.name,
        "load": load,
        "events": events,
        "wall_s": round(wall_s, 3),
        "events_per_s": round(events / wall_s),
    }


def _settings(namespace: argparse.Namespace, experiment: Experiment) -> dict[str, Any]:
    """Everything that the figures depend on, but for the workload's rows."""
    machine = experiment.machine
    return {
        "cost_model": {
            "name": machine.name,
            "coefficients": {name: getattr(machine.cost, name) for name in machine.cost.__struct_fields__},
            "layers": machine.layers,
            "operators": [one.name for one in machine.operators],
            "handoff_base_s": machine.handoff_base_s,
            "handoff_token_s": machine.handoff_token_s,
        },
        "objectives_s": dict(experiment.objectives_s),
        "aging": asdict(experiment.aging),
        "batching": asdict(experiment.batching) if experiment.is_batching else None,
        "bound_batch_tokens": experiment.batch_tokens(namespace.policy) if namespace.bound else None,
        "bound_window": namespace.bound_window if namespace.bound else None,
        "bound_seconds": namespace.bound_seconds if namespace.bound else None,
    } | {
        flag: getattr(namespace, flag)
        for flag in (
            "workers",
            "routers",
            "dispatch",
            "switch_us",
            "prediction_error",
            "seed",
            "start_s",
            "duration_s",
            "limit",
            "length_scale",
        )
    }


def _policies(text: str) -> list[Configuration]:
    try:
        found = [configuration.parse(name) for name in text.split(",")]
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if len({one.name for one in found}) < len(found):
        raise argparse.ArgumentTypeError(f"a policy is named twice: {text}")
    return found


def _loads(text: str) -> list[float]:
    return [factor(load) for load in text.split(",")]


def _write_json(path: Path, document: dict[str, Any]) -> None:
    """In one step, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
