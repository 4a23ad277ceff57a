"""What the scheduling rules of docs/scheduling.md were chosen by: one preemptive machine in simulation, under the
policies, under the aging limits, with time set aside, and with batches. No worker, no GPU; a seed gives the same
figures everywhere.

    python benchmarks/scheduling_rules.py --json result.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from results_file import write_result

from flowprefill_sglang.core.aging import AgingLimits
from flowprefill_sglang.core.batching import BatchLimits, fill_batch
from flowprefill_sglang.core.candidate import Candidate, Standing
from flowprefill_sglang.core.forecast import PART
from flowprefill_sglang.core.policies import POLICIES, on_time_first, sedf
from flowprefill_sglang.core.prefill_cost import CostModel, Extent
from flowprefill_testing.single_machine import JobClass, Run, aged, draw, foreseeing, serve

MODEL = CostModel(base_s=0.012, short_token_s=0.0, long_token_s=4.5e-5, knee_tokens=256, pair_s=7e-10, request_s=2e-4)
"""Of the shape of a model of 8 billion parameters on a large GPU; not a measurement."""
SHORT_PROMPTS = (
    JobClass(objective_s=0.1, median=60, share=0.7),
    JobClass(objective_s=0.25, median=200, share=0.2),
    JobClass(objective_s=4.0, median=2000, share=0.1),
)
MIXED_PROMPTS = (
    JobClass(objective_s=0.25, median=200, share=0.5),
    JobClass(objective_s=0.5, median=600, share=0.2),
    JobClass(objective_s=4.0, median=4000, share=0.2),
    JobClass(objective_s=6.0, median=12000, share=0.1),
)

FORESEEING = ("set aside alone", "set aside in a batch", "product")
"""Who joins in S-EDF order and time is set aside: for arrivals as they are alone, as they are in a batch; and with the
product's limit for those that were given up."""
BATCHES = (
    *((1, "policy"), (512, "sedf"), (2048, "sedf"), (2048, "policy"), (4096, "sedf")),
    *((2048, join) for join in FORESEEING),
)


def summary(runs: list[Run]) -> dict[str, Any]:
    late_s = sorted(one.ttft_s for run in runs for one in run.served if not one.is_in_time)
    return {
        "attainment": round(mean(run.attainment for run in runs), 4),
        "mean_ttft_s": round(mean(run.mean_ttft_s for run in runs), 3),
        "longest_ttft_s": round(max(one.ttft_s for run in runs for one in run.served), 1),
        "late_p99_s": round(late_s[int(0.99 * len(late_s))], 1) if late_s else 0.0,
        "attainment_of_each": [round(run.attainment, 4) for run in runs],
    }


def aging_rows(seeds: range, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for load in (0.8, 0.9, 1.2, 2.0):
        workloads = [draw(seed, load=load, count=count) for seed in seeds]
        for name, policy in POLICIES.items():
            rows.append({"part": "aging", "load": load, "policy": name, "max_share": 0.0})
            rows[-1] |= summary([serve(jobs, policy) for jobs in workloads])
        for share in (0.01, 0.02, 0.05, 0.2, 1.0):
            rows.append({"part": "aging", "load": load, "policy": "feasible", "max_share": share})
            limits = AgingLimits(max_share=share)
            rows[-1] |= summary([serve(jobs, aged(POLICIES["feasible"], limits)) for jobs in workloads])
    return rows


def forecast_rows(seeds: range, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for load in (0.9, 1.2, 2.0, 3.0):
        workloads = [draw(seed, load=load, count=count) for seed in seeds]
        for part in (0.0, 0.1, 0.2, 0.3, 0.5, 0.8):
            rows.append({"part": "forecast", "load": load, "policy": "feasible", "set_aside": part})
            rows[-1] |= summary([serve(jobs, foreseeing(POLICIES["feasible"], part)) for jobs in workloads])
    return rows


def batching_rows(seeds: range, count: int) -> list[dict[str, Any]]:
    return [
        {"part": "batching", "prompts": prompts, "load": load, "policy": policy, "max_new_tokens": budget, "join": join}
        | summary([serve_in_batches(seed, load, count, classes, policy, budget, join) for seed in seeds])
        for prompts, classes in (("short", SHORT_PROMPTS), ("mixed", MIXED_PROMPTS))
        for load in (0.9, 2.0, 3.0)
        for policy in ("sedf", "feasible")
        for budget, join in (
            (1, "policy"),
            (512, "sedf"),
            (2048, "sedf"),
            (2048, "policy"),
            (4096, "sedf"),
            (2048, "product"),
        )
        if join != "product" or policy == "feasible"
    ]


def serve_in_batches(
    seed: int, load: float, count: int, classes: Sequence[JobClass], name: str, budget: int, join: str
) -> Run:
    lengths: list[int] = []

    def work_s_of(tokens: float) -> float:
        lengths.append(max(8, int(tokens)))
        return MODEL.seconds([Extent(lengths[-1])])

    jobs = draw(seed, load=load, count=count, classes=classes, work_s_of=work_s_of)

    limits = BatchLimits(max_new_tokens=budget)

    def gather(head: Candidate, present: Sequence[Candidate], now: float) -> tuple[list[Candidate], float]:
        ranking = POLICIES[name](present, now)
        behind = [one for one in ranking if one is not head]
        batch = fill_batch(
            head,
            ranking if join == "policy" else sedf(present, now),
            now,
            extent_of=lambda one: Extent(lengths[one.key]) if one.standing is Standing.WAITING else None,
            predict=MODEL.seconds,
            kv_room_tokens=1 << 30,
            limits=limits,
            kept=set(on_time_first(behind, now + head.remaining_s)) if join == "product" else None,
        )
        return batch.members, batch.predicted_s

    def added_s(candidate: Candidate) -> float:
        return limits.added_s(Extent(lengths[candidate.key]), MODEL.parts)

    if join not in FORESEEING:
        return serve(jobs, POLICIES[name], gather)
    alone = join == "set aside alone"
    return serve(jobs, foreseeing(POLICIES[name], PART, attrgetter("remaining_s") if alone else added_s), gather)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    rows = [row for part in (aging_rows, forecast_rows, batching_rows) for row in part(seeds, arguments.requests)]
    for row in rows:
        print(*(f"{key} {value}" for key, value in row.items()))
    if arguments.json is not None:
        write_result(arguments.json, seed=0, measured={"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
