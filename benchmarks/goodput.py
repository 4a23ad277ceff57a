"""Maximum goodput on a real trace: FlowPrefill's policies against stock SGLang's settings, in one run.

The highest request rate at which 90% of requests meet their TTFT objective. Each configuration is a real prefill
worker with a real router, all of them alive at once, one under load at a time; they share one decode instance. A repeat
is a window of the trace: its lengths and the pattern of its arrivals are the same for every configuration, and a
probe plays it at another rate. Configurations take turns probe by probe. A window's requests are a fixed number, so
that every probe counts the same number of them.

A request counts as met when its first token reached the client within the objective. A probe ends once that is decided
for all: requests that are past their objective when the last one is decided are aborted, not before, since they are
part of the load. A probe in which more have missed than any rate of interest has is cut short at once, and counted as
if all the others met theirs.

The workload is a mix of two real traces: chats of the Azure conversation trace and the long contexts of Mooncake's,
merged by their own times; Mooncake's are known to three seconds, within which they are spread. Prompts too long for the
model are left out, and counted.

    python benchmarks/goodput.py --json result.json
    python benchmarks/goodput.py --trace AzureLLMInferenceTrace_conv.csv --format azure --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from live_workers import (
    DEEP_SHAPE,
    STOCK_UNCHUNKED,
    Configuration,
    LiveWorker,
    LiveWorkers,
    bench_model,
    flowprefill,
    stock,
    stock_chunked,
)
from results_file import write_result

from flowprefill_sglang.bench.client import PlannedRequest, RequestRecord, replay
from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.goodput import TARGET, Estimate, GoodputSearch, Probe, estimate
from flowprefill_sglang.bench.objectives import REFERENCE, Objective, median_prompts, scaled_objectives
from flowprefill_sglang.bench.plan import plan_requests
from flowprefill_sglang.bench.probe import measure_isolated_ttft
from flowprefill_sglang.bench.report import percentile
from flowprefill_sglang.workload.classes import assign_classes
from flowprefill_sglang.workload.formats import FORMATS, load_trace
from flowprefill_sglang.workload.trace import TraceRequest, cap_outputs, scale_lengths, spread_ties

CONFIGURATIONS: tuple[Configuration, ...] = (
    flowprefill("feasible", name="flowprefill"),
    flowprefill("sedf", name="flowprefill-sedf"),
    STOCK_UNCHUNKED,
    stock_chunked(8192),
    stock_chunked(2048),
    stock_chunked(512),
    # In chunks of SGLang's own choice for this platform.
    stock("shortest-prefill-first", "--schedule-policy", "shortest-prefill-first"),
    stock("hrrn", "--schedule-policy", "hrrn"),
)
COARSE_TIMES = frozenset({"mooncake"})
"""Formats whose arrivals are known to a few seconds only: they are spread over that time."""
HOPELESS = 0.75
"""A probe is cut short once its attainment cannot be above this."""
GUESSED_LOAD = {True: 0.35, False: 1.2}
"""Where the first search starts, as a share of what the machine can compute: stock, ours. No result depends on it."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of the trace."""

    number: int
    first_row: int
    """In the trace, without the rows left out."""
    requests: tuple[TraceRequest, ...]

    def at(self, rate_rps: float) -> list[TraceRequest]:
        """Its requests, with arrivals stretched or compressed to a mean rate."""
        span_s = self.requests[-1].arrival_s
        factor = (len(self.requests) - 1) / span_s / rate_rps
        return [replace(r, arrival_s=r.arrival_s * factor) for r in self.requests]


def main() -> int:
    """Search, print, write."""
    options = arguments()
    missing = [trace for trace in options.trace if not trace.is_file()]
    if missing:
        names = ", ".join(map(str, missing))
        print(f"no trace at {names}: --trace, or FLOWPREFILL_TRACES for their folder", file=sys.stderr)
        return 2
    result = asyncio.run(Benchmark(options).run())
    if options.json:
        write_result(options.json, seed=options.seed, measured=result)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trace", type=Path, action="append", help="default: Azure's conversations and Mooncake's, merged"
    )
    parser.add_argument("--format", choices=sorted(FORMATS), action="append", help="of each trace, in their order")
    parser.add_argument("--requests", type=int, default=160, help="of a window, at most: as many as --minutes allow")
    parser.add_argument("--repeats", type=int, default=3, help="windows, spread over the trace")
    parser.add_argument("--probes", type=int, default=4, help="rates tried for each configuration and window")
    parser.add_argument("--length-scale", type=float, default=0.25, help="prompt lengths are multiplied by this")
    parser.add_argument("--max-tokens", type=int, default=8_000, help="longer prompts, after scaling, are left out")
    parser.add_argument("--layers", type=int, default=DEEP_SHAPE.num_hidden_layers, help="of the model")
    parser.add_argument("--only", default="", help="names of configurations, with commas; default: all")
    parser.add_argument("--minutes", type=float, default=28, help="about how long to measure; decides a window's size")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts' content")
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("--quick", action="store_true", help="smoke run: one window of 40 requests, two probes")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    beside = Path(__file__).resolve().parents[2] / "shared" / "traces"
    folder = Path(os.environ.get("FLOWPREFILL_TRACES", beside))
    if options.trace is None and options.format is None:
        options.trace = [folder / "azure_llm_conv_2023.csv", folder / "mooncake_conversation.jsonl"]
        options.format = ["azure", "mooncake"]
    options.trace, options.format = options.trace or [], options.format or []
    if len(options.trace) != len(options.format):
        parser.error("each --trace needs its --format")
    if options.quick:
        options.requests, options.repeats, options.probes = 40, 1, 2
    known = {c.name: c for c in CONFIGURATIONS}
    names = options.only.split(",") if options.only else list(known)
    if unknown := set(names) - set(known):
        parser.error(f"--only knows {', '.join(known)}, not {', '.join(sorted(unknown))}")
    options.configurations = [known[name] for name in names]
    return options


def load_windows(options: argparse.Namespace) -> tuple[list[Window], dict[str, Any]]:
    """Windows at equal distances in the trace, and what the result file says about it."""
    rows: list[TraceRequest] = []
    files = []
    for path, name in zip(options.trace, options.format, strict=True):
        trace = load_trace(path, name)
        rows += spread_ties(trace.requests, options.seed) if name in COARSE_TIMES else trace.requests
        files.append({"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    rows.sort(key=lambda row: row.arrival_s)
    # Content is no part of this: hash ids of two traces could meet, and every configuration has the same radix cache.
    scaled = cap_outputs(scale_lengths(assign_classes(rows), options.length_scale), 1)
    fitting = [replace(r, hash_ids=()) for r in scaled if r.input_tokens <= options.max_tokens]
    windows = []
    for number in range(options.repeats):
        first = (2 * number + 1) * len(fitting) // (2 * options.repeats)  # a trace's beginning is not like the rest
        part = fitting[first : first + options.requests]
        windows.append(
            Window(
                number=number,
                first_row=first,
                requests=tuple(replace(r, arrival_s=r.arrival_s - part[0].arrival_s) for r in part),
            )
        )
    about = {
        "files": files,
        "requests": len(rows),
        "left_out_as_too_long": len(scaled) - len(fitting),
        "length_scale": options.length_scale,
    }
    return windows, about


def about_window(window: Window) -> dict[str, Any]:
    """What the result file says of a window."""
    return {
        "first_row": window.first_row,
        "requests": len(window.requests),
        "classes": dict(Counter(r.class_name for r in window.requests)),
        "mean_input_tokens": round(fmean(r.input_tokens for r in window.requests), 1),
        "own_rate_rps": round((len(window.requests) - 1) / window.requests[-1].arrival_s, 3),
    }


class Benchmark:
    """One run over all windows and configurations."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.windows, self.about_trace = load_windows(options)
        self.model, self.shape = bench_model(options.layers)
        self.objectives: dict[str, Objective] = {}
        self.rows: list[dict[str, Any]] = []
        self.found: dict[str, dict[int, Estimate]] = {c.name: {} for c in options.configurations}

    async def run(self) -> dict[str, Any]:
        """The result document."""
        async with LiveWorkers(self.model, self.options.configurations, log_dir=self.options.log_dir) as live:
            began_at = time.monotonic()
            capacity_rps = await self._set_objectives(live)
            self._fit_into_time(capacity_rps)
            for window in self.windows:
                minutes = (time.monotonic() - began_at) / 60
                if window.number and minutes * (1 + 1 / window.number) > 1.2 * self.options.minutes:
                    print(f"window {window.number} is left out: {minutes:.0f} minutes have passed", flush=True)
                    break
                await self._search(live, window, capacity_rps)
            return self._document(live, capacity_rps)

    async def _set_objectives(self, live: LiveWorkers) -> float:
        """Objectives of the windows' classes, scaled to this machine; returns the rate that would keep it busy."""
        requests = [request for window in self.windows for request in window.requests]
        medians = median_prompts(requests)
        isolated = await measure_isolated_ttft(
            live[self.options.configurations[-1].name].url,
            medians,
            endpoint=ENDPOINTS["generate"],
            model="",
            prompts="bytes",
            seed=self.options.seed,
            repeats=5,
        )
        self.isolated = isolated
        self.objectives = scaled_objectives(medians, isolated, self.options.length_scale)
        for name, objective in self.objectives.items():
            print(
                f"{name:7} median {objective.median_input_tokens} tokens, alone {objective.isolated_ttft_ms:.0f} ms, "
                f"objective {objective.slo_ms:.0f} ms (x {objective.factor:.3f} of the class's)",
                flush=True,
            )
        counts = Counter(request.class_name for request in requests)
        return len(requests) / sum(count * median(isolated[name]) for name, count in counts.items())

    def _fit_into_time(self, capacity_rps: float) -> None:
        """As many requests a window as can be probed in the time given."""
        probes = self.options.probes * len(self.windows)
        per_request_s = sum(1 / (capacity_rps * GUESSED_LOAD[c.is_stock]) for c in self.options.configurations)
        count = min(self.options.requests, max(30, int(60 * self.options.minutes / (probes * per_request_s))))
        self.windows = [replace(window, requests=window.requests[:count]) for window in self.windows]
        print(f"busy at about {capacity_rps:.1f} rps; {count} requests a window", flush=True)

    async def _search(self, live: LiveWorkers, window: Window, capacity_rps: float) -> None:
        searches = {}
        for configuration in self.options.configurations:
            earlier = list(self.found[configuration.name].values())
            guess = capacity_rps * GUESSED_LOAD[configuration.is_stock]
            searches[configuration.name] = GoodputSearch(guess_rps=earlier[-1].rate_rps if earlier else guess)
        for number in range(self.options.probes):
            for name, search in searches.items():
                rate_rps = search.next_rate()
                row = await self._probe(live[name], window, rate_rps)
                search.probes.append(Probe(rate_rps=rate_rps, attained=row["attained"], requests=row["requests"]))
                self.rows.append({"window": window.number, "probe": number, "configuration": name} | row)
                print(
                    f"window {window.number} probe {number} {name:24} {rate_rps:7.2f} rps  attained "
                    f"{row['attained'] / row['requests']:.3f}{' (cut short)' if row['cut_short'] else ''}  "
                    f"late p99 {row['client_late_p99_ms']:.0f} ms  {row['wall_s']:.0f} s",
                    flush=True,
                )
        for name, search in searches.items():
            self.found[name][window.number] = estimate(search.probes)

    async def _probe(self, worker: LiveWorker, window: Window, rate_rps: float) -> dict[str, Any]:
        plan = plan_requests(
            window.at(rate_rps),
            run_id=f"goodput-{uuid.uuid4().hex[:12]}",
            seed=self.options.seed,
            endpoint=ENDPOINTS["generate"],
            model="",
            objectives=self.objectives,
        )
        cpu_before_s = worker.scheduler_cpu_s()
        records, wall_s, is_cut_short = await offer(worker.url, plan)
        cpu_s = worker.scheduler_cpu_s() - cpu_before_s
        await worker.drained()
        met = [r for r in records.values() if is_met(r, self.objectives[r.class_name])]
        missed = {rid for rid, r in records.items() if not is_met(r, self.objectives[r.class_name])}
        late_ms = [1_000 * r.late_s for r in records.values()]
        by_class = Counter(planned.class_name for planned in plan)
        met_by_class = Counter(r.class_name for r in met)
        ttft_ms = {name: [1_000 * (r.ttft_s or 0) for r in met if r.class_name == name] for name in by_class}
        return {
            "rate_rps": round(rate_rps, 4),
            "requests": len(plan),
            "attained": len(plan) - len(missed) if is_cut_short else len(met),
            "cut_short": is_cut_short,
            "errors": dict(Counter(r.error for r in records.values() if r.error)),
            "undecided": len(plan) - len(records),
            "wall_s": round(wall_s, 2),
            "scheduler_cpu_s": round(cpu_s, 2),
            "client_late_p99_ms": round(percentile(late_ms, 99), 2),
            "client_late_max_ms": round(max(late_ms, default=0.0), 2),
            "classes": {
                name: {
                    "requests": count,
                    "attained": met_by_class[name],
                    "met_ttft_p50_ms": round(percentile(ttft_ms[name], 50), 1) if ttft_ms[name] else None,
                }
                for name, count in by_class.items()
            },
        }

    def _document(self, live: LiveWorkers, capacity_rps: float) -> dict[str, Any]:
        first = self.options.configurations[0].name
        rates = {name: [e.rate_rps for e in found.values()] for name, found in self.found.items()}
        ratios = {
            f"{first}/{name}": spread([a / b for a, b in zip(rates[first], rates[name], strict=True)])
            for name in rates
            if name != first
        }
        print()
        for name in rates:
            ratio = ratios.get(f"{first}/{name}")
            against = (
                f"   {first} is {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) times it"
                if ratio
                else ""
            )
            s = spread(rates[name])
            print(f"{name:24} {s['median']:6.2f} rps ({s['min']:.2f} to {s['max']:.2f}){against}", flush=True)
        return {
            "target_attainment": TARGET,
            "trace": self.about_trace,
            "windows": [about_window(window) for window in self.windows],
            "busy_at_rps": round(capacity_rps, 3),
            "model": {"shape": asdict(self.shape)},
            "placement": "scheduler on the first core, all else on the others" if live.is_pinned else "not pinned",
            "objectives_reference": REFERENCE,
            "objectives": {name: asdict(objective) for name, objective in self.objectives.items()},
            "isolated_ttft_s": self.isolated,
            "flags": {c.name: list(c.flags) for c in self.options.configurations},
            "configs": {
                name: {
                    "max_goodput_rps": spread(rates[name]),
                    "windows": {str(number): asdict(found) for number, found in self.found[name].items()},
                }
                for name in rates
            },
            "ratios": ratios,
            "rows": self.rows,
        }


def is_met(record: RequestRecord, objective: Objective) -> bool:
    """Complete, and the first token in time."""
    return record.error is None and record.ttft_s is not None and 1_000 * record.ttft_s <= objective.slo_ms


async def offer(url: str, plan: Sequence[PlannedRequest]) -> tuple[dict[str, RequestRecord], float, bool]:
    """Play a plan until every request is decided; whoever is then still under way has missed and is aborted.

    Returns the records of answered requests by request id, the time it took, and whether it was cut short as hopeless.
    """
    records: dict[str, RequestRecord] = {}
    is_decided = asyncio.Event()
    slo_s = {planned.rid: (planned.slo_ms or 0.0) / 1_000 for planned in plan}
    most_misses = (1 - HOPELESS) * len(plan)
    missed = 0

    def on_record(record: RequestRecord) -> None:
        nonlocal missed
        records[record.rid] = record
        missed += record.error is not None or record.ttft_s is None or record.ttft_s > slo_s[record.rid]
        if len(records) == len(plan) or missed > most_misses:
            is_decided.set()

    began_at = time.perf_counter()
    load = asyncio.create_task(replay(url, plan, on_record=on_record, started_at=began_at))
    last_at = max(planned.at_s + slo_s[planned.rid] for planned in plan)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(last_at + 0.5):  # half a second for answers on their way
            await is_decided.wait()
    wall_s = time.perf_counter() - began_at
    load.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await load
    return records, wall_s, missed > most_misses


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": round(median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


if __name__ == "__main__":
    sys.exit(main())
